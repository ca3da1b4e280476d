"""Layers of transformers that checkpoint: they keep no activations, and compute them once more in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

__all__ = ["checkpoints", "wrapping"]

Function = Callable[..., Any]


def checkpoints(module: nn.Module) -> bool:
    """Whether a layer of transformers is told to, in the way that autograd can follow."""
    if not vars(module).get("gradient_checkpointing", False):
        return False
    known = any(base.__name__ == "GradientCheckpointingLayer" for base in type(module).__mro__)
    function = getattr(module, "_gradient_checkpointing_func", None) if known else None
    return getattr(function, "keywords", {}).get("use_reentrant", True) is False


@contextmanager
def wrapping(layer: Any, wrapped: Callable[[Function], Function]) -> Iterator[None]:
    """Within, what a layer checkpoints is wrapped first, and so is what it computes once more, also later."""
    checkpoint = layer._gradient_checkpointing_func
    # A partial, too, as it may be wrapped again.
    layer._gradient_checkpointing_func = partial(_wrapped, checkpoint, wrapped, **checkpoint.keywords)
    try:
        yield
    finally:
        layer._gradient_checkpointing_func = checkpoint


def _wrapped(
    checkpoint: Function, wrapped: Callable[[Function], Function], function: Function, *args: Any, **told: Any
) -> Any:
    return checkpoint(wrapped(function), *args, **told)
