"""The law, asserted for whole batches: rows against plain autograd's gradient of a random combination of examples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from math import nan

import torch
from torch import Tensor

from source_proj._errors import GradientError
from source_proj._io.numbers import all_finite
from source_proj.gradients.apart import random_halves
from source_proj.gradients.batches import Batch, is_compared, take
from source_proj.gradients.general import Autocast, Function, checked_values, weighted_gradient
from source_proj.gradients.proof import Audit, Expected, Proof, audited, dependent, law_weights
from source_proj.gradients.sink import SinkByParameter
from source_proj.gradients.space import ParameterSpace
from source_proj.sketch import Sketch, without_autocast
from source_proj.trajectory import Scale
from source_proj.trajectory.placement import Placement

__all__ = ["AUTOCAST", "SAMPLED", "Law", "Work", "autocasting", "chosen_autocast", "require_autocast"]

SAMPLED = "sampled_output"  # the function that draws labels
AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_SAME = 1e-3  # relative: values of an example in a batch and in half of it
_TF32 = 2.0**-10  # cuDNN's convolutions of float32


def require_autocast(autocast: str | None) -> None:
    """Refuse a number format of forward passes that there is not.

    Raises:
        ValueError: names it, and those that there are.
    """
    if autocast is not None and autocast not in tuple(AUTOCAST):
        raise ValueError(f"autocast {autocast!r} is unknown; choose one of {tuple(AUTOCAST)} or None")


def chosen_autocast(autocast: str | None, device: torch.device) -> str | None:
    """The number format of forward passes: the one given, else that of the ``torch.autocast`` around the call.

    Raises:
        ValueError: there is no such format.
    """
    require_autocast(autocast)
    if autocast is not None or not torch.is_autocast_enabled(device.type):
        return autocast
    around = torch.get_autocast_dtype(device.type)
    return next((name for name, dtype in AUTOCAST.items() if dtype == around), None)


def autocasting(placement: Placement, dtype: torch.dtype | None) -> Autocast:
    """The context of a forward pass whose products are of a type; None for the weights' own."""
    return without_autocast if dtype is None else partial(torch.autocast, placement.device.type, dtype)


@dataclass(frozen=True)
class Work:
    """One batch of one function.

    Attributes:
        function: (model, batch) → (B,).
        batch: the examples.
        size: their number B.
        scales: each diagonal matrix that gradients are multiplied by, None for the identity.
        name: which function it is.
        number: of the batch among those of this function.
    """

    function: Function
    batch: Batch
    size: int
    scales: list[Scale | None]
    name: str
    number: int


