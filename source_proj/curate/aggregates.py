"""Scores of many queries summed up: what each training example does to all of a validation set, or to its groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from source_proj._errors import MismatchError, extra
from source_proj._io.numbers import plain_numbers
from source_proj.attribution.attributor import Attributor
from source_proj.attribution.features import SketchedQueries
from source_proj.attribution.population import Population
from source_proj.attribution.scores import Scores
from source_proj.bank.examples import Examples
from source_proj.curate.chance import Spread
from source_proj.curate.labels import Labels, classes_of

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Aggregate", "Facts", "aggregate", "facts_of", "score_blocks"]

_BLOCK_SCORES = 8 << 20
"""Scores held at once (32 MiB of float32)."""


@dataclass(frozen=True, eq=False)
class Aggregate:
    """Scores of the training examples, summed up over groups of queries.

    Attributes:
        groups: names of the groups, G entries; ``["all"]`` where all queries are one.
        sizes: queries of each group, those of weight 0 left out, ``(G,)``.
        mean: weighted mean score over a group's queries, ``(G, N)`` float64: positive means that including the example
            raised their measurements.
        error: standard error of that mean over the queries, ``(G, N)``; NaN for a group of one query.
        worsened: share of the group's queries whose measurement the example worsened, ``(G, N)``.
        train_ids: N ids.
        unit: unit of the measurement.
        higher_is_better: whether a rise of the measurement is an improvement.
        additive: whether scores are changes of the measurement, and no similarities.
        population: which training examples the N columns stand for; None: all of one stage.
        freedom: degrees of freedom of each group's errors, ``(G,)``; None: one less than its queries.
        examples: how the training examples are shown; None where that is not known.
    """

    groups: list[Any]
    sizes: np.ndarray
    mean: np.ndarray
    error: np.ndarray
    worsened: np.ndarray
    train_ids: list[Any]
    unit: str
    higher_is_better: bool
    additive: bool = True
    population: Population | None = field(default=None, repr=False)
    freedom: np.ndarray | None = None
    examples: Examples | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        names = "1 group" if len(self.groups) == 1 else f"{len(self.groups)} groups"
        return f"Aggregate({int(self.sizes.sum())} queries in {names} x {len(self.train_ids)} training examples)"

    @property
    def benefit(self) -> np.ndarray:
        """How much including each example improved each group on average, ``(G, N)``: the mean, or minus it."""
        return self.mean if self.higher_is_better else -self.mean

    def to_scores(self) -> Scores:
        """The means as scores of G queries, the groups."""
        return Scores(
            self.mean,
            self.groups,
            self.train_ids,
            unit=self.unit,
            higher_is_better=self.higher_is_better,
            additive=self.additive,
            population=self.population,
        )

    def to_pandas(self) -> pd.DataFrame:
        """A row for each group and example: ``group``, ``id``, ``mean``, ``error``, ``worsened`` (``pandas`` extra)."""
        with extra("pandas"):
            import pandas as pd
        count = len(self.train_ids)
        return pd.DataFrame(
            {
                "group": [group for group in self.groups for _ in range(count)],
                "id": self.train_ids * len(self.groups),
                "mean": self.mean.ravel(),
                "error": self.error.ravel(),
                "worsened": self.worsened.ravel(),
            }
        )


def aggregate(
    scored: Attributor | Scores,
    queries: Any = None,
    *,
    weights: Sequence[float] | np.ndarray | None = None,
    groups: Labels | None = None,
) -> Aggregate:
    r"""Sum the scores of many queries up, without ever holding all of them.

    The mean over a group's queries with shares :math:`p_q = w_q / \sum w` of the weight is
    :math:`\bar s(z) = \sum_q p_q s(q, z)`, its standard error
    :math:`\sqrt{\frac{\sum p^2}{1 - \sum p^2} \sum_q p_q (s(q, z) - \bar s(z))^2}`.

    Args:
        scored: an attribution method, such as :class:`source_proj.Source`; or scores.
        queries: what the method is asked: a data set, or what its ``sketch(queries)`` returned. None for scores.
        weights: one number ≥ 0 for each query; default: all alike. One of weight 0 counts as if it were not there.
        groups: the name of each query's group, such as its label; default: all are one group.

    Raises:
        TypeError: queries are given beside scores, or are missing.
        MismatchError: weights or groups are not one for each query.
        ValueError: there are no queries, a weight is negative or not finite, those of a group are all 0, a score is not
            finite, or the name of a group is missing (NaN, None).

    Example:
        >>> scores = Scores(np.array([[1.0, -2.0], [3.0, -2.0]]), ["q", "r"], ["a", "b"], unit="logit margin")
        >>> aggregate(scores).mean, aggregate(scores, groups=["x", "y"]).groups
        (array([[ 2., -2.]]), ['x', 'y'])
    """
    facts = facts_of(scored)
    count, blocks = score_blocks(scored, queries)
    weight = _weights(weights, count)
    names, member = _groups(groups, count)
    shape = len(names), len(facts.train_ids)
    first, squares, worsened = (np.zeros(shape) for _ in range(3))  # Σ w s, Σ w s², Σ [worse]
    shift = np.zeros(shape[1])  # what all queries share would drown what tells them apart
    for start, values in blocks:
        part = values.astype(np.float64)
        shift = shift if start else part[0].copy()
        for group in range(len(names)):
            span = slice(start, start + len(part))
            own = np.flatnonzero((member[span] == group) & (weight[span] > 0))
            w, rows = weight[start + own], part[own]
            worsened[group] += (rows < 0 if facts.higher_is_better else rows > 0).sum(0)
            rows -= shift
            first[group] += w @ rows
            squares[group] += w @ rows**2
    sizes = np.bincount(member[weight > 0], minlength=len(names))
    sums = np.bincount(member, weight, minlength=len(names))
    if not sums.all():
        raise ValueError(f"the weights of group {names[int(sums.argmin())]!r} are all 0: leave its queries out")
    mean = first / sums[:, None]
    variance = np.maximum(squares / sums[:, None] - mean**2, 0)
    spreads = [Spread.of(weight[(member == group) & (weight > 0)]) for group in range(len(names))]
    factor, freedom = np.array(spreads).T
    error = np.sqrt(factor[:, None] * variance)
    population = facts.population.averaged(partial(_mean, weight=weight, member=member, sums=sums))
    told = facts._replace(population=population)
    return Aggregate(names, sizes, mean + shift, error, worsened / sizes[:, None], *told[:-1], freedom, facts.examples)


def _mean(values: np.ndarray, *, weight: np.ndarray, member: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Weighted means of ``(Q, …)`` over each of G groups of queries, ``(G, …)`` float64."""
    wide = tuple(range(1, values.ndim))
    total = np.zeros((len(sums), *values.shape[1:]))
    np.add.at(total, member, values * np.expand_dims(weight, wide))
    return np.asarray(total / np.expand_dims(sums, wide))


