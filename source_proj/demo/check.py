"""Hold predictions against retraining: leave examples out, train again, compare."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from source_proj._io.progress import Progress, progress_bar
from source_proj.attribution.words import signed
from source_proj.demo.digits import Digits, make_network, make_optimizer, train
from source_proj.task import Classification

__all__ = ["Removal", "retrain_without", "verdict"]


@dataclass(frozen=True)
class Removal:
    """Predicted and actual change of one query's measurement when examples are left out.

    Attributes:
        name: what was left out.
        removed: how many examples that is.
        predicted: predicted change.
        changes: actual change of each matched pair of runs.
        expects_nothing: whether it is a control, of which no more than the predicted change is expected.
        claims: how many are checked beside each other, of all of which together 95 % shall be sure.
    """

    name: str
    removed: int
    predicted: float
    changes: tuple[float, ...]
    expects_nothing: bool = False
    claims: int = 1

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
        """What the mean may be off by: half of its interval, by Student's t and with Bonferroni's correction."""
        from scipy.stats import t

        return float(t.ppf(1 - 0.05 / (2 * self.claims), len(self.changes) - 1)) * self.error

    @property
    def holds(self) -> bool:
        """Whether the claim held: a change of the predicted sign, beyond the noise.

        For a control: the actual change is the predicted one, but for the noise.
        """
        if self.expects_nothing:
            return abs(self.actual - self.predicted) <= self.noise
        return self.actual * self.predicted > 0 and abs(self.actual) > self.noise


def verdict(removal: Removal) -> str:
    """Say what the comparison shows, sign and size apart, also when the claim fails.

    The size holds where the actual change is the predicted one, but for the noise of retraining.

    Example:
        >>> verdict(Removal("without 20", 20, -2.0, (-1.0, -1.1, -0.9)))
        'Sign holds, size does not: predicted -2.00, came -1.00 ± 0.0577.'
        >>> verdict(Removal("without 20", 20, -2.0, (-2.0, -2.2, -1.9)))
        'Sign and size hold: predicted -2.00, came -2.03 ± 0.0882.'
        >>> verdict(Removal("without 20", 20, -2.0, (1.0, 1.1, 0.9)))
        'Sign FAILS: predicted -2.00, came +1.00 ± 0.0577.'
        >>> verdict(Removal("without 20", 20, -2.0, (1.0, -1.1, 0.9)))
        'FAILS: no change beyond the noise of retraining; predicted -2.00, came +0.267 ± 0.684.'
    """
    numbers = f"predicted {signed(removal.predicted)}, came {signed(removal.actual)} ± {signed(removal.error)[1:] or 0}"
    close = abs(removal.actual - removal.predicted) <= removal.noise
    if removal.expects_nothing:
        said = ("Holds", "within") if close else ("FAILS", "beyond")
        return f"{said[0]}: {said[1]} the noise of retraining; {numbers}."
    if removal.holds:
        return f"{'Sign and size hold' if close else 'Sign holds, size does not'}: {numbers}."
    if abs(removal.actual) <= removal.noise:
        return f"FAILS: no change beyond the noise of retraining; {numbers}."
    return f"Sign FAILS: {numbers}."


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
