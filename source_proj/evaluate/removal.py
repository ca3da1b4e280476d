"""Subset removal: does removing the examples credited for a prediction overturn it?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from source_proj.errors import MismatchError

__all__ = ["SubsetRemoval", "subset_removal"]

TrainFunction = Callable[[list[NDArray[np.int64]], NDArray[np.int64]], ArrayLike]
"""``train(kept, queries)``: for each i, train on the examples ``kept[i]`` and predict query ``queries[i]``;
returns predictions ``(len(kept),)`` or, for R retrainings each, ``(len(kept), R)``."""


@dataclass(frozen=True)
class SubsetRemoval:
    """Outcome of removing growing sets of each query's most helpful examples.

    Attributes:
        sizes: how many examples were to be removed at each step, ``(S,)``.
        removed: how many were (a query may have fewer helpful ones), ``(Q, S)``.
        flipped: share of retrainings whose prediction differs from the baseline's, ``(Q, S)``.
    """

    sizes: NDArray[np.int64]
    removed: NDArray[np.int64]
    flipped: NDArray[np.float64]

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of queries at each size that most retrainings predict differently, ``(S,)``."""
        return np.asarray((self.flipped > 0.5).sum(axis=0))

    @property
    def smallest(self) -> NDArray[np.int64]:
        """Smallest size at which each query's prediction flips, ``(Q,)``; −1 where none does."""
        flips = self.flipped > 0.5
        return np.where(flips.any(axis=1), self.sizes[flips.argmax(axis=1)], -1)


def subset_removal(
    scores: ArrayLike,
    baseline: ArrayLike,
    train: TrainFunction,
    sizes: Sequence[int],
    *,
    higher_is_better: bool | None = None,
) -> SubsetRemoval:
    """Remove each query's most helpful examples in growing numbers, retrain, and count flipped predictions.

    Only examples that help are removed: a query with fewer of them than a size asks for loses those it has.
    The better the attribution, the fewer removals flip a prediction (Bae et al. 2024,
    https://arxiv.org/abs/2405.12186, section 5.2).

    Args:
        scores: ``(Q, N)``; positive means that including the example raises the query's measurement.
        baseline: prediction of each query by the model trained on everything, ``(Q,)``.
        train: the retraining function, called once with all (size, query) pairs so that it can batch them;
            ``train(kept, queries)`` gets index arrays of kept examples and the query each is for, and returns
            predictions ``(len(kept),)``, or ``(len(kept), R)`` for R retrainings of each.
        sizes: numbers of examples to remove, increasing.
        higher_is_better: whether a higher measurement is better; default: the scores' own attribute, else True.

    Raises:
        ValueError: for wrong dimensions, non-finite scores, or sizes that are not increasing or leave nothing.
        MismatchError: if baseline or what train returns do not match the queries.

    Example:
        >>> def train(kept, queries):  # a query is predicted right while examples 0 and 1 are both there
        ...     return [int({0, 1} <= set(k.tolist())) for k in kept]
        >>> scores = np.array([[0.9, 0.8, 0.1, -0.5], [0.1, 0.2, 0.3, 0.4]])
        >>> subset_removal(scores, [1, 1], train, sizes=[1, 3]).counts
        array([1, 2])
    """
    helpful = np.asarray(scores, dtype=np.float64)
    if higher_is_better is None:
        higher_is_better = bool(getattr(scores, "higher_is_better", True))
    base, steps = np.asarray(baseline), np.asarray(sizes)
    _check(helpful, base, steps)
    if not higher_is_better:
        helpful = -helpful
    count, n = helpful.shape
    order = np.argsort(-helpful, axis=1, kind="stable")
    removed = np.minimum(steps[None, :], (helpful > 0).sum(axis=1, keepdims=True))  # (Q, S)
    queries = np.repeat(np.arange(count), len(steps))
    kept = [np.setdiff1d(np.arange(n), order[q, :k]) for q, k in zip(queries, removed.ravel(), strict=True)]
    predictions = np.asarray(train(kept, queries))
    if predictions.ndim not in (1, 2) or len(predictions) != len(kept):
        raise MismatchError(
            f"train must return predictions of shape ({len(kept)},) or ({len(kept)}, retrainings), "
            f"got {predictions.shape}"
        )
    flipped = predictions.reshape(len(kept), -1) != base[queries, None]
    return SubsetRemoval(steps, removed, flipped.mean(axis=1).reshape(count, len(steps)))


def _check(scores: NDArray[np.float64], baseline: NDArray[np.generic], sizes: NDArray[np.int64]) -> None:
    if scores.ndim != 2 or scores.size == 0:
        raise ValueError(f"scores must have shape (queries, examples), got shape {scores.shape}")
    bad = np.argwhere(~np.isfinite(scores))
    if len(bad):
        raise ValueError(f"scores hold {len(bad)} values that are not finite, the first at {tuple(bad[0].tolist())}")
    if baseline.shape != (len(scores),):
        raise MismatchError(f"baseline must hold one prediction a query, shape ({len(scores)},), got {baseline.shape}")
    whole = sizes.ndim == 1 and sizes.size > 0 and np.issubdtype(sizes.dtype, np.integer)
    if not whole or sizes[0] < 1 or (np.diff(sizes) <= 0).any() or sizes[-1] >= scores.shape[1]:
        raise ValueError(
            f"sizes must be increasing whole numbers from 1 to {scores.shape[1] - 1} "
            f"(removing all examples leaves nothing to train on), got {sizes.tolist()}"
        )
