"""Subset removal: does removing the examples credited for a prediction overturn it?"""

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from source_proj._errors import MismatchError
from source_proj._io.equality import EqualByValue
from source_proj._io.executors import Executor
from source_proj._io.numbers import plain_numbers
from source_proj.evaluate._counterfactual import bootstrap_weights, bracketed
from source_proj.evaluate._ranks import Floats
from source_proj.evaluate.ground_truth import GroundTruth, TrainMany, TrainOne

__all__ = ["RemovalDifference", "SubsetRemoval", "compare_removal", "random_same_class", "subset_removal"]


@dataclass(frozen=True, eq=False)
class SubsetRemoval(EqualByValue):
    """Outcome of removing growing sets of each query's most helpful examples.

    Attributes:
        sizes: how many examples were to be removed at each step, ``(S,)``.
        queries: positions of the queries that were asked about, ``(K,)``: all, or the correctly predicted ones.
        removed: how many were removed (a query may have fewer helpful ones), ``(K, S)``.
        flipped: share of retrainings whose prediction differs from the baseline's, ``(K, S)``.
        interval: 95 % bootstrap interval over queries of :attr:`fraction`, ``(S, 2)``; NaNs when ``bootstrap=0``.
        replicates: bootstrap replicates of the fraction, ``(B, S)``; :func:`compare_removal` pairs them.
        draws: fingerprint of what the replicates were drawn from.
    """

    sizes: NDArray[np.int64]
    queries: NDArray[np.int64]
    removed: NDArray[np.int64] = field(repr=False)
    flipped: Floats = field(repr=False)
    interval: Floats
    replicates: Floats = field(repr=False)
    draws: str = field(repr=False)

    @property
    def fraction(self) -> Floats:
        """Fraction of the queries' retrained predictions that are flipped at each size, ``(S,)``."""
        return np.asarray(self.flipped.mean(axis=0))

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of queries at each size that most retrainings predict differently, ``(S,)``."""
        return np.asarray((self.flipped > 0.5).sum(axis=0))

    @property
    def smallest(self) -> NDArray[np.int64]:
        """Smallest size at which each query's prediction flips, ``(K,)``; −1 where none does."""
        flips = self.flipped > 0.5
        return np.where(flips.any(axis=1), self.sizes[flips.argmax(axis=1)], -1)

    def __str__(self) -> str:
        """Render the fractions with their intervals in one line."""
        steps = zip(self.sizes, self.fraction, self.interval, strict=True)
        text = ", ".join(f"{value:.2f}{bracketed(ends, '.2f')} at {size}" for size, value, ends in steps)
        return f"fraction of {len(self.queries)} queries flipped: {text}"


@dataclass(frozen=True, eq=False)
class RemovalDifference(EqualByValue):
    """Fraction flipped by one method's removals minus that of another's, at each size.

    Attributes:
        sizes: ``(S,)``.
        value: the differences, ``(S,)``.
        interval: their 95 % paired bootstrap intervals over queries, ``(S, 2)``.
    """

    sizes: NDArray[np.int64]
    value: Floats
    interval: Floats

    @property
    def significant(self) -> NDArray[np.bool_]:
        """Whether each interval excludes zero, ``(S,)``; False without a bootstrap."""
        return np.asarray((self.interval[:, 0] > 0) | (self.interval[:, 1] < 0))


