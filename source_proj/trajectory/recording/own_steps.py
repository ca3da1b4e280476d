"""Steps of the optimizer that is recorded, and weights that another one moves in its place."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

import torch
from torch import nn

from source_proj._errors import MismatchError
from source_proj.trajectory.moved import weights_stamp
from source_proj.trajectory.recording.progress import skips_step

__all__ = ["WeightsWatch", "called_weakly"]

_FOREIGN = 3  # steps in a row: weights may be clamped, or exchanged for an evaluation, where a GradScaler skips a step


class WeightsWatch:
    """Notices that weights move though their optimizer, the one that is recorded, makes no step.

    Such steps look like those that a GradScaler skips, which have the rate 0; these, too, would be left out of every
    time scale.

    Args:
        optimizer: the one that is recorded.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.begin()

    def begin(self) -> None:
        """Training begins, or goes on from a checkpoint."""
        self._stamp, self._foreign = self._now(), 0

    def step_skipped(self) -> None:
        """A fused optimizer was told to skip a step, by which its weights look as if they were changed."""
        self._stamp = self._now()

    def count(self, step: int, *, made: bool) -> None:
        """Take note of a step of the loop.

        Args:
            step: its number, from 1 on.
            made: whether the optimizer made it.

        Raises:
            MismatchError: the weights moved in this one and some before, and the optimizer made none of them.
        """
        before, self._stamp = self._stamp, self._now()
        self._foreign = 0 if made else self._foreign + (self._stamp != before)
        if self._foreign < _FOREIGN or self._found_infinite():
            return
        name = type(self._optimizer).__name__
        raise MismatchError(
            f"the weights moved until step {step}, and the {name} that is recorded made none of the last "
            f"{self._foreign} such steps: another optimizer trains them. Where one took its place, end the stage by "
            "trajectory() or stage(), and record what follows with a Recorder of its own; else give the Recorder the "
            "optimizer that steps"
        )

    def _now(self) -> int:
        """Another number once a weight of the optimizer's was changed in place."""
        return weights_stamp(self._weights())

    def _found_infinite(self) -> bool:
        """Whether gradients are still there that a GradScaler skips a step for."""
        return not all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in self._weights())

    def _weights(self) -> Iterator[nn.Parameter]:
        return (p for group in self._optimizer.param_groups for p in group["params"])


def called_weakly(method: Callable[[bool], None]) -> Callable[..., None]:
    """A hook after steps, which tells a method whether they were made, and keeps nothing alive.

    A Recorder that nobody holds any more ends, and gives its directory back.
    """
    reference = weakref.WeakMethod(method)

    def hook(optimizer: torch.optim.Optimizer, *_: object) -> None:
        alive = reference()
        if alive is not None:
            alive(not skips_step(optimizer))

    return hook
