"""Steps of the optimizer that is recorded, and weights that another one moves in its place."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from source_proj._errors import MismatchError
from source_proj.trajectory.moved import weights_stamp
from source_proj.trajectory.recording.progress import skips_step

__all__ = ["WeightsWatch", "called_weakly"]

_END = (
    "another optimizer trains them. Where one took its place, end the stage before by trajectory() or stage(), and "
    "record what follows with a Recorder of its own; else give the Recorder the optimizer that steps"
)
_FOREIGN = 3  # steps in a row: weights may be clamped, or exchanged for an evaluation, where a GradScaler skips a step


class WeightsWatch:
    """Notices that weights move though their optimizer, the one that is recorded, makes no step.

    Such steps look like those that a GradScaler skips, which have the rate 0; these, too, would be left out of every
    time scale. Another optimizer of torch's is seen at its first step, whoever else moves weights after some.

    Args:
        optimizer: the one that is recorded.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._steps, self._steps_now = 0, False  # of the optimizer; whether one is being made
        self._others: dict[int, int] = {}  # other optimizers that are making a step: how many ours had made before
        self.begin()
        handles = [
            register_optimizer_step_pre_hook(called_weakly(self._before_step)),
            register_optimizer_step_post_hook(called_weakly(self._after_step)),
        ]
        weakref.finalize(self, _remove, handles)

    def begin(self) -> None:
        """Training begins, or goes on from a checkpoint."""
        self._stamp, self._foreign = self._now(), 0
        self._early = False  # whether gradients waited for the first step when the recorder was told of it
        self._before, self._other = self._steps, ""  # steps until then; the kind of another one that stepped since

    def step_skipped(self) -> None:
        """A fused optimizer was told to skip a step, by which its weights look as if they were changed."""
        self._stamp = self._now()

    def count(self, step: int, *, made: bool) -> None:
        """Take note of a step of the loop.

        Args:
            step: its number, from 1 on.
            made: whether the optimizer made it.

        Raises:
            MismatchError: another optimizer made a step; or the weights moved in this one and some before, and the
                optimizer made none of them.
        """
        self.require_alone(step)
        before, self._stamp = self._stamp, self._now()
        self._foreign = 0 if made else self._foreign + (self._stamp != before)
        if self._steps == self._before:
            self._early = self._early or self._gradients_wait()
        if self._foreign < _FOREIGN or self._found_infinite():
            return
        name = type(self._optimizer).__name__
        raise MismatchError(
            f"the weights moved until step {step}, and the {name} that is recorded made none of the last "
            f"{self._foreign} such steps: {_END}"
        )

    def require_alone(self, step: int) -> None:
        """Refuse weights that another optimizer moved.

        Raises:
            MismatchError: names both optimizers.
        """
        if self._other:
            name = type(self._optimizer).__name__
            raise MismatchError(
                f"the weights moved until step {step} by a step of another optimizer, {self._other}, and not of the "
                f"{name} that is recorded: {_END}. What was recorded until then Trajectory.from_recorder(dir) gives"
            )

    def left_out(self, uncounted: Sequence[object]) -> bool:
        """Whether the last step is not counted, as each was told of before it was made.

        Args:
            uncounted: the optimizer's steps since the recorder was told of one.

        Warns:
            UserWarning: if so.
        """
        if not self._early or len(uncounted) != 1:
            return False
        warnings.warn(
            "the recorder's step() was called before optimizer.step(): the last update is counted now, and the first "
            "call as a step that was skipped. Call it after optimizer.step()",
            UserWarning,
            stacklevel=3,
        )
        return True

    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        if optimizer is self._optimizer:
            self._steps_now = True
        elif not self._steps_now and self._moves(optimizer):
            self._others[id(optimizer)] = self._steps

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        if optimizer is self._optimizer:
            if self._steps == self._before:
                self._other = ""  # what came before the first step, as a search for a rate, is not of the run
            self._steps, self._steps_now = self._steps + 1, False
        elif self._others.pop(id(optimizer), None) == self._steps and not skips_step(optimizer):  # none around ours
            self._other = type(optimizer).__name__

    def _moves(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether a step of an optimizer moves one of the weights."""
        own = {id(weight) for weight in self._weights()}
        return any(
            id(weight) in own and weight.grad is not None
            for group in optimizer.param_groups
            if group.get("lr", 1.0) != 0
            for weight in group["params"]
        )

    def _now(self) -> int:
        """Another number once a weight of the optimizer's was changed in place."""
        return weights_stamp(self._weights())

    def _found_infinite(self) -> bool:
        """Whether gradients are still there that a GradScaler skips a step for."""
        return not all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in self._weights())

    def _gradients_wait(self) -> bool:
        """Whether there are gradients that a step would take."""
        gradients = [p.grad for p in self._weights() if p.grad is not None]
        return any(bool(g.any()) for g in gradients) and not self._found_infinite()

    def _weights(self) -> Iterator[nn.Parameter]:
        return (p for group in self._optimizer.param_groups for p in group["params"])


def called_weakly(method: Callable[[torch.optim.Optimizer], None]) -> Callable[..., None]:
    """A hook before or after steps, which tells a method of whom they are, and keeps nothing alive.

    A Recorder that nobody holds any more ends, and gives its directory back.
    """
    reference = weakref.WeakMethod(method)

    def hook(optimizer: torch.optim.Optimizer, *_: object) -> None:
        alive = reference()
        if alive is not None:
            alive(optimizer)

    return hook


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
