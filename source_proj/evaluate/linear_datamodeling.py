"""The linear datamodeling score: do attributed scores rank what retraining really does?"""

import hashlib
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from source_proj.errors import MismatchError
from source_proj.evaluate._counterfactual import (
    Retrainings,
    bootstrap_weights,
    percentile_interval,
    subset_predictions,
)
from source_proj.evaluate._ranks import Floats, RankedSeries, spearman, weighted_spearman

__all__ = ["LDS", "Difference", "compare", "lds", "mean_lds", "noise_ceiling"]

_MAX_SPLITS = 50


@dataclass(frozen=True)
class LDS:
    """Linear datamodeling score of one method.

    Attributes:
        value: mean over queries of the rank correlation.
        interval: 95 % bootstrap interval of the value over subsets; NaNs when ``bootstrap=0``.
        per_query: rank correlation of each query, shape ``(Q,)``.
        ceiling: what a perfect predictor would reach, the retrainings being noisy; None for one retraining.
        reliability: share of the outcomes' variance that is not retraining noise; None for one retraining.
        replicates: bootstrap replicates of the value, shape ``(B,)``; two results over the same subsets,
            seed and B are paired, which :func:`compare` and :func:`mean_lds` use.
        draws: fingerprint of what the replicates were drawn from.
    """

    value: float
    interval: tuple[float, float]
    per_query: Floats = field(repr=False)
    ceiling: float | None
    reliability: float | None
    replicates: Floats = field(repr=False)
    draws: str = field(repr=False)

    def __str__(self) -> str:
        """Render value, interval and ceiling in one line."""
        text = f"LDS {self.value:.3f} [{self.interval[0]:.3f}, {self.interval[1]:.3f}]"
        return text if self.ceiling is None else f"{text}, noise ceiling {self.ceiling:.3f}"


@dataclass(frozen=True)
class Difference:
    """LDS of one method minus that of another, on the same subsets.

    Attributes:
        value: the difference.
        interval: its 95 % paired bootstrap interval; excludes 0 when the difference is beyond chance.
    """

    value: float
    interval: tuple[float, float]

    @property
    def significant(self) -> bool:
        """Whether the interval excludes zero."""
        return not self.interval[0] <= 0 <= self.interval[1]


def lds(scores: ArrayLike, masks: ArrayLike, outcomes: ArrayLike, *, bootstrap: int = 1000, seed: int = 0) -> LDS:
    """Linear datamodeling score: rank correlation of predicted and measured outcomes over retrained subsets.

    For every query, ``Σ_{z in subset} score(q, z)`` is correlated (Spearman) over the M subsets with the
    measurement averaged over R retrainings on that subset; the value is the mean over queries
    (Park et al. 2023, https://arxiv.org/abs/2303.14186, definition 2.2). The bootstrap resamples subsets.

    Args:
        scores: ``(Q, N)``; positive means that including the example raises the query's measurement.
        masks: ``(M, N)`` bool; True marks an example the subset keeps.
        outcomes: measurements ``(M, R, Q)``, or ``(M, Q)`` for one retraining a subset.
        bootstrap: number of resamplings; 0 for none (a point estimate, e.g. in a grid search).
        seed: seed of the resampling.

    Returns:
        The score with its interval, per-query values and noise ceiling.

    Raises:
        TypeError: if masks are not boolean.
        ValueError: for wrong dimensions, non-finite values, fewer than three subsets, or a query whose
            predictions or outcomes are constant.
        MismatchError: if the three disagree on subsets, examples or queries.

    Example:
        >>> from source_proj.evaluate import half_subsets
        >>> masks = half_subsets(40, 25)
        >>> effect = np.linspace(-1, 1, 40)[None, :]
        >>> lds(effect, masks, masks @ effect.T, bootstrap=0).value
        1.0
    """
    retrainings = Retrainings.check(masks, outcomes)
    predicted, measured = subset_predictions(scores, retrainings), retrainings.mean
    per_query = spearman(predicted, measured)
    weights = bootstrap_weights(len(retrainings.masks), bootstrap, seed)
    replicates = _replicates(predicted, measured, weights)
    reliability = ceiling = None
    if retrainings.measured.shape[1] > 1:
        reliability, ceiling = noise_ceiling(retrainings.measured)
    return LDS(
        value=float(per_query.mean()),
        interval=percentile_interval(replicates),
        per_query=per_query,
        ceiling=ceiling,
        reliability=reliability,
        replicates=replicates,
        draws=_fingerprint(retrainings, bootstrap, seed),
    )


def compare(first: LDS, second: LDS) -> Difference:
    """Difference ``first − second`` with its paired bootstrap interval.

    Raises:
        MismatchError: if the two were not computed on the same retrainings with the same bootstrap and seed.

    Example:
        >>> from source_proj.evaluate import half_subsets
        >>> masks, rng = half_subsets(40, 25), np.random.default_rng(0)
        >>> effect, unrelated = rng.normal(size=(2, 3, 40))
        >>> outcomes = masks @ effect.T
        >>> compare(lds(effect, masks, outcomes), lds(unrelated, masks, outcomes)).significant
        True
    """
    _require_paired([first, second])
    return Difference(first.value - second.value, percentile_interval(first.replicates - second.replicates))


