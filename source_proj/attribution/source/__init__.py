"""SOURCE: fitted segments, a query carried back through them, and the verbs."""

from source_proj.attribution.source.segments import Segment
from source_proj.attribution.source.source import Source

__all__ = ["Segment", "Source"]
