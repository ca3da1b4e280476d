"""Arguments that several ways to a stage have in common; each is explained in :class:`Stage`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict

from source_proj.trajectory.record import PreconditionerMode
from source_proj.trajectory.segments import Segments

__all__ = ["LossOptions", "ReadOptions", "Schedule", "StageOptions"]

Schedule = Callable[[int], float] | Sequence[float]
"""Learning rate of an update: a function of its number (0 for the first), or one value per update."""


class LossOptions(TypedDict, total=False):
    """How the loss of a step was put together."""

    loss_reduction: str
    batch_size: int | None
    accumulation: int


class StageOptions(LossOptions, total=False):
    """What else a stage may need, besides checkpoints, optimizer, segments and learning rates."""

    start_step: int
    clip_factors: Schedule | None
    time_factors: Schedule | None
    skipped: Sequence[int] | None


class ReadOptions(LossOptions, total=False):
    """What a recorded stage leaves open."""

    segments: Segments
    preconditioner: PreconditionerMode
