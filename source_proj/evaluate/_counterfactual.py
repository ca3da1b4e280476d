"""What every comparison of scores with retrainings shares: checked inputs, subset predictions, resampling."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from source_proj._errors import MismatchError
from source_proj._io.numbers import plain_numbers, whole_number
from source_proj.evaluate._ranks import Floats, joined, joined_mean
from source_proj.evaluate.ground_truth import GroundTruth

__all__ = [
    "Retrainings",
    "bootstrap_weights",
    "bracketed",
    "centred_interval",
    "checked_scores",
    "percentile_interval",
    "refuse_constant",
    "subset_predictions",
]

_QUERY_BLOCK = 64  # rows of scores held in float64 at a time


@dataclass(frozen=True)
class Retrainings:
    """Checked subsets and what models retrained on them measured.

    Attributes:
        masks: ``(M, N)`` bool, True for an example that was kept.
        measured: ``(M, R, Q)`` float64.
    """

    masks: NDArray[np.bool_]
    measured: Floats

    @classmethod
    def of(cls, truth: GroundTruth | ArrayLike, outcomes: ArrayLike | None) -> "Retrainings":
        """Take a store of retrainings, or masks and outcomes.

        Raises:
            TypeError: for masks without outcomes, outcomes beside a store, or masks that are not boolean.
            ValueError: see :meth:`check`.
            MismatchError: see :meth:`check`.
            SourceProjError: if retrainings of the store are missing or damaged.
        """
        if isinstance(truth, GroundTruth):
            if outcomes is not None:
                raise TypeError("a GroundTruth holds its own outcomes; leave the argument outcomes out")
            return cls.check(truth.masks, truth.outcomes)
        if outcomes is None:
            raise TypeError("masks need the outcomes of their retrainings: give both, or one GroundTruth")
        return cls.check(truth, outcomes)

    @classmethod
    def check(cls, masks: ArrayLike, outcomes: ArrayLike) -> "Retrainings":
        """Validate shapes, types and finiteness.

        Raises:
            TypeError: if masks are not boolean.
            ValueError: for wrong dimensions, fewer than three subsets, or values that are not finite.
            MismatchError: if masks and outcomes differ in the number of subsets.
        """
        kept, measured = np.asarray(plain_numbers(masks)), np.asarray(plain_numbers(outcomes), dtype=np.float64)
        if kept.dtype != np.bool_:
            raise TypeError(f"masks must be boolean, True for a kept example; got dtype {kept.dtype}")
        if kept.ndim != 2 or kept.size == 0:
            raise ValueError(f"masks must have shape (subsets, examples), got shape {kept.shape}")
        given = measured.shape
        if measured.ndim == 2:
            measured = measured[:, None, :]
        if measured.ndim != 3 or measured.size == 0:
            raise ValueError(
                f"outcomes must have shape (subsets, retrainings, queries) or (subsets, queries), got shape {given}"
            )
        if len(kept) != len(measured):
            raise MismatchError(
                f"masks describe {len(kept)} subsets but outcomes {len(measured)}; give one row of outcomes per subset"
            )
        if len(kept) < 3:
            raise ValueError(f"a correlation over subsets needs at least 3 of them, got {len(kept)}")
        _refuse_nonfinite(measured, "outcomes", "(subset, retraining, query)")
        return cls(kept, measured)

    @property
    def mean(self) -> Floats:
        """Measurement of each query on each subset, averaged over retrainings: ``(Q, M)``."""
        return joined_mean(np.ascontiguousarray(self.measured.transpose(1, 2, 0)))

    def fingerprint(self, kind: str, bootstrap: int, seed: int) -> str:
        """Digest of all that bootstrap replicates of a statistic are drawn from: equal ones are paired."""
        digest = hashlib.sha256(f"{kind} {self.measured.shape} {bootstrap} {seed}".encode())
        digest.update(np.packbits(self.masks).tobytes())
        digest.update(np.ascontiguousarray(self.measured).tobytes())
        return digest.hexdigest()


def checked_scores(scores: ArrayLike, retrainings: Retrainings) -> NDArray[np.generic]:
    """Scores as a finite matrix ``(Q, N)`` that fits the retrainings.

    Raises:
        ValueError: if scores are not a finite matrix.
        MismatchError: if scores, masks and outcomes disagree on N or Q.
    """
    matrix = np.asarray(plain_numbers(scores))
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(f"scores must have shape (queries, examples), got shape {matrix.shape}")
    n, q = retrainings.masks.shape[1], retrainings.measured.shape[2]
    if matrix.shape[1] != n:
        raise MismatchError(f"scores cover {matrix.shape[1]} training examples but masks {n}; use one training set")
    if matrix.shape[0] != q:
        raise MismatchError(f"scores have {matrix.shape[0]} queries but outcomes {q}; use the same queries in both")
    _refuse_nonfinite(matrix, "scores", "(query, example)")
    return matrix


def subset_predictions(scores: ArrayLike, retrainings: Retrainings) -> Floats:
    """Sum each query's scores over the kept examples of every subset: ``(Q, M)`` in float64.

    Raises:
        ValueError: if scores are not a finite matrix, or predictions or outcomes are constant over the subsets.
        MismatchError: if scores, masks and outcomes disagree on N or Q.
    """
    matrix = checked_scores(scores, retrainings)
    q = len(matrix)
    kept = retrainings.masks.T.astype(np.float64)
    predicted = np.empty((q, kept.shape[1]))
    for start in range(0, q, _QUERY_BLOCK):
        block = slice(start, start + _QUERY_BLOCK)
        rows = matrix[block].astype(np.float64)
        # Summation order alone moves a sum by ~1e-16 of the absolute mass: below that it says nothing.
        predicted[block] = joined(rows @ kept, 1e-12 * np.abs(rows).sum(axis=1, keepdims=True))
        refuse_constant(
            np.ptp(predicted[block], axis=1) == 0, start, "the scores predict the same value for every subset"
        )
    flat = np.ptp(retrainings.mean, axis=1) == 0
    refuse_constant(flat, 0, "the outcomes are the same on every subset")
    return predicted


def bootstrap_weights(count: int, replicates: int, seed: int) -> Floats:
    """How often each of ``count`` subsets occurs in each resampling with replacement: ``(replicates, count)``.

    Raises:
        TypeError: if replicates or seed are no whole numbers.
        ValueError: if one is negative.
    """
    replicates = whole_number(replicates, "bootstrap")
    if replicates < 0:
        raise ValueError(f"bootstrap must be the number of resamplings (0 for none), got {replicates}")
    rng = np.random.default_rng(whole_number(seed, "seed", least=0))
    return rng.multinomial(count, np.full(count, 1 / count), size=replicates).astype(np.float64)


def percentile_interval(replicates: Floats, level: float = 0.95) -> tuple[float, float]:
    """Central percentile interval of bootstrap replicates; NaNs if there are none, or none that is a number."""
    if np.isnan(replicates).all():
        return (float("nan"), float("nan"))
    low, high = np.nanquantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return (float(low), float(high))


def centred_interval(
    value: float, replicates: Floats, bound: float = math.inf, level: float = 0.95
) -> tuple[float, float]:
    """A value ± as many standard deviations of its bootstrap replicates as a normal variable has in the level.

    Of rank correlations, whose replicates lie below the value: repeated subsets tie, and share their noise. In 500
    drawn problems percentiles covered the truth in 88 % with 30 subsets and 93 % with 100, missing it from below; this
    one in 93 % and 96 %. Of paired differences, both in 93 to 95 %.

    Args:
        value: the correlation, or a difference of two.
        replicates: of it, ``(B,)``; NaNs are left out.
        bound: of the value's size; the interval does not go beyond.
        level: coverage.

    Returns:
        Both ends; NaNs if there are no replicates, or none that is a number.

    Example:
        >>> low, high = centred_interval(0.5, np.array([0.3, 0.5]))
        >>> round(low, 3), round(high, 3)
        (0.304, 0.696)
    """
    if np.isnan(replicates).all():
        return (float("nan"), float("nan"))
    half = NormalDist().inv_cdf((1 + level) / 2) * float(np.nanstd(replicates))
    return (max(value - half, -bound), min(value + half, bound))


def bracketed(interval: Sequence[float], form: str) -> str:
    """An interval behind its value, each end in some format; nothing for one of NaNs, as without a bootstrap.

    Example:
        >>> bracketed((0.25, 0.5), ".1f"), bracketed((float("nan"), float("nan")), ".1f")
        (' [0.2, 0.5]', '')
    """
    low, high = interval
    return "" if math.isnan(low) else f" [{low:{form}}, {high:{form}}]"


def _refuse_nonfinite(values: NDArray[np.generic], name: str, axes: str) -> None:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        where = tuple(int(i) for i in bad[0])
        raise ValueError(f"{name} hold {len(bad)} values that are not finite, the first at {axes} = {where}")


def refuse_constant(flat: NDArray[np.bool_], offset: int, what: str) -> None:
    """Raise ValueError if any query is flat; ``offset`` is the position of the first one."""
    queries = (np.flatnonzero(flat) + offset).tolist()
    if queries:
        raise ValueError(f"{what} for queries {queries[:10]}, so no correlation exists; leave these queries out")
