"""The strongest training examples of each query."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Hits", "make_hits"]


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


def make_hits(
    indices: np.ndarray, scores: np.ndarray, train_ids: Sequence[Any], query_ids: Sequence[Any], unit: str
) -> Hits:
    """Attach ids and unit to the positions ``(Q, k)`` and scores ``(Q, k)`` of the strongest examples."""
    ids = [[train_ids[i] for i in row] for row in indices]
    return Hits(ids, scores, indices.astype(np.int64), list(query_ids), unit)
