"""The strongest training examples of each query."""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Hits", "checked_count", "make_hits"]


@dataclass(frozen=True)
class Hits:
    """The strongest training examples of each query, best first.

    Attributes:
        ids: ids of the examples, Q lists of k entries.
        scores: their scores, ``(Q, k)`` float32.
        indices: their positions in the training set, ``(Q, k)`` int64.
        query_ids: ids of the queries, Q entries.
        unit: unit of the scores.
    """

    ids: list[list[Any]]
    scores: np.ndarray
    indices: np.ndarray
    query_ids: list[Any]
    unit: str

    def __iter__(self) -> Iterator[tuple[Any, list[tuple[Any, float]]]]:
        """Yield ``(query id, [(training id, score), ...])`` for each query."""
        for query_id, ids, scores in zip(self.query_ids, self.ids, self.scores, strict=True):
            yield query_id, [(train_id, float(score)) for train_id, score in zip(ids, scores, strict=True)]

    def __len__(self) -> int:
        return len(self.query_ids)


def checked_count(k: Any, n: int) -> int:
    """Return k, the number of training examples wanted of n, as an int.

    Raises:
        TypeError: it is no integer; NumPy's and torch's are some.
        ValueError: it lies outside of 1..n.
    """
    try:
        count = operator.index(k)
    except TypeError:
        raise TypeError(f"k must be an integer, the number of training examples wanted, got {k!r}") from None
    if isinstance(k, bool) or not 1 <= count <= n:
        raise ValueError(f"k must lie in 1..{n} (the number of training examples), got {k!r}")
    return count


def make_hits(
    indices: np.ndarray, scores: np.ndarray, train_ids: Sequence[Any], query_ids: Sequence[Any], unit: str
) -> Hits:
    """Attach ids and unit to the positions ``(Q, k)`` and scores ``(Q, k)`` of the strongest examples."""
    ids = [[train_ids[i] for i in row] for row in indices]
    return Hits(ids, scores, indices.astype(np.int64), list(query_ids), unit)
