"""Scores split over the segments of training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from source_proj.attribution.source.fitted_segments import FittedSegments
from source_proj.attribution.source.segments import Segment

__all__ = ["SegmentScores", "add_segment_parts"]


@dataclass(frozen=True)
class SegmentScores:
    """The parts of each score by segment of training: who mattered when.

    Attributes:
        values: ``(L, Q, N)`` float32; their sum over segments is the score. An example has part only in the segments
            of its own stage; elsewhere its value is 0.
        segments: what the L segments are.
        query_ids: Q ids.
        train_ids: N ids.
        unit: unit of the measurement.
    """

    values: np.ndarray
    segments: tuple[Segment, ...]
    query_ids: list[Any]
    train_ids: list[Any]
    unit: str

    def total(self) -> np.ndarray:
        """Sum over the segments: the scores ``(Q, N)``."""
        total: np.ndarray = self.values.sum(axis=0)
        return total


def add_segment_parts(values: Tensor, fitted: FittedSegments, queries: Sequence[Tensor], runs: int) -> None:
    """Add one run's share of each segment's part to values.

    Args:
        values: ``(L, Q, N)``.
        fitted: the run's segments.
        queries: the queries as each segment meets them, each ``(Q, k)``.
        runs: the number of runs that scores are averaged over.

    Raises:
        ValueError: the run has another number of segments than values.
    """
    if len(fitted.segments) != len(values):
        raise ValueError(
            f"the runs of this ensemble have {len(values)} and {len(fitted.segments)} segments; pass segments= to make "
            "them comparable"
        )
    for part, segment, query in zip(values, fitted.segments, queries, strict=True):
        for operand in fitted.rows(segment):
            products = operand.codec.multiply(query, operand.rows, operand.scale).cpu()
            part[:, operand.start : operand.stop].add_(products, alpha=-1 / (segment.n * runs))
