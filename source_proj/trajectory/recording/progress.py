"""What a Recorder knows of a run: what is on the disk, and the updates that came after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from source_proj._errors import MismatchError
from source_proj.trajectory.optimizers import Options
from source_proj.trajectory.optimizers.describe import WHILE_TRAINING
from source_proj.trajectory.recording.momentum import require_integrable
from source_proj.trajectory.recording.run_files import RecordedRun, UpdateRun, clip_factor

__all__ = ["Pending", "Progress", "Seen", "scale_left", "skips_step", "update_runs", "updates_of_call"]

Norm = float | Tensor | None
"""A gradient's norm before it was clipped; None without clipping."""


class Seen(NamedTuple):
    """A step of the optimizer: its number among all that were seen, and the groups' options at that time."""

    number: int
    options: Sequence[Options]


class Pending(NamedTuple):
    """A step since the last checkpoint; ``seen`` is the number of the last step of the optimizer until then.

    ``made`` is whether it was an update: a skipped step has the rate 0, and so has one that a schedule stops.
    """

    seen: int
    rate: float
    norm: Norm
    time_factor: float
    made: bool = True


class Progress(NamedTuple):
    """What is on the disk, and what came after: replaced as a whole, so that no interruption leaves half of it."""

    run: RecordedRun
    pending: list[Pending]
    seen: int  # number of the last step of the optimizer that the run includes

    @property
    def steps(self) -> int:
        """Updates so far."""
        return self.run.last_step + len(self.pending)

    @property
    def skipped(self) -> tuple[int, ...]:
        """Numbers of the steps since the last checkpoint, from 0 on, that were skipped."""
        return tuple(number for number, own in enumerate(self.pending, self.run.last_step) if not own.made)

    @property
    def last_seen(self) -> int:
        """Number of the last step of the optimizer that was counted."""
        return self.pending[-1].seen if self.pending else self.seen


def updates_of_call(
    progress: Progress, seen: Sequence[Seen], norms: Sequence[Norm], max_norm: float | None
) -> list[Pending]:
    """The updates of one call; two where the call before was interrupted before it could count its own.

    Args:
        progress: what was counted before.
        seen: the optimizer's steps since.
        norms: that of this call, and before it that of an interrupted one.
        max_norm: what gradients are clipped to.

    Raises:
        MismatchError: there were more steps than calls, or options changed that must not.
    """
    optimizer = progress.run.optimizer
    if not seen:
        return [Pending(progress.last_seen, 0.0, norms[-1], optimizer.time_factor, made=False)]
    own = [*([None] * (2 - len(norms))), *norms][-len(seen) :]
    if len(seen) > len(own) or (max_norm is not None and None in own):
        raise MismatchError(
            f"the optimizer stepped more than once since the recorder's step {progress.steps}: "
            "call the recorder's step() after each, or restore()"
        )
    updates = []
    for place, (norm, step) in enumerate(zip(own, seen, strict=True), 1):
        now = type(optimizer).from_groups(step.options, "the optimizer", optimizer, remedy=WHILE_TRAINING)
        require_integrable(optimizer, now, progress.steps + place)
        rate = max(0.0, float(step.options[0]["lr"]))  # a schedule may end a rounding below 0
        updates.append(Pending(step.number, rate, norm, now.time_factor))
    return updates


def update_runs(progress: Progress, max_norm: float | None) -> tuple[UpdateRun, ...]:
    """What is pending, norms turned into the factors by which clip_grad_norm_ multiplies; waits for a GPU.

    Raises:
        ValueError: a norm is NaN.
    """
    updates = []
    for place, update in enumerate(progress.pending, 1):
        norm = 0.0 if max_norm is None else float(update.norm or 0.0)
        if math.isnan(norm) and update.rate:
            step = progress.run.last_step + place
            raise ValueError(f"the gradient's norm at step {step} is NaN, and so is every weight after that step")
        clip = clip_factor(norm, max_norm) if max_norm is not None and update.rate else 1.0
        updates.append((update.rate, clip, update.time_factor))
    return tuple((*update, len(list(same))) for update, same in groupby(updates))


def scale_left(optimizer: torch.optim.Optimizer) -> float:
    """What gradients are still multiplied by when a step begins: a scaler tells fused optimizers, and them alone."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)


def skips_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step under way changes nothing, as the scaler found gradients that are not finite.

    A scaler does not call other optimizers then.
    """
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
