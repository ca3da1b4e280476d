"""How far retraining's own noise lets any prediction get."""

import itertools
import math
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import ArrayLike

from source_proj._io.numbers import plain_numbers
from source_proj.evaluate._ranks import Floats, joined_mean, spearman
from source_proj.evaluate.ground_truth import GroundTruth

__all__ = ["noise_ceiling", "split_half"]

_MAX_SPLITS = 50


def noise_ceiling(truth: GroundTruth | ArrayLike, *, seed: int = 0) -> tuple[float, float]:
    """Reliability of measurements averaged over R retrainings, and the LDS a perfect predictor would get.

    Retrainings are split in halves in every way (or 50 random ways, when there are more); the halves' means
    correlate (Spearman, mean over queries and splits) by r. Spearman-Brown carries r from the h retrainings
    of a half to all R: ``reliability = κr / (1 + (κ−1)r)``, κ = R/h. A predictor that knows the noise-free
    outcome correlates with the noisy mean by ``ceiling = √reliability``.

    Args:
        truth: a :class:`GroundTruth`, or its measurements ``(M, R, Q)``; R ≥ 2.
        seed: seed of the choice of splits, when not all are used.

    Returns:
        ``(reliability, ceiling)``; both 0 when the halves do not correlate positively.

    Raises:
        ValueError: for other shapes, R = 1, fewer than three subsets or non-finite values.
        SourceProjError: if retrainings of the store are missing or damaged.
    """
    measured = np.asarray(truth.outcomes if isinstance(truth, GroundTruth) else plain_numbers(truth), dtype=np.float64)
    if measured.ndim != 3 or measured.shape[1] < 2 or measured.shape[0] < 3:
        raise ValueError(
            "a noise ceiling needs outcomes of shape (subsets ≥ 3, retrainings ≥ 2, queries), "
            f"got shape {measured.shape}"
        )
    if not np.isfinite(measured).all():
        raise ValueError("outcomes hold values that are not finite; drop the diverged retrainings")
    return split_half(measured, spearman, seed)


def split_half(measured: Floats, correlate: Callable[[Floats, Floats], Floats], seed: int) -> tuple[float, float]:
    """``(reliability, ceiling)`` of measurements ``(M, R, Q)``, R ≥ 2, for any correlation along the last axis."""
    count = measured.shape[1]
    half = count // 2
    by_query = np.ascontiguousarray(measured.transpose(1, 2, 0))  # (R, Q, M)
    correlations = []
    for left, right in _half_splits(count, seed):
        correlation = correlate(joined_mean(by_query[left]), joined_mean(by_query[right]))
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
