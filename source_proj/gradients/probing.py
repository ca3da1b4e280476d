"""Passes beside a training loop's own, which leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from source_proj.gradients.batches import Batch, own_copy, take
from source_proj.gradients.evaluation import evaluating

__all__ = ["called", "part", "probing"]


def called(model: nn.Module, batch: Batch) -> Any:
    """What a model gives for (args, kwargs), which it may change."""
    args, kwargs = own_copy(batch, keep_flags=True)
    return model(*args, **kwargs)


def part(args: tuple[Any, ...], kwargs: dict[str, Any], examples: list[int], size: int) -> Batch:
    """Some of a batch's examples, as `called` takes them."""
    return take(args, examples, size), take(kwargs, examples, size)


@contextmanager
def probing(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Run a model beside its training: without gradients, random states and buffers kept.

    Args:
        model: the model.
        training: in the modes that its modules have, but without dropout; default: in evaluation mode.
    """
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    kept = [(module, name, buffer, buffer.clone()) for module, name, buffer in _buffers(model)]
    mode = _without_dropout(model) if training else evaluating(model)
    with torch.random.fork_rng(devices), mode, torch.no_grad():
        try:
            yield
        finally:
            for module, name, buffer, before in kept:
                buffer.copy_(before)
                module._buffers[name] = buffer  # a forward pass may put another one in its place


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """What a model does in training, but for dropout, whose masks are others for each part of a batch."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, nn.RNNBase) and module.dropout]
    shares = [layer.dropout for layer in layers]
    for layer in layers:
        layer.dropout = 0.0
    try:
        with _NoDropout():
            yield
    finally:
        for layer, share in zip(layers, shares, strict=True):
            layer.dropout = share


class _NoDropout(TorchFunctionMode):
    """Hands on what dropout is given."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, options = getattr(func, "__name__", ""), dict(kwargs or {})
        if name.rstrip("_").endswith(_DROPOUT):
            return args[0] if args else options["input"]
        if name == "scaled_dot_product_attention":
            args, options = args[:4], {**dict(zip(_BEHIND_MASK, args[4:], strict=False)), **options, "dropout_p": 0.0}
        elif name == "multi_head_attention_forward":
            options["training"] = False
        return func(*args, **options)


_DROPOUT = ("dropout", "dropout1d", "dropout2d", "dropout3d")
_BEHIND_MASK = ("dropout_p", "is_causal")


def _buffers(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Each buffer with its module and its name there."""
    return [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
