"""Whether the examples of a batch are apart: a layer's output for each is the same among other examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from source_proj._errors import GradientError

__all__ = ["OUTPUT", "Marks", "Outputs", "cannot_run", "random_halves", "require_same"]

Outputs: TypeAlias = list[tuple[str, Tensor]]
"""Outputs of layers by name, in the order of their calls, and of the model, examples in front."""

OUTPUT = "the model's output"
_SPREAD, _SHIFT = 0.2, 0.01  # of marks: a factor's deviation from one, and what is added, as of an output of zeros
_APART, _APART_COARSE = 1e-3, 5e-2  # relative: outputs of half a batch, in float32 and where products are coarser


class Marks:
    """Gives what layers make of each example a factor of its own, the same in whatever batch the example is.

    Rows that stand in another order than the examples then differ between a batch and its halves however alike the
    examples are: by their factors, if not by themselves.

    Args:
        examples: which of the batch's examples are in this pass, in their order.
        total: examples of the whole batch.
        plain: give no factors, as to a model that bears none: one whose outputs are probabilities, say.
    """

    def __init__(self, examples: Tensor, total: int, *, plain: bool = False) -> None:
        self._examples, self._total, self._turn, self._plain = examples, total, 0, plain

    def on(self, output: Tensor, place: int = 0) -> Tensor:
        """What a layer made, (B r, ...) or with examples at another place, marked.

        Outputs that do not hold as many rows for each example are left alone.
        """
        self._turn += 1
        size = len(self._examples)
        if self._plain or not output.is_floating_point() or output.dim() <= place or output.shape[place] % size:
            return output
        generator = torch.Generator().manual_seed(self._turn)
        drawn = torch.randn(self._total, generator=generator, dtype=torch.float32, device="cpu").clamp(-2, 2)
        own = drawn[self._examples].repeat_interleave(output.shape[place] // size)
        own = own.to(output).reshape([-1 if dim == place else 1 for dim in range(output.dim())])
        return output * (1 + _SPREAD * own) + _SHIFT * own


def random_halves(size: int, draw: int) -> tuple[Tensor, ...]:
    """Two sets of a batch's examples, each in an order of its own: what a model sorts is sorted otherwise there.

    Args:
        size: number of examples; of one there is one set.
        draw: the seed.
    """
    order = torch.randperm(size, generator=torch.Generator().manual_seed(draw), device="cpu")
    return order.chunk(2)


def require_same(whole: Outputs, parts: Sequence[Outputs], halves: Sequence[Tensor], *, strict: bool) -> None:
    """Compare what layers, and the model, give for a batch and for its halves.

    Args:
        whole: for the batch.
        parts: for the examples of each half.
        halves: which these are, in their order there.
        strict: refuse what can't be compared, too: outputs of other shapes. Sequences may be cut to a half's longest.

    Raises:
        GradientError: other layers were called, or the output of one is another for some example.
    """
    if any([name for name, _ in part] != [name for name, _ in whole] for part in parts):
        if strict:
            raise GradientError(f"the layers that the model calls depend on which examples are in a batch: {_UNKNOWN}")
        return
    count, coarse = sum(map(len, halves)), any(map(_is_coarse, whole))
    for place, (name, there) in enumerate(whole):
        outputs = [part[place][1] for part in parts]
        each = there.shape[0] // count  # rows of an example, where it has several
        alike = there.shape[0] == each * count and all(map(partial(_is_part, there, each), outputs, halves))
        if not alike and strict and (name != OUTPUT or _grows(there, outputs, halves)):
            raise GradientError(_of(name))
        if not alike:
            continue
        rows = there.unflatten(0, (count, each)).float()
        pairs = [_pair(rows, output, half) for output, half in zip(outputs, halves, strict=True)]
        error = math.hypot(
            *(float((torch.nan_to_num(a, 0, 0, 0) - torch.nan_to_num(b, 0, 0, 0)).norm()) for a, b in pairs)
        )
        size = float(torch.nan_to_num(rows, 0, 0, 0).norm())
        same = all(torch.equal(a.isfinite(), b.isfinite()) for a, b in pairs)  # NaN of a half alone is seen, too
        if not same or error > (_APART_COARSE if coarse else _APART) * size:
            raise GradientError(_of(name))


def _is_part(there: Tensor, each: int, output: Tensor, half: Tensor) -> bool:
    """Whether an output can be that of half of the examples, whose sequences may be cut to their longest."""
    shape = (each * len(half), *there.shape[1:])
    cut = there.dim() > 2 and output.shape[:1] == shape[:1] and output.shape[2:] == shape[2:]
    return output.shape == shape or (cut and output.shape[1] < shape[1])


def _pair(rows: Tensor, output: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """An output for half of the examples, and these examples' rows (B, r, T, ...) among all."""
    expected = rows[half.to(rows.device)]
    if output.dim() > 2:
        expected = expected[:, :, : output.shape[1]]
    return output.unflatten(0, expected.shape[:2]).float(), expected


def _grows(there: Tensor, outputs: Sequence[Tensor], halves: Sequence[Tensor]) -> bool:
    """Whether an output's first dim is in proportion to the number of examples."""
    size = sum(map(len, halves))
    return all(
        output.shape[0] * size == there.shape[0] * len(half) for output, half in zip(outputs, halves, strict=True)
    )


def _is_coarse(named: tuple[str, Tensor]) -> bool:
    """Whether rounding may exceed that of float32: also of what is float32 behind products in halves."""
    device = named[1].device.type
    return named[1].dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(device) or device == "cuda"


def cannot_run(error: Exception) -> GradientError:
    """What to say where a model raises for a half."""
    return GradientError(f"{_LOST}, and the model does not run a part of a batch ({error}): {_UNKNOWN}")


_LOST = "autograd's graph does not say where each example of a batch is"
_UNKNOWN = "no gradient is known to be one example's own, so build the bank after training, without capture="


def _of(name: str) -> str:
    called = name if name == OUTPUT else f"the output of {name!r}"
    return (
        f"{called} for an example depends on the other examples of its batch, stands in another order than these, or "
        f"depends on random numbers other than dropout's: {_UNKNOWN}"
    )
