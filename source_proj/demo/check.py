"""Hold predictions against retraining: leave examples out, train again, compare."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

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
    """

    name: str
    removed: int
    predicted: float
    changes: tuple[float, ...]
    expects_nothing: bool = False

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
    def holds(self) -> bool:
        """Whether the claim held: a change of the predicted sign, beyond two standard errors.

        For a control: the actual change lies within two standard errors of the predicted one.
        """
        if self.expects_nothing:
            return abs(self.actual - self.predicted) <= 2 * self.error
        return self.actual * self.predicted > 0 and abs(self.actual) > 2 * self.error


def verdict(removal: Removal) -> str:
    """Say what the comparison shows, also when the claim fails.

    Example:
        >>> verdict(Removal("without 20", 20, -2.0, (-1.0, -1.1, -0.9)))
        'Holds: the sign is as predicted, the size 0.5 times the predicted one.'
        >>> verdict(Removal("without 20", 20, -2.0, (1.0, 1.1, 0.9)))
        'FAILS: the change has the opposite sign.'
        >>> verdict(Removal("without 20", 20, -2.0, (1.0, -1.1, 0.9)))
        'FAILS: no change beyond the noise of retraining.'
    """
    if removal.expects_nothing:
        if removal.holds:
            return "Holds: as predicted, within the noise of retraining."
        return "FAILS: the change differs from the predicted one by more than the noise of retraining."
    if removal.holds:
        ratio = removal.actual / removal.predicted
        return f"Holds: the sign is as predicted, the size {ratio:.1f} times the predicted one."
    if abs(removal.actual) <= 2 * removal.error:
        return "FAILS: no change beyond the noise of retraining."
    return "FAILS: the change has the opposite sign."


def retrain_without(
    digits: Digits,
    query: int,
    groups: Mapping[str, Sequence[int]],
    *,
    pairs: int,
    progress: bool = True,
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
    with tqdm(total=pairs * (len(groups) + 1), desc="retrain", unit="run", delay=2, disable=not progress) as bar:
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
