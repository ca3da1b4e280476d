"""The law of a step: the rows of its passes sum to the sketch of the gradient that the optimizer steps by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from source_proj._errors import GradientError, MismatchError
from source_proj._io.numbers import all_finite
from source_proj.bank.capture import processes
from source_proj.gradients.proof import gradient_sink, share_sink
from source_proj.gradients.sink import SinkByParameter
from source_proj.gradients.space import ParameterSpace
from source_proj.gradients.training import TrainingPass
from source_proj.sketch import Sketch

__all__ = ["LawOfStep", "checked_law"]

# As in `source_proj.gradients.proof`: what is missed or doubled is off by its whole size, right rows by rounding alone.
_TOLERANCE, _BY_PARAMETER, _FLOOR = 1e-3, 1e-2, 1e-4
_ROUNDINGS = 8


@dataclass(frozen=True)
class LawOfStep:
    """An audit that passed.

    Attributes:
        error: of the sum of rows, relative to the root of the sum of their squares.
        factor: what the gradient of the passes was multiplied by before the step.
        slack: how far rounding may move the factor.
    """

    error: float
    factor: float
    slack: float

    def require_factor(self, clip_factor: float) -> None:
        """Compare with what clipping multiplies by.

        Raises:
            MismatchError: it differs by more than rounding.
        """
        if abs(self.factor - clip_factor) > self.slack * max(1.0, clip_factor):
            raise MismatchError(
                f"the optimizer stepped by {self.factor:.4g} times the gradient of the captured passes, and clipping "
                f"explains {clip_factor:.4g}: give the GradScaler in also=, and clip by max_grad_norm= and "
                "step(grad_norm=clip_grad_norm_(...)) alone"
            )


def checked_law(
    passes: Sequence[TrainingPass],
    gradients: Mapping[str, Tensor],
    sketch: Sketch,
    space: ParameterSpace,
    scale: float,
    *,
    left: float = 1.0,
    clipped: bool,
) -> LawOfStep | None:
    """Compare the sum of the rows of a step, and each parameter's share, with the gradient at hand.

    Args:
        passes: what the backward passes since the last step brought, each with its shares.
        gradients: what the optimizer is about to step by.
        sketch: the projection R.
        space: the attributed parameters.
        scale: what the loss was multiplied by.
        left: what the gradient still is, as a fused optimizer unscales it within its step.
        clipped: whether the gradient may be shorter by a factor that is not known yet.

    Returns:
        The audit; None where a gradient is not finite, which says nothing.

    Raises:
        GradientError: the law does not hold; names the parameters.
    """
    device = passes[0].rows.device
    rows = torch.cat([each.rows for each in passes]) / scale
    size = rows.square().sum()
    total = processes.mean(rows.sum(0))
    terms = processes.mean(size).sqrt()
    expected = torch.zeros(1, sketch.dim, dtype=torch.float32, device=device)
    expected_shares = share_sink(1, space, device)
    sink = gradient_sink([expected], sketch, space, [None])
    for name, gradient in gradients.items():
        dense = (gradient.to_dense() if gradient.is_sparse else gradient).detach().unsqueeze(0) / left
        sink.add(name, dense)
        expected_shares.add(name, dense)
    if not all(map(all_finite, (total, expected))):
        return None
    tolerance = max(_TOLERANCE, _ROUNDINGS * max(each.spacing for each in passes))
    norm = float(total.norm())
    factor = float(expected[0] @ total) / norm**2 if clipped and norm else 1.0
    largest = max(float(terms), norm) * factor
    distance = float((expected[0] - factor * total).norm())
    error = distance / max(largest, float(expected.norm())) if distance else 0.0
    wrong = _wrong_shares(passes, expected_shares, factor, scale, tolerance)
    slack = tolerance * max(float(terms), norm) / norm if norm else float("inf")
    if error > tolerance or any(wrong) or not 0 <= factor <= 1 + slack:
        names = [name for name, is_wrong in zip(space.names, wrong, strict=False) if is_wrong]
        raise GradientError(_refuted(names, error, factor, len(passes)))
    return LawOfStep(error, factor, slack)


def _wrong_shares(
    passes: Sequence[TrainingPass], expected: SinkByParameter, factor: float, scale: float, tolerance: float
) -> list[bool]:
    """Which parameters' shares differ; none where they were not kept, as the step was not known to be audited."""
    shares = [each.shares.totals() for each in passes if each.shares is not None]
    if len(shares) < len(passes):
        return []
    by_name = processes.mean(torch.stack([sums for sums, _ in shares]).sum(0)) / scale
    squares = processes.mean(torch.stack([own for _, own in shares]).sum(0)) / scale**2
    own, _ = expected.totals()
    bound = torch.maximum(squares.sqrt() * factor, own.norm(dim=1))
    relative, floor = max(_BY_PARAMETER, tolerance), max(_FLOOR, tolerance / 10)
    wrong: list[bool] = ((own - factor * by_name).norm(dim=1) > relative * bound + floor * bound.norm()).tolist()
    return wrong


def _refuted(names: Sequence[str], error: float, factor: float, passes: int) -> str:
    where = f", most of all in {list(names[:10])}" if names else ""
    return (
        f"the rows captured in {passes} passes do not sum to the gradient that the optimizer steps by: they are off by "
        f"{error:.1e} at a factor of {factor:.4g}{where}. Either a parameter is used outside of its module, or part of "
        "the gradient came from elsewhere: a pass in evaluation mode or through another module, a gradient that was "
        "not zeroed, or one that was, of a batch that was thrown away (call recorder.step() for it: without a step of "
        "the optimizer it counts as skipped), a loss scaled by a GradScaler that is not in also=, clipping without "
        "max_grad_norm=, or a penalty on weights within the loss"
    )
