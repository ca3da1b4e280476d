"""How a bank is made: created whole, filled shard by shard, appended to."""

__all__ = []
