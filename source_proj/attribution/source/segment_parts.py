"""One run's share of the scores by segment of training."""

from collections.abc import Sequence

from torch import Tensor

from source_proj.attribution.source.fitted_segments import FittedSegments

__all__ = ["add_segment_parts"]


def add_segment_parts(
    values: Tensor, fitted: FittedSegments, queries: Sequence[Tensor], runs: int, rows: Tensor | None = None
) -> None:
    """Add one run's share of each segment's part to values.

    Args:
        values: ``(L, Q, n)``.
        fitted: the run's segments.
        queries: the queries as each segment meets them, each ``(Q, k)``.
        runs: the number of runs that scores are averaged over.
        rows: the n training examples that are wanted, ascending; default: all.

    Raises:
        ValueError: the run has another number of segments than values.
    """
    if len(fitted.segments) != len(values):
        raise ValueError(
            f"the runs of this ensemble have {len(values)} and {len(fitted.segments)} segments; pass segments= to make "
            "them comparable"
        )
    for part, segment, query in zip(values, fitted.segments, queries, strict=True):
        for start, stop, products in fitted.products(segment, query, rows):
            part[:, start:stop].add_(products.cpu(), alpha=-1 / (segment.n * runs))
