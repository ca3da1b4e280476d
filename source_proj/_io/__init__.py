"""Files that are whole or not there, hashes, and safe loading."""

__all__ = []