def subset_removal(
    scores: ArrayLike,
    baseline: ArrayLike,
    train: TrainOne | TrainMany,
    sizes: Sequence[int],
    *,
    correct: ArrayLike | None = None,
    higher_is_better: bool | None = None,
    path: str | Path | None = None,
    retrainings: int = 1,
    group: int | None = None,
    executor: Executor | None = None,
    settings: Mapping[str, Any] | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> SubsetRemoval:
    """Remove each query's most helpful examples in growing numbers, retrain, and see whose prediction flips.

    Only examples that help are removed: a query with fewer of them than a size asks for loses those it has. The better
    the attribution, the fewer removals flip a prediction (Bae et al. 2024, https://arxiv.org/abs/2405.12186,
    section 5.2). Some predictions flip because models of other seeds differ: see :func:`random_same_class` for a
    baseline. Removals that coincide (of two queries, or of a query at two sizes) are retrained once.

    Args:
        scores: ``(Q, N)``; positive means that including the example raises the query's measurement.
        baseline: prediction of each query by the model trained on everything: numbers of classes, ``(Q,)``.
        train: the function that :meth:`GroundTruth.fill` takes, here one that returns predicted classes: without
            ``group`` ``train(kept, seed)`` trains on the examples ``kept`` and predicts all queries ``(Q,)``; with it,
            ``train(kept, seeds)`` trains a model for each pair and predicts ``(len(kept), Q)``.
        sizes: numbers of examples to remove, increasing.
        correct: ``(Q,)`` bool: queries to ask about, as a rule those predicted correctly, ``baseline == labels``;
            None for all.
        higher_is_better: whether a higher measurement is better; default: the scores' own attribute, else True.
        path: folder that keeps the predictions (a :class:`GroundTruth`): a killed run goes on from there. One folder
            serves one method and one list of sizes. None for a temporary one.
        retrainings: models trained for each removal, R.
        group: how many models one call of ``train`` trains; None for one by one.
        executor: calls ``train``; see :meth:`GroundTruth.fill`.
        settings: whatever else decides the predictions, JSON-able, kept in ``path``; other ones are refused.
        bootstrap: number of resamplings of the queries; 0 for none.
        seed: where the retrainings' seeds start, and seed of the resampling.
        progress: show a progress bar.

    Raises:
        TypeError: if baseline holds no numbers, or correct is not boolean.
        ValueError: for wrong dimensions, non-finite scores, a baseline of NaN, no query to ask about, or sizes that are
            not increasing or leave nothing.
        MismatchError: if baseline, correct or what train returns do not match the queries, or path holds another
            method's removals.
        SourceProjError: if path holds something else, or is damaged.

    Example:
        >>> def train(kept, seed):  # both queries are predicted right while examples 0 and 1 are both there
        ...     return [int({0, 1} <= set(kept.tolist()))] * 2
        >>> scores = np.array([[0.9, 0.8, 0.1, -0.5], [0.1, 0.2, 0.3, 0.4]])
        >>> subset_removal(scores, [1, 1], train, sizes=[1, 3]).fraction
        array([0.5, 1. ])
    """
    helpful = np.asarray(plain_numbers(scores), dtype=np.float64)
    base, steps = np.asarray(plain_numbers(baseline)), np.asarray(plain_numbers(sizes))
    _check(helpful, base, steps)
    steps = steps.astype(np.int64)
    queries = _asked(correct, len(base))
    if higher_is_better is None:
        higher_is_better = bool(getattr(scores, "higher_is_better", True))
    removed, masks, row = _removals(helpful if higher_is_better else -helpful, queries, steps)
    weights = bootstrap_weights(len(queries), bootstrap, seed)
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) / "removal" if path is None else path
        truth = GroundTruth.of_masks(where, masks, len(base), retrainings=retrainings, seed=seed, settings=settings)
        predicted = truth.fill(train, group=group, executor=executor, progress=progress).outcomes  # (masks, R, Q)
    own = predicted[row, :, queries[:, None]]  # (K, S, R): of each removal, its own query's prediction
    flipped = np.asarray((own != base[queries, None, None]).mean(axis=2))
    replicates = weights @ flipped / len(queries)
    return SubsetRemoval(
        sizes=steps,
        queries=queries,
        removed=removed,
        flipped=flipped,
        interval=_intervals(replicates),
        replicates=replicates,
        draws=hashlib.sha256(f"{queries.tolist()} {steps.tolist()} {bootstrap} {seed}".encode()).hexdigest(),
    )


def compare_removal(first: SubsetRemoval, second: SubsetRemoval) -> RemovalDifference:
    """Difference ``first − second`` of the fractions flipped, with paired bootstrap intervals over queries.

    Raises:
        MismatchError: if the two were not computed on the same queries and sizes with the same bootstrap and seed.
    """
    if first.draws != second.draws:
        raise MismatchError(
            f"these removals are not paired: {len(first.queries)} queries and sizes {first.sizes.tolist()} against "
            f"{len(second.queries)} and {second.sizes.tolist()}; use the same ones, and the same bootstrap and seed"
        )
    return RemovalDifference(
        first.sizes, first.fraction - second.fraction, _intervals(first.replicates - second.replicates)
    )


