"""SOURCE: fitted segments, a query carried back through them, and the verbs."""

from source_proj.attribution.source.fitted_segments import Segment
from source_proj.attribution.source.source import SegmentScores, Source

__all__ = ["Segment", "SegmentScores", "Source"]
