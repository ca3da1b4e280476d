"""How a bank is read: its root, its parts, its stages' rows, the weights and metrics that it holds or refers to."""

__all__ = []