def random_same_class(train_labels: ArrayLike, query_labels: ArrayLike, *, seed: int = 0) -> Floats:
    """Scores ``(Q, N)`` that a method must beat: a random order of the examples of each query's own class.

    Positive for examples of the class, each query with an order of its own; 0 for all others.

    Raises:
        ValueError: if labels are not vectors or hold NaN, or a query's class has no training example.

    Example:
        >>> (random_same_class([0, 1, 1, 0], [1, 0]) > 0).astype(int)
        array([[0, 1, 1, 0],
               [1, 0, 0, 1]])
    """
    known, asked = np.asarray(plain_numbers(train_labels)), np.asarray(plain_numbers(query_labels))
    if known.ndim != 1 or asked.ndim != 1:
        raise ValueError(f"labels must be vectors, got shapes {known.shape} and {asked.shape}")
    for what, labels in (("train_labels", known), ("query_labels", asked)):
        missing = np.flatnonzero(labels != labels)  # NaN differs from itself, and is of no class
        if len(missing):
            raise ValueError(f"{what} hold {labels[missing[0]]} at place {missing[0]}: give each a class")
    same = asked[:, None] == known[None, :]  # (Q, N)
    alone = np.flatnonzero(~same.any(axis=1))
    if len(alone):
        raise ValueError(f"query {alone[0]} is of class {asked[alone[0]]}, of which there is no training example")
    order = np.random.default_rng(seed).permuted(np.tile(np.arange(1, len(known) + 1), (len(asked), 1)), axis=1)
    return np.where(same, order / len(known), 0.0)


def _removals(
    helpful: Floats, queries: NDArray[np.int64], sizes: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]:
    """How many are removed ``(K, S)``, the different masks ``(M, N)``, and which of them is whose ``(K, S)``."""
    own = helpful[queries]
    order = np.argsort(-own, axis=1, kind="stable")
    removed = np.minimum(sizes[None, :], (own > 0).sum(axis=1, keepdims=True))
    row = np.empty(removed.shape, dtype=np.int64)
    masks: list[NDArray[np.bool_]] = []
    known: dict[bytes, int] = {}
    for place, count in np.ndenumerate(removed):
        kept = np.ones(own.shape[1], dtype=bool)
        kept[order[place[0], :count]] = False
        row[place] = known.setdefault(np.packbits(kept).tobytes(), len(masks))
        if row[place] == len(masks):
            masks.append(kept)
    return removed, np.stack(masks), row


def _intervals(replicates: Floats) -> Floats:
    """95 % percentile intervals of replicates ``(B, S)``: ``(S, 2)``."""
    if len(replicates) == 0:
        return np.full((replicates.shape[1], 2), np.nan)
    return np.asarray(np.quantile(replicates, [0.025, 0.975], axis=0).T)


def _asked(correct: ArrayLike | None, count: int) -> NDArray[np.int64]:
    if correct is None:
        return np.arange(count)
    mask = np.asarray(plain_numbers(correct))
    if mask.dtype != np.bool_:
        raise TypeError(f"correct must be boolean, such as baseline == labels; got dtype {mask.dtype}")
    if mask.shape != (count,):
        raise MismatchError(f"correct must mark each query, shape ({count},), got {mask.shape}")
    if not mask.any():
        raise ValueError("correct marks no query: the model predicts none of them correctly")
    return np.flatnonzero(mask)


def _check(scores: Floats, baseline: NDArray[np.generic], sizes: NDArray[np.int64]) -> None:
    if scores.ndim != 2 or scores.size == 0:
        raise ValueError(f"scores must have shape (queries, examples), got shape {scores.shape}")
    bad = np.argwhere(~np.isfinite(scores))
    if len(bad):
        raise ValueError(f"scores hold {len(bad)} values that are not finite, the first at {tuple(bad[0].tolist())}")
    if baseline.shape != (len(scores),):
        raise MismatchError(
            f"baseline must hold one prediction per query, shape ({len(scores)},), got {baseline.shape}"
        )
    if not (np.issubdtype(baseline.dtype, np.number) or baseline.dtype == np.bool_):
        raise TypeError(f"baseline must hold numbers of classes, got dtype {baseline.dtype}")
    missing = np.flatnonzero(baseline != baseline)  # NaN, from which every prediction would differ
    if len(missing):
        raise ValueError(f"baseline holds no class for {len(missing)} queries, the first at place {missing[0]}")
    whole = sizes.ndim == 1 and sizes.size > 0 and np.issubdtype(sizes.dtype, np.integer)
    if not whole or sizes[0] < 1 or (sizes[1:] <= sizes[:-1]).any() or sizes[-1] >= scores.shape[1]:
        raise ValueError(
            f"sizes must be increasing whole numbers from 1 to {scores.shape[1] - 1} "
            f"(removing all examples leaves nothing to train on), got {sizes.tolist()}"
        )
