"""Which updates of a stage its optimizer made: a GradScaler skips some, and the optimizer numbers the others alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple, Self

from source_proj.trajectory.optimizers import Updates

__all__ = ["Count", "MadeUpdates"]


class Count(NamedTuple):
    """What an optimizer's state says at a checkpoint.

    Attributes:
        steps: steps of the stage until then, skipped ones too.
        own: updates that the optimizer has made by its own count, before the stage too.
    """

    steps: int
    own: int


@dataclass(frozen=True)
class MadeUpdates:
    """The updates of a stage that were made.

    Args:
        flags: for each step of the stage, whether its update was made.
        before: how many the optimizer had made before the stage: one may go on from stage to stage.

    Example:
        >>> made = MadeUpdates.of([0.0, 0.1, 0.0, 0.1], skipped=[2], counts=[])
        >>> made.updates([0.0, 0.1, 0.0, 0.1], checkpoints=[3, 4])
        Updates(rates=[0.0, 0.1, 0.1], checkpoints=[2, 3], before=0)
        >>> made.spread([1.0, 2.0, 3.0])
        [1.0, 2.0, 0.0, 3.0]
    """

    flags: Sequence[bool]
    before: int

    @classmethod
    def of(cls, rates: Sequence[float], skipped: Collection[int] | None, counts: Sequence[Count]) -> Self:
        """Tell them by what was written down, or by the optimizer's states.

        Args:
            rates: learning rate of each step.
            skipped: places of those that were skipped; None where that is not known.
            counts: what the states say, in order of steps.
        """
        left_out = set(_settled(rates, counts) if skipped is None else skipped)
        made = cls([place not in left_out for place in range(len(rates))], 0)
        # Below 0 where steps were left out of which nobody knows, or that found no gradient.
        return cls(made.flags, max(0, counts[0].own - made.until(counts[0].steps)) if counts else 0)

    @property
    def skipped(self) -> list[int]:
        """Places of the others."""
        return [place for place, made in enumerate(self.flags) if not made]

    def until(self, steps: int) -> int:
        """How many of the stage's first steps were made."""
        return self._totals[steps]

    def numbers(self) -> list[int]:
        """The optimizer's own number of each step's update, from 1 on; of a skipped one that of the one before."""
        return [self.before + total for total in self._totals[1:]]

    @cached_property
    def _totals(self) -> list[int]:
        return list(accumulate(self.flags, initial=0))

    def updates(self, rates: Sequence[float], checkpoints: Iterable[int]) -> Updates:
        """What the optimizer is told of the stage: as if the skipped steps had never been."""
        own = [rate for rate, made in zip(rates, self.flags, strict=True) if made]
        return Updates(own, [self.until(steps) for steps in checkpoints], self.before)

    def spread(self, factors: Iterable[float]) -> list[float]:
        """Numbers of the updates, each at its step; 0 where one was skipped."""
        following = iter(factors)
        return [next(following) if made else 0.0 for made in self.flags]

    def begun_anew(self, first: Count, second: Count) -> bool:
        """Whether the optimizer's state was thrown away between two checkpoints.

        Steps may be left out of which nobody knows, but never most of them; and a state that was thrown away cannot
        have counted more than was made since.
        """
        made, counted = self.until(second.steps) - self.until(first.steps), second.own - first.own
        return made - counted > made / 2 and (second.own <= made or counted < 0)


def _settled(rates: Sequence[float], counts: Sequence[Count]) -> Iterable[int]:
    """Places of steps that were skipped, by what the states have counted from checkpoint to checkpoint.

    They are among those of rate 0, which is how a skipped step is written down. Of these a schedule may have made some,
    and then the first ones, as a warm-up does. Where no state says otherwise, all were made.
    """
    last = Count(0, 0)
    for count in counts:
        missing = (count.steps - last.steps) - (count.own - last.own)
        idle = [place for place in range(last.steps, count.steps) if rates[place] == 0]
        if missing > 0:
            yield from idle[-missing:]
        last = count
