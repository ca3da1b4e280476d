"""From a bank to scores: queries, curvature, SOURCE and the other methods."""

__all__ = []
