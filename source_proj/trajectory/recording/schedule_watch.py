"""Whether schedulers have done their part of a step when their state is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.amp.grad_scaler import GradScaler
from torch.optim.lr_scheduler import LRScheduler

from source_proj._errors import MismatchError

__all__ = ["ScheduleWatch"]


class ScheduleWatch:
    """Notices a scheduler that steps between the recorder's step and the optimizer's next one.

    A checkpoint then has it as it was before, and a run that goes on from there would be one step of it behind. In a
    loop that steps it first, before the optimizer, that is as it should be: it is known by its first step.

    Args:
        things: what is kept with a checkpoint; schedulers and GradScalers among them are watched.
    """

    def __init__(self, things: Sequence[Any]) -> None:
        self._watched = [thing for thing in things if isinstance(thing, LRScheduler | GradScaler)]
        self.begin()

    def begin(self) -> None:
        """Training begins, or goes on from a checkpoint."""
        self._states: list[Any] | None = self._now()  # until the optimizer's next step
        self._first = True
        self._come_first = self._late = False

    def checkpoint_written(self) -> None:
        """Their states have just been kept."""
        self._states = self._now()

    def optimizer_stepped(self) -> None:
        """The optimizer made a step."""
        if self._states is not None:
            moved = self._now() != self._states
            if self._first:
                self._come_first = moved
            elif moved and not self._come_first:
                self._late = True
            self._states = None
        self._first = False

    def step_skipped(self) -> None:
        """The recorder was told of a step that a GradScaler skipped: what moved since may have been its own."""
        if not self._first:
            self._states = None if self._states is None else self._now()
        elif any(isinstance(thing, LRScheduler) for thing in self._moved()):
            self._states = self._now()  # first or in time: the next step tells
        else:
            self._first, self._states = False, None

    def require_in_time(self, step: int) -> None:
        """Refuse a scheduler that was late, once.

        Raises:
            MismatchError: one stepped after the last checkpoint was written, and before the optimizer.
        """
        if self._late:
            self._late = False
            raise MismatchError(
                "a scheduler or GradScaler in also= stepped after the recorder wrote a checkpoint, and before step "
                f"{step}: the checkpoint has it as it was before, so that a run would not go on from there as this one "
                "did. Call the recorder's step() last, after schedulers"
            )

    def _moved(self) -> list[Any]:
        before = self._states or []
        return [thing for thing, then, now in zip(self._watched, before, self._now(), strict=False) if then != now]

    def _now(self) -> list[Any]:
        return [thing.last_epoch if isinstance(thing, LRScheduler) else thing.state_dict() for thing in self._watched]
