"""Equality of results that hold arrays, of which NumPy's own == is no single answer."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

__all__ = ["EqualByValue"]


class EqualByValue:
    """Base of data classes (with ``eq=False``): equal where their compared fields are, arrays number by number.

    Numbers that are not known (NaN) are the same in both.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True, eq=False)
        ... class Result(EqualByValue):
        ...     values: np.ndarray
        >>> Result(np.array([1.0, np.nan])) == Result(np.array([1.0, np.nan])), Result(np.ones(2)) == Result(np.ones(3))
        (True, False)
    """

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        compared = [field.name for field in fields(self) if field.compare]  # type: ignore[arg-type]
        return all(_is_same(getattr(self, name), getattr(other, name)) for name in compared)

    __hash__ = None  # type: ignore[assignment]


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):  # an interval of NaN
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        with_nan = all(np.asarray(side).dtype.kind in "fc" for side in (one, other))
        return np.array_equal(one, other, equal_nan=with_nan)
    return bool(one == other or (one != one and other != other))
