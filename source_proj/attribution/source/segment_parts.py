"""One run's share of the scores by segment of training."""

from collections.abc import Mapping

from torch import Tensor

from source_proj.attribution.source.fitted_segments import FittedSegments
from source_proj.attribution.source.query_propagator import QueryPropagator

__all__ = ["add_segment_parts"]


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