class Facts(NamedTuple):
    """What scores are of: N training ids, the unit, and so on; see :class:`Aggregate`."""

    train_ids: list[Any]
    unit: str
    higher_is_better: bool
    additive: bool
    population: Population
    examples: Examples | None


def facts_of(scored: Attributor | Scores) -> Facts:
    """The facts of a method's scores, or of scores."""
    if isinstance(scored, Scores):
        known = scored.shown.train
        return Facts(scored.train_ids, scored.unit, scored.higher_is_better, scored.additive, scored.population, known)
    if not isinstance(scored, Attributor):
        raise TypeError(f"give an attribution method, such as Source(bank), or scores, got {type(scored).__name__}")
    bank = scored.banks[0]
    population = Population.of_sizes([stage.n for stage in bank.stages])
    return Facts(bank.ids, scored.unit, scored.higher_is_better, scored.additive, population, scored.shown().train)


def score_blocks(scored: Attributor | Scores, queries: Any) -> tuple[int, Iterator[tuple[int, np.ndarray]]]:
    """The number of queries, and their scores in blocks ``(first query, (q, N))``, in order.

    Raises:
        TypeError: queries are given beside scores, or are missing.
        ValueError: there are none; or a score is not finite, which is raised while the blocks are taken.
    """
    if isinstance(scored, Scores):
        if queries is not None:
            raise TypeError("scores have their queries: leave queries out")
        count, blocks = len(scored), scored.row_blocks()
    elif queries is None:
        raise TypeError("an attribution method needs queries: give a data set, or what its sketch(queries) returned")
    else:
        count, blocks = _scored_blocks(scored, scored.sketch(queries))
    if not count:
        raise ValueError("there are scores of 0 queries, which say nothing of any example: give at least one query")
    return count, _finite(blocks, facts_of(scored).train_ids)


def _finite(blocks: Iterator[tuple[int, np.ndarray]], train_ids: Sequence[Any]) -> Iterator[tuple[int, np.ndarray]]:
    """The same blocks, or an error: one NaN would decide over every example whose score is compared with its own."""
    for start, values in blocks:
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            query, place = bad[0]
            raise ValueError(
                f"the score of training example {train_ids[place]!r} for query {start + query} is "
                f"{values[query, place]} ({len(bad)} such among {values.size}): compute the scores again, or leave the "
                "example or query out"
            )
        yield start, values


def _scored_blocks(method: Attributor, features: SketchedQueries) -> tuple[int, Iterator[tuple[int, np.ndarray]]]:
    count, height = len(features[0]), max(1, _BLOCK_SCORES // method.n_rows)

    def blocks() -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, count, height):
            part = features.part(start, start + height)
            yield start, method.score(part).values

    return count, blocks()


def _weights(weights: Sequence[float] | np.ndarray | None, count: int) -> np.ndarray:
    weight = np.ones(count) if weights is None else np.asarray(plain_numbers(weights), dtype=np.float64)
    if weight.shape != (count,):
        raise MismatchError(f"got weights of shape {weight.shape} for {count} queries: give one number for each")
    if not (np.isfinite(weight) & (weight >= 0)).all():
        bad = int(np.flatnonzero(~(np.isfinite(weight) & (weight >= 0)))[0])
        raise ValueError(f"weights are finite numbers of at least 0, got {weight[bad]} for query {bad}")
    return weight


def _groups(groups: Labels | None, count: int) -> tuple[list[Any], np.ndarray]:
    """Names of the groups, and the group of each query ``(Q,)``."""
    if groups is None:
        return ["all"], np.zeros(count, dtype=np.int64)
    return classes_of(groups, count, what="groups", of="queries")
