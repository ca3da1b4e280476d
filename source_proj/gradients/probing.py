"""Passes beside a training loop's own, which leave nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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
def probing(model: nn.Module) -> Iterator[None]:
    """Run a model beside its training: in evaluation mode, without gradients, random states and buffers kept."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    kept = [(module, name, buffer, buffer.clone()) for module, name, buffer in _buffers(model)]
    with torch.random.fork_rng(devices), evaluating(model), torch.no_grad():
        try:
            yield
        finally:
            for module, name, buffer, before in kept:
                buffer.copy_(before)
                module._buffers[name] = buffer  # a forward pass may put another one in its place


def _buffers(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Each buffer with its module and its name there."""
    return [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
