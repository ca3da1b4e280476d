"""Scores split over the segments of training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from source_proj.attribution.source.fitted_segments import FittedSegments
from source_proj.attribution.source.query_propagator import QueryPropagator
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


def add_segment_parts(values: Tensor, fitted: FittedSegments, queries: Mapping[int, Tensor], runs: int) -> None:
    """Add one run's share of each segment's part to values.

    Args:
        values: ``(L, Q, N)``.
        fitted: the run's segments.
        queries: the queries' sketches ``(Q, k)`` by metric.
        runs: the number of runs that scores are averaged over.

    Raises:
        ValueError: the run has another number of segments than values.
    """
    segments = fitted.segments
    if len(segments) != len(values):
        raise ValueError(
            f"the runs of this ensemble have {len(values)} and {len(segments)} segments; pass segments= to make "
            "them comparable"
        )
    for index, carried in fitted.walk_back(segments, QueryPropagator.of(queries)):
        (query,) = (rows.float() for rows in carried.values())
        for operand in fitted.mean_gradients(segments[index]):
            part = (query @ operand.rows.T).cpu()
            values[index, :, operand.start : operand.stop].add_(part, alpha=-1 / (segments[index].n * runs))
