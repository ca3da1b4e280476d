"""Ranks, rank correlations and Pearson's beside them, vectorised over leading axes and over bootstrap weights."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Floats",
    "RankedSeries",
    "joined",
    "joined_mean",
    "mean_over_queries",
    "midranks",
    "pearson",
    "spearman",
    "weighted_pearson",
    "weighted_spearman",
]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class RankedSeries:
    """The order of M values, with ties: all that a rank statistic needs of them.

    Attributes:
        order: indices that sort the values, shape ``(..., M)``.
        first: for every value, how many values are strictly smaller, shape ``(..., M)``.
        last: for every value, how many values are smaller or equal, shape ``(..., M)``.
    """

    order: Integers
    first: Integers
    last: Integers

    @classmethod
    def of(cls, values: Floats) -> "RankedSeries":
        """Sort ``values`` along the last axis; equal values form one tied group."""
        count = values.shape[-1]
        order = np.argsort(values, axis=-1, kind="stable")
        ordered = np.take_along_axis(values, order, axis=-1)
        position = np.broadcast_to(np.arange(count), ordered.shape)
        opens = np.ones(ordered.shape, dtype=bool)  # does a tied group open here?
        opens[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
        closes = np.ones(ordered.shape, dtype=bool)
        closes[..., :-1] = opens[..., 1:]
        starts = np.maximum.accumulate(np.where(opens, position, 0), axis=-1)
        stops = np.minimum.accumulate(np.where(closes, position + 1, count)[..., ::-1], axis=-1)[..., ::-1]
        first, last = np.empty_like(order), np.empty_like(order)
        np.put_along_axis(first, order, starts, axis=-1)
        np.put_along_axis(last, order, stops, axis=-1)
        return cls(order, first, last)

    def __getitem__(self, index: int) -> "RankedSeries":
        """Pick one series of a stack."""
        return RankedSeries(self.order[index], self.first[index], self.last[index])

    def weighted(self, weights: Floats) -> Floats:
        """Midranks when value j occurs ``weights[b, j]`` times: ``(B, M)`` for one series of M values.

        This is what sorting each resampled series would give, without sorting any of them.
        """
        below = np.zeros((weights.shape[0], weights.shape[1] + 1))
        np.cumsum(weights[:, self.order], axis=1, out=below[:, 1:])
        return np.asarray((below[:, self.first] + below[:, self.last] + 1) / 2)


def joined(values: Floats, rounding: Floats) -> Floats:
    """Values along the last axis; of those that rounding alone tells apart, all take the lowest, and tie.

    Equal sums differ in their last bits where their terms were added in another order, which is no reason for a rank.

    Args:
        values: shape ``(..., M)``.
        rounding: what neighbours may differ by, shape ``(..., 1)``.

    Example:
        >>> joined(np.array([0.1 + 0.2, 0.5, 0.3]), np.array([1e-12])).tolist()
        [0.3, 0.5, 0.3]
    """
    order = np.argsort(values, axis=-1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=-1)
    opens = np.ones(ordered.shape, dtype=bool)  # does a tied group open here?
    opens[..., 1:] = np.diff(ordered, axis=-1) > rounding
    starts = np.maximum.accumulate(np.where(opens, np.arange(ordered.shape[-1]), 0), axis=-1)
    result = np.empty_like(values)
    np.put_along_axis(result, order, np.take_along_axis(ordered, starts, axis=-1), axis=-1)
    return result


def joined_mean(values: Floats) -> Floats:
    """Mean over the first axis, ``(..., M)``; those along the last that agree in 13 digits of the largest value tie.

    Example:
        >>> np.ptp(joined_mean(np.array([[0.1, 0.3], [0.2, 0.2], [0.3, 0.1]])))
        np.float64(0.0)
    """
    return joined(values.mean(axis=0), 1e-13 * np.abs(values).max(axis=(0, -1))[..., None])


def midranks(values: Floats) -> Floats:
    """Ranks from 1 along the last axis; tied values share the mean of their ranks.

    Example:
        >>> midranks(np.array([3.0, 1.0, 3.0, 2.0]))
        array([3.5, 1. , 3.5, 2. ])
    """
    series = RankedSeries.of(values)
    return np.asarray((series.first + series.last + 1) / 2)


def spearman(left: Floats, right: Floats) -> Floats:
    """Spearman's rank correlation along the last axis, leading axes broadcast; NaN where a series is constant.

    Example:
        >>> spearman(np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]), np.array([10.0, 20.0, 90.0]))
        array([ 1., -1.])
    """
    a, b = (midranks(x) - (x.shape[-1] + 1) / 2 for x in (left, right))
    return _ratio((a * b).sum(-1), (a * a).sum(-1), (b * b).sum(-1))


def weighted_spearman(left: RankedSeries, right: RankedSeries, weights: Floats) -> Floats:
    """Spearman's correlation of two series of M values under B resamplings: shape ``(B,)``.

    Args:
        left: one ranked series of M values.
        right: the other.
        weights: how often each of the M pairs was drawn, shape ``(B, M)``; every row sums to M.
    """
    centre = (weights.shape[1] + 1) / 2  # midranks average to this whatever the ties
    a, b = left.weighted(weights) - centre, right.weighted(weights) - centre
    wa = weights * a
    return _ratio((wa * b).sum(1), (wa * a).sum(1), (weights * b * b).sum(1))


def pearson(left: Floats, right: Floats) -> Floats:
    """Pearson's correlation along the last axis, leading axes broadcast; NaN where a series is constant.

    Example:
        >>> pearson(np.array([1.0, 2.0, 3.0]), np.array([-1.0, -2.0, -3.0]))
        array(-1.)
    """
    a, b = (_spread(x, x.mean(-1, keepdims=True)) for x in (left, right))
    return _ratio((a * b).sum(-1), (a * a).sum(-1), (b * b).sum(-1))


def weighted_pearson(left: Floats, right: Floats, weights: Floats) -> Floats:
    """Pearson's correlation of two series of M values under B resamplings: shape ``(B,)``.

    Args:
        left: one series of M values.
        right: the other.
        weights: how often each of the M pairs was drawn, shape ``(B, M)``; every row sums to M.
    """
    a, b = (_spread(x, weights @ x[:, None] / weights.shape[1]) for x in (left, right))  # (B, M)
    wa = weights * a
    return _ratio((wa * b).sum(1), (wa * a).sum(1), (weights * b * b).sum(1))


def mean_over_queries(replicates: Iterable[Floats], count: int) -> Floats:
    """Mean of the queries' ``count`` bootstrap replicates; a replicate leaves out queries whose value is undefined.

    A resampling of few subsets can hold one value only.
    """
    total, defined = np.zeros(count), np.zeros(count)
    for values in replicates:
        known = ~np.isnan(values)
        total += np.where(known, values, 0.0)
        defined += known
    return np.asarray(np.divide(total, defined, out=np.full(count, np.nan), where=defined > 0))


def _spread(values: Floats, mean: Floats) -> Floats:
    """Values less their mean; 0 where that leaves what rounding made of equal values, whose correlation is noise."""
    centred = values - mean
    rounding = values.shape[-1] * np.finfo(np.float64).eps * np.abs(values).max(-1, keepdims=True)
    return np.where(np.abs(centred) <= rounding, 0.0, centred)


def _ratio(cross: Floats, left: Floats, right: Floats) -> Floats:
    scale = np.sqrt(left * right)
    return np.asarray(np.divide(cross, scale, out=np.full(np.shape(cross), np.nan), where=scale > 0))
