"""Retraining as the judge of a cleaning: does the model get better without the examples, or just smaller data?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from source_proj._errors import extra
from source_proj._io.calls import require_callable
from source_proj._io.numbers import plain_numbers, whole_number
from source_proj._io.progress import Progress, progress_bar
from source_proj.curate.chance import student_quantile
from source_proj.curate.cleaning import Cleaning

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Interval", "Verification", "no_verdict", "verify"]

Train = Callable[[Any, int], Any]
"""``train(kept, seed)``: train on the examples at the positions ``kept``; whatever ``evaluate`` takes is returned."""

_LEAST, _ENOUGH = 3, 5
"""Seeds that an interval and a verdict need: two differences that happen to be equal would leave no doubt at all."""


def no_verdict(seeds: int) -> str:
    """What so many seeds lack for a verdict, in words; empty where they do."""
    return "" if seeds >= _LEAST else f"no verdict from {_counted(seeds)}: {_LEAST} would do, and {_ENOUGH} are better"


class Interval(NamedTuple):
    """A mean over seeds and its 95 % interval by Student's t; NaNs where there are fewer than three seeds."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f}" if math.isnan(self.low) else f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


@dataclass(frozen=True, eq=False)
class Verification:
    """What models trained with and without the examples of a cleaning measured, one of each for each seed.

    Attributes:
        cleaning: what was judged.
        seeds: S seeds.
        whole: measures of the models trained on all examples, ``(S,)``.
        cleaned: of those trained on the kept ones, ``(S,)``.
        random: of those trained on as many examples drawn at random, anew for each seed, ``(S,)``.
    """

    cleaning: Cleaning
    seeds: list[int]
    whole: np.ndarray
    cleaned: np.ndarray
    random: np.ndarray

    @property
    def gain(self) -> Interval:
        """Measure on the kept examples minus that on all, seed by seed."""
        return interval(self.cleaned - self.whole)

    @property
    def gain_over_random(self) -> Interval:
        """Measure on the kept examples minus that on as many drawn at random, seed by seed."""
        return interval(self.cleaned - self.random)

    @property
    def verdict(self) -> str:
        """What the intervals say, in a sentence."""
        if missing := no_verdict(len(self.seeds)):
            return missing
        over_all = _verdict(self.gain, "training on all examples")
        return f"{over_all}; {_verdict(self.gain_over_random, 'a random choice of the same size')}"

    def __str__(self) -> str:
        kept, n = len(self.cleaning.kept), len(self.cleaning.train_ids)
        lines = [
            f"{self.cleaning.what}: {kept} of {n} examples kept, {_counted(len(self.seeds))}",
            f"all {self.whole.mean():.4f}, kept {self.cleaned.mean():.4f}, random {self.random.mean():.4f}",
            f"kept - all    {self.gain}",
            f"kept - random {self.gain_over_random}",
            self.verdict,
        ]
        return "\n".join(lines)

    def to_pandas(self) -> pd.DataFrame:
        """A row for each seed: ``seed``, ``whole``, ``cleaned``, ``random`` (needs the ``pandas`` extra)."""
        with extra("pandas"):
            import pandas as pd
        return pd.DataFrame({"seed": self.seeds, "whole": self.whole, "cleaned": self.cleaned, "random": self.random})


def verify(
    cleaning: Cleaning,
    train: Train,
    evaluate: Callable[[Any], float],
    *,
    seeds: Sequence[int] | int = range(5),
    progress: Progress = True,
) -> Verification:
    """Train with and without the examples of a cleaning, and as often on as many examples drawn at random.

    Three models for each seed. A gain over all examples says that the cleaning helps; one over the random choice alone
    says that it chose well, at the price of the examples. Differences are taken seed by seed. Measure on examples that
    neither trained the model nor chose the cleaning: those that chose it flatter it.

    Args:
        cleaning: what is judged.
        train: ``train(kept, seed)`` trains a model on the examples at the positions ``kept`` (int64, in order), the
            seed deciding everything random in it.
        evaluate: ``evaluate(model)`` gives a number, higher is better.
        seeds: one for each model of a kind, or how many, n for ``range(n)``; at least three tell anything, better five.
        progress: show a progress bar after two seconds; False for none, or a function of (description, done, total).

    Raises:
        TypeError: ``train`` or ``evaluate`` cannot be called so, a seed is no whole number, or a measure no number.
        ValueError: no seed is given, one is given twice, nothing is kept, or a measure is not finite.

    Example:
        >>> cleaning = Cleaning("by hand", [0], ["it is wrong"], {}, [0, 1, 2, 3])
        >>> judged = verify(cleaning, lambda kept, seed: len(kept) - 2.0 * (0 in kept), float, seeds=range(3))
        >>> judged.gain
        Interval(mean=1.0, low=1.0, high=1.0)
    """
    require_callable(train, "train", "train(kept, seed)")
    require_callable(evaluate, "evaluate", "evaluate(model)")
    chosen = _listed(seeds)
    if not chosen or len(set(chosen)) != len(chosen):
        raise ValueError(f"give at least one seed, and none twice, got {seeds!r}: seeds=5 are 0 to 4")
    kept, n = cleaning.kept, len(cleaning.train_ids)
    if not len(kept):
        raise ValueError(f"the cleaning keeps none of {n} examples: there is nothing to train on")
    measured = np.empty((3, len(chosen)))
    with progress_bar(progress, "verify", measured.size, "models") as bar:
        for place, seed in enumerate(chosen):
            rng = np.random.default_rng(seed if seed >= 0 else (1, -seed))  # torch's seeds may be negative
            drawn = np.sort(rng.permutation(n)[: len(kept)])
            for kind, positions in enumerate((np.arange(n), kept, drawn)):
                measured[kind, place] = _measured(evaluate(train(positions, seed)), seed)
                bar.update()
    return Verification(cleaning, chosen, *measured)


def interval(values: np.ndarray) -> Interval:
    """Mean and 95 % interval of independent values.

    Example:
        >>> [round(number, 3) for number in interval(np.array([1.0, 2.0, 3.0]))]
        [2.0, -0.484, 4.484]
    """
    mean = float(values.mean())
    if len(values) < _LEAST:
        return Interval(mean, math.nan, math.nan)
    half = student_quantile(len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def _listed(seeds: Any) -> list[int]:
    """Seeds one by one, or those of a range, whatever library their numbers are of."""
    if isinstance(seeds, Iterable) and getattr(seeds, "ndim", None) != 0:
        return [whole_number(seed, "a seed") for seed in seeds]
    return list(range(whole_number(seeds, "seeds")))


def _counted(seeds: int) -> str:
    return f"{seeds} seed" if seeds == 1 else f"{seeds} seeds"


def _measured(value: Any, seed: int) -> float:
    try:
        number = float(np.asarray(plain_numbers(value)).item())
    except (TypeError, ValueError):
        raise TypeError(f"evaluate gave {value!r:.60} for seed {seed}: it must give one number") from None
    if not math.isfinite(number):
        raise ValueError(f"evaluate gave {number} for seed {seed}: it must give a finite number, higher is better")
    return number


def _verdict(gain: Interval, than: str) -> str:
    if gain.low > 0:
        return f"better than {than}"
    if gain.high < 0:
        return f"worse than {than}"
    return f"not to be told apart from {than}"
