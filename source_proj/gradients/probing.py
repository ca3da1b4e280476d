"""Passes beside a training loop's own, which leave nothing behind."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from source_proj.gradients.batches import Batch, own_copy, take
from source_proj.gradients.evaluation import evaluating

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
        with torch.random.fork_rng(devices), _kept_states(model), mode, torch.no_grad():
            yield
    finally:
        _PROBED.reset(before)


def is_probed() -> bool:
    """Whether a model runs beside its training, here."""
    return _PROBED.get()


_PROBED: ContextVar[bool] = ContextVar("_PROBED", default=False)


@contextmanager
def _kept_states(model: nn.Module) -> Iterator[None]:
    """Put back what a forward pass may leave in a model, Python's and numpy's random states, and buffers.

    Buffers are exchanged for the time, and not written back: autograd may have saved them for a pass that was made.
    """
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    filled = [(kept, kept.copy()) for _, own in attributes for kept in own.values() if type(kept) in (list, dict, set)]
    states, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002 (what models draw from)
    clones: dict[int, Tensor] = {}
    for module, _ in attributes:
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = clones.setdefault(id(buffer), buffer.clone())
    try:
        yield
    finally:
        random.setstate(states)
        np.random.set_state(numpys)  # noqa: NPY002
        for module, own in attributes:
            vars(module).clear()
            vars(module).update(own)
        for kept, content in filled:
            kept.clear()
            kept.extend(content) if isinstance(kept, list) else kept.update(content)


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
