"""Passes beside a training loop's own, which leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from source_proj.gradients.batches import Batch, own_copy, take
from source_proj.gradients.evaluation import evaluating
from source_proj.gradients.kept import kept_states

__all__ = ["called", "is_probed", "part", "probing"]


def called(model: nn.Module, batch: Batch) -> Any:
    """What a model gives for (args, kwargs), which it may change."""
    args, kwargs = own_copy(batch, keep_flags=True)
    return model(*args, **kwargs)


def part(args: tuple[Any, ...], kwargs: dict[str, Any], examples: list[int], size: int) -> Batch:
    """Some of a batch's examples, as `called` takes them."""
    return take(args, examples, size), take(kwargs, examples, size)


@contextmanager
def probing(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Run a model beside its training: without gradients, and leaving it, and random states, as they were.

    Args:
        model: the model.
        training: in the modes that its modules have, but without dropout; default: in evaluation mode.
    """
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    mode = _without_dropout(model) if training else evaluating(model)
    before = _PROBED.set(True)
    try:
        with torch.random.fork_rng(devices), kept_states(model), _plain_attention(), mode, torch.no_grad():
            yield
    finally:
        _PROBED.reset(before)


def is_probed() -> bool:
    """Whether a model runs beside its training, here."""
    return _PROBED.get()


_PROBED: ContextVar[bool] = ContextVar("_PROBED", default=False)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Without torch's own fast path of inference, in which padded batches are nested tensors."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


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