class Law:
    """Audits of batches.

    Args:
        placement: of the model.
        space: the attributed parameters.
        sketch: the projection.
        dtype: of the forward pass under autocast; None without.
    """

    def __init__(self, placement: Placement, space: ParameterSpace, sketch: Sketch, dtype: torch.dtype | None) -> None:
        self._placement = placement
        self._space = space
        self._sketch = sketch
        self._dtype = dtype

    def autocast(self) -> Autocast:
        """The context of a forward pass."""
        return autocasting(self._placement, self._dtype)

    def audit(
        self, proof: Proof, work: Work, values: Tensor, outs: list[Tensor], shares: SinkByParameter
    ) -> Audit | None:
        """Assert the law for a batch; None where it says nothing, since something is not finite.

        Args:
            proof: whose scope the batch is in.
            work: the batch.
            values: of the function, (B,).
            outs: the rows (B, dim) for each scale.
            shares: each parameter's share of the same gradients.
        """
        if not all(map(all_finite, (values, *outs))):
            return None
        coarsest = self._coarsest()
        weights = law_weights(proof.draw(work.name, work.number), outs[0], evened=coarsest < 1e-4)
        expected = Expected(outs, self._sketch, self._space, work.scales)
        plain = self._plain(work, weights, expected)
        audit = audited(weights, outs, shares, expected, coarsest)
        tolerance = max(1e-2, 8 * coarsest)
        if not torch.allclose(values, plain.to(values.device), rtol=tolerance, atol=tolerance / 100):
            return replace(audit, passed=False, values_differ=True)
        return audit

    def compare(self, made: Iterable[tuple[Work, Tensor]]) -> None:
        """Compare the values of batches, where that is due, with those of their random halves, by two forward passes.

        Drawn labels are left out: halves draw others now and then. What is due in one process, all do.

        Raises:
            GradientError: they differ, so that examples depend on each other.
        """
        for work, values in made:
            due = work.size > 1 and is_compared(work.number)
            if work.name != SAMPLED and self._placement.lockstep.any(due):
                self._compare(work, values)

    def _compare(self, work: Work, values: Tensor) -> None:
        halves = self._halves(work, whole=False)
        parts = []
        for half in halves:
            with self._placement.running(()), torch.enable_grad(), self.autocast()():
                part = checked_values(work.function(self._placement.model, _some(work, half)), len(half))
            parts.append(part.detach().float())
        alone, examples = torch.cat(parts), torch.cat(halves)
        among = values[examples.to(values.device)].to(alone.device)
        tolerance = max(_SAME, 8 * self._coarsest())
        finite = among.isfinite()  # what is not is refused elsewhere
        room = tolerance * (among.abs() + among[finite].square().mean().sqrt())
        if bool((~((alone - among).abs() <= room) & finite).any()):
            error = float((alone - among).norm() / among.norm().clamp(min=torch.finfo(torch.float32).tiny))
            audit = Audit(error, [], set(), passed=False, values_differ=True)
            raise GradientError(dependent(work.name, work.batch, work.size, audit))

    def examine(self, work: Work, values: Tensor) -> None:
        """Look at a batch whose values, each of an example alone, are not all finite.

        Under vmap the function could not say what is wrong.

        Raises:
            GradientError: among the others an example's value is finite, and alone it is not.
        """
        with torch.no_grad(), self.autocast()():
            whole = work.function(self._placement.model, work.batch)
            for b in (whole.isfinite() & ~values.to(whole.device).isfinite()).nonzero()[:1, 0].tolist():
                if not bool(work.function(self._placement.model, take(work.batch, [b], work.size)).isfinite()):
                    audit = Audit(nan, [], set(), passed=False, values_differ=True)
                    raise GradientError(dependent(work.name, work.batch, work.size, audit))

    def _plain(self, work: Work, weights: Tensor, expected: Expected) -> Tensor:
        """Values, and ∇ Σ w f by plain backward passes over two halves, which agree with the whole if examples do.

        Drawn labels are taken whole: halves draw others now and then, where a draw is within rounding of a step.
        """
        whole = work.name == SAMPLED or not self._placement.lockstep.any(work.size > 1)
        values = torch.zeros(work.size, device=self._placement.device, dtype=torch.float32)
        for number, half in enumerate(self._halves(work, whole=whole)):
            again = number > 0 and work.size == 1
            part = weighted_gradient(
                self._placement, self._space, work.function, _some(work, half), weights[half] * (not again),
                self.autocast(), expected.add,
            )  # fmt: skip
            values[half.to(values.device)] = part.to(values)
        return values

    @staticmethod
    def _halves(work: Work, *, whole: bool) -> list[Tensor]:
        """The examples of two random halves of a batch, each in order, or of all."""
        drawn = [torch.arange(work.size, device="cpu")] if whole else random_halves(work.size, work.number)
        halves = [half.sort().values for half in drawn]
        if len(halves) < 2 and not whole:  # one example here, where other processes have two passes to make
            halves.append(halves[0])
        return halves

    def _coarsest(self) -> float:
        """The relative spacing of the coarsest number format of a pass."""
        spacing = max(self._placement.spacing(self._space.names), torch.finfo(self._dtype or torch.float64).eps)
        convolves = self._placement.device.type == "cuda" and torch.backends.cudnn.allow_tf32
        return max(spacing, _TF32 if convolves else 0.0)


def _some(work: Work, examples: Tensor) -> Batch:
    """Some of a batch's examples."""
    return work.batch if len(examples) == work.size else take(work.batch, examples.tolist(), work.size)