def mean_lds(results: Sequence[LDS]) -> LDS:
    """Mean LDS of one method over training runs or sketch seeds, with a paired bootstrap interval.

    The interval covers the choice of subsets, not the choice of runs.

    Raises:
        ValueError: for no results.
        MismatchError: if they were not computed on the same retrainings with the same bootstrap and seed.
    """
    if not results:
        raise ValueError("mean_lds needs at least one result, got none")
    _require_paired(results)
    replicates = np.mean([result.replicates for result in results], axis=0)
    return LDS(
        value=float(np.mean([result.value for result in results])),
        interval=percentile_interval(replicates),
        per_query=np.mean([result.per_query for result in results], axis=0),
        ceiling=results[0].ceiling,
        reliability=results[0].reliability,
        replicates=replicates,
        draws=results[0].draws,
    )


def noise_ceiling(outcomes: ArrayLike, *, seed: int = 0) -> tuple[float, float]:
    """Reliability of measurements averaged over R retrainings, and the LDS a perfect predictor would get.

    Retrainings are split in halves in every way (or 50 random ways, when there are more); the halves' means
    correlate (Spearman, mean over queries and splits) by r. Spearman-Brown carries r from the h retrainings
    of a half to all R: ``reliability = κr / (1 + (κ−1)r)``, κ = R/h. A predictor that knows the noise-free
    outcome correlates with the noisy mean by ``ceiling = √reliability``.

    Args:
        outcomes: measurements ``(M, R, Q)``, R ≥ 2.
        seed: seed of the choice of splits, when not all are used.

    Returns:
        ``(reliability, ceiling)``; both 0 when the halves do not correlate positively.

    Raises:
        ValueError: for other shapes, R = 1, fewer than three subsets or non-finite values.
    """
    measured = np.asarray(outcomes, dtype=np.float64)
    if measured.ndim != 3 or measured.shape[1] < 2 or measured.shape[0] < 3:
        raise ValueError(
            "a noise ceiling needs outcomes of shape (subsets ≥ 3, retrainings ≥ 2, queries), "
            f"got shape {measured.shape}"
        )
    if not np.isfinite(measured).all():
        raise ValueError("outcomes hold values that are not finite; drop the diverged retrainings")
    count = measured.shape[1]
    half = count // 2
    by_query = np.ascontiguousarray(measured.transpose(1, 2, 0))  # (R, Q, M)
    correlations = []
    for left, right in _half_splits(count, seed):
        correlation = spearman(by_query[left].mean(0), by_query[right].mean(0))
        # A half whose mean is constant over subsets agrees with nothing: count it as no correlation.
        correlations.append(np.nan_to_num(correlation, nan=0.0).mean())
    r = max(float(np.mean(correlations)), 0.0)
    factor = count / half
    reliability = factor * r / (1 + (factor - 1) * r)
    return reliability, reliability**0.5


def _half_splits(count: int, seed: int) -> Iterable[tuple[list[int], list[int]]]:
    """Pairs of disjoint halves of ``range(count)``; of an odd count each pair leaves one element out."""
    half = count // 2
    if math.comb(count, half) * math.comb(count - half, half) // 2 > _MAX_SPLITS:
        rng = np.random.default_rng(seed)
        orders = (rng.permutation(count).tolist() for _ in range(_MAX_SPLITS))
        return [(order[:half], order[half : 2 * half]) for order in orders]
    pairs = itertools.product(itertools.combinations(range(count), half), repeat=2)
    return [(list(a), list(b)) for a, b in pairs if a < b and not set(a) & set(b)]


def _replicates(predicted: Floats, measured: Floats, weights: Floats) -> Floats:
    if len(weights) == 0:
        return np.empty(0)
    left, right = RankedSeries.of(predicted), RankedSeries.of(measured)
    total, defined = np.zeros(len(weights)), np.zeros(len(weights))
    for query in range(len(predicted)):
        correlation = weighted_spearman(left[query], right[query], weights)
        # A resampling of few subsets can hold one value only; such a query is left out of that replicate.
        known = ~np.isnan(correlation)
        total += np.where(known, correlation, 0.0)
        defined += known
    return np.asarray(np.divide(total, defined, out=np.full(len(weights), np.nan), where=defined > 0))


def _fingerprint(retrainings: Retrainings, bootstrap: int, seed: int) -> str:
    digest = hashlib.sha256(f"{retrainings.measured.shape} {bootstrap} {seed}".encode())
    digest.update(np.packbits(retrainings.masks).tobytes())
    digest.update(np.ascontiguousarray(retrainings.measured).tobytes())
    return digest.hexdigest()


def _require_paired(results: Sequence[LDS]) -> None:
    if len({result.draws for result in results}) > 1:
        raise MismatchError(
            "these LDS results are not paired (draws "
            + ", ".join(result.draws[:8] for result in results)
            + "); compute them on the same masks and outcomes, with the same bootstrap and seed"
        )
