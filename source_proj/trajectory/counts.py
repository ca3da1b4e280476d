"""Whole numbers as people give them: Python's and NumPy's alike, checked where they come in."""

from __future__ import annotations

from operator import index

__all__ = ["checked_count"]


def checked_count(name: str, value: object, least: int) -> int:
    """A whole number as an int.

    Raises:
        ValueError: it is none, or too small.
    """
    try:
        count = None if isinstance(value, bool) else index(value)  # type: ignore[arg-type]
    except TypeError:
        count = None
    if count is None or count < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return count
