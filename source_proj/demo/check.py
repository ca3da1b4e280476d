"""Hold predictions against retraining: leave examples out, train again, compare."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from source_proj._io.progress import Progress, progress_bar
from source_proj.attribution.words import signed
from source_proj.demo.digits import Digits, make_network, make_optimizer, train
from source_proj.task import Classification

__all__ = ["Removal", "judged", "retrain_without", "verdict"]


@dataclass(frozen=True)
class Removal:
    """Predicted and actual change of one query's measurement when examples are left out.

    Attributes:
        name: what was left out.
        removed: how many examples that is.
        predicted: predicted change.
        changes: actual change of each matched pair of runs.
        named: of a control, the changes of what it is beside, in the same pairs; else nothing.
    """

    name: str
    removed: int
    predicted: float
    changes: tuple[float, ...]
    named: tuple[tuple[float, ...], ...] = ()

    @property
    def actual(self) -> float:
        """Mean actual change."""
        return math.fsum(self.changes) / len(self.changes)

    @property
    def error(self) -> float:
        """Standard error of the mean, from the spread between the pairs."""
        variance = math.fsum((change - self.actual) ** 2 for change in self.changes) / (len(self.changes) - 1)
        return math.sqrt(variance / len(self.changes))

    @property
    def noise(self) -> float:
        """Half of the 95 % interval of the mean, by Student's t."""
        from scipy.stats import t

        return float(t.ppf(0.975, len(self.changes) - 1)) * self.error

    @property
    def holds(self) -> bool:
        """Whether the claim held: a change of the predicted sign, beyond the noise.

        For a control: a smaller change than that of each it is beside, beyond the noise of the pairs' differences.
        """
        if self.named:
            return all(self._is_less_than(changes) for changes in self.named)
        return self.actual * self.predicted > 0 and abs(self.actual) > self.noise

    def _is_less_than(self, changes: tuple[float, ...]) -> bool:
        size, own = math.copysign(1, math.fsum(changes)), math.copysign(1, self.actual)
        differences = [size * other - own * change for other, change in zip(changes, self.changes, strict=True)]
        more = Removal(self.name, self.removed, 1.0, tuple(differences))
        return more.actual > more.noise


def judged(removal: Removal) -> str:
    """Say what the comparison shows, sign and size apart, also when the claim fails.

    The size holds where the actual change is the predicted one, but for the noise of retraining.

    Example:
        >>> judged(Removal("without 20", 20, -2.0, (-1.0, -1.1, -0.9)))
        'Sign holds, size does not'
        >>> judged(Removal("without 20", 20, -2.0, (-2.0, -2.2, -1.9)))
        'Sign and size hold'
        >>> judged(Removal("without 20", 20, -2.0, (1.0, 1.1, 0.9)))
        'Sign FAILS'
        >>> judged(Removal("without 20", 20, -2.0, (1.0, -1.1, 0.9)))
        'FAILS, no change beyond the noise of retraining'
        >>> judged(Removal("20 at random", 20, 0.1, (0.2, -0.1, 0.1), named=((-1.0, -1.1, -0.9),)))
        'Control holds, a smaller change than of the named ones'
    """
    if removal.named:
        return f"Control {'holds, a' if removal.holds else 'FAILS, no'} smaller change than of the named ones"
    if removal.holds:
        close = abs(removal.actual - removal.predicted) <= removal.noise
        return "Sign and size hold" if close else "Sign holds, size does not"
    none = abs(removal.actual) <= removal.noise
    return "FAILS, no change beyond the noise of retraining" if none else "Sign FAILS"


def verdict(removal: Removal) -> str:
    """The same with the numbers.

    Example:
        >>> verdict(Removal("without 20", 20, -2.0, (-1.0, -1.1, -0.9)))
        'Sign holds, size does not: predicted -2.00, came -1.00 ± 0.0577.'
    """
    numbers = f"predicted {signed(removal.predicted)}, came {signed(removal.actual)} ± {signed(removal.error)[1:] or 0}"
    return f"{judged(removal)}: {numbers}."


def retrain_without(
    digits: Digits,
    query: int,
    groups: Mapping[str, Sequence[int]],
    *,
    pairs: int,
    progress: Progress = True,
) -> dict[str, tuple[float, ...]]:
    """Measure how the margin of a test digit changes when groups of training digits are left out.

    Each change is the difference of two runs that share initial weights and batch order: one without the group, one
    with all digits.

    Args:
        digits: the data.
        query: position of the test digit.
        groups: name to positions of the training digits that are left out.
        pairs: number of initialisations and batch orders, the recorded run's first.
        progress: show a progress bar after two seconds.

    Returns:
        Name to the change of each pair.
    """
    changes: dict[str, list[float]] = {name: [] for name in groups}
    with progress_bar(progress, "retrain", pairs * (len(groups) + 1), "runs") as bar:
        for seed in range(pairs):
            with_all = _margin_after(digits, query, (), seed)
            bar.update()
            for name, group in groups.items():
                changes[name].append(_margin_after(digits, query, group, seed) - with_all)
                bar.update()
    return {name: tuple(values) for name, values in changes.items()}


def _margin_after(digits: Digits, query: int, left_out: Sequence[int], seed: int) -> float:
    model = make_network(seed)
    train(model, make_optimizer(model), digits.train_set, seed=seed, left_out=left_out)
    inputs, targets = digits.test_set[query : query + 1]
    with torch.no_grad():
        return float(Classification().measurement(model, (inputs, targets)))
