"""Whether the examples of a batch are apart: a layer's output for each is the same among other examples."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import TypeAlias

import torch
from torch import Tensor

from source_proj._errors import GradientError

__all__ = ["Outputs", "cannot_run", "random_halves", "require_same"]

Outputs: TypeAlias = list[tuple[str, Tensor]]
"""Outputs of layers by name, in the order of their calls, examples in front."""

_APART, _APART_HALF = 1e-3, 5e-2  # relative: outputs of half a batch, in float32 and with half precision


def random_halves(size: int, draw: int) -> tuple[Tensor, ...]:
    """Two sets of a batch's examples, each in an order of its own: what a model sorts is sorted otherwise there.

    Args:
        size: number of examples, at least 2.
        draw: the seed.
    """
    order = torch.randperm(size, generator=torch.Generator().manual_seed(draw), device="cpu")
    return order.chunk(2)


def require_same(whole: Outputs, parts: Sequence[Outputs], halves: Sequence[Tensor]) -> None:
    """Compare what layers give for a batch and for its halves.

    Args:
        whole: for the batch.
        parts: for the examples of each half.
        halves: which these are, in their order there.

    Raises:
        GradientError: other layers were called, or the output of one is another for some example.
    """
    if any([name for name, _ in part] != [name for name, _ in whole] for part in parts):
        raise GradientError("the layers that the model calls depend on which examples are in a batch")
    order = torch.cat(tuple(halves))
    for place, (name, there) in enumerate(whole):
        outputs = [part[place][1] for part in parts]
        shares = [output.shape[0] / len(half) for output, half in zip(outputs, halves, strict=True)]
        each = there.shape[0] // len(order)  # rows of an example, where it has several
        if {*shares} != {each} or any(output.shape[1:] != there.shape[1:] for output in outputs):
            raise GradientError(_of(name))
        here = torch.cat(outputs).unflatten(0, (len(order), each))
        expected = there.unflatten(0, (len(order), each))[order.to(there.device)]
        apart = _APART if there.dtype in (torch.float32, torch.float64) else _APART_HALF
        size = float(there.norm())
        if isfinite(size) and not float((here - expected).norm()) <= apart * size:  # NaN of a half alone, too
            raise GradientError(_of(name))


def cannot_run(error: Exception) -> GradientError:
    """What to say where a model raises for a half."""
    return GradientError(f"{_LOST}, and the model does not run a part of a batch ({error}): {_UNKNOWN}")


_LOST = "autograd's graph does not say where each example of a batch is"
_UNKNOWN = "no gradient is known to be one example's own, so build the bank after training, without capture="


def _of(name: str) -> str:
    return (
        f"{_LOST}, and the output of {name!r} for an example depends on the other examples of its batch, or on random "
        f"numbers other than dropout's: {_UNKNOWN}"
    )
