"""Recording a run while it trains: the recorder, and the files that it writes."""

__all__ = []
