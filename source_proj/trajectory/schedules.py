"""What changes from update to update, such as the learning rate: a function, or a number for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set
from typing import Any

__all__ = ["finite_rate", "schedule_function"]


def finite_rate(value: Any) -> float | None:
    """A number that is finite and at least 0, of Python, NumPy or torch; None for all else.

    >>> finite_rate(0.5), finite_rate([0.5]), finite_rate("0.5"), finite_rate(-1)
    (0.5, None, None, None)
    """
    try:
        number = float("nan" if isinstance(value, str) else value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several
        return None
    return number if 0 <= number < math.inf else None


def schedule_function(name: str, schedule: Any, updates: range, largest: float) -> Callable[[int], float]:
    """A schedule as a checked function of the update's number.

    Args:
        name: what an error calls it.
        schedule: a function of the update's number, or one value for each of the updates.
        updates: their numbers.
        largest: that a value may be.

    Raises:
        TypeError: it is neither.
        ValueError: there are more or fewer values than updates; or, when it is called, a value is out of range.
    """
    function: Callable[[int], object] = schedule if callable(schedule) else _values(name, schedule, updates)

    def checked(step: int) -> float:
        value = function(step)
        rate = finite_rate(value)
        if rate is None or rate > largest:
            bound = "" if largest == math.inf else f" and at most {largest:g}"
            raise ValueError(f"{name} gives {value!r} for update {step}: must be finite and at least 0{bound}")
        return rate

    return checked


def _values(name: str, schedule: Any, updates: range) -> Callable[[int], object]:
    remedy = "give a function of the update's number (lambda step: 0.1), or one value for each update"
    if isinstance(schedule, str | Mapping | Set):  # of a mapping or a set, list() would take what are no rates
        raise TypeError(f"{name} is {schedule!r}: {remedy}")
    try:
        values = list(schedule)
    except TypeError:
        raise TypeError(f"{name} is {schedule!r}: {remedy}") from None
    if len(values) != len(updates):
        raise ValueError(
            f"{name} has {len(values)} entries for the {len(updates)} optimizer steps {updates.start} to "
            f"{updates.stop}: give one each"
        )
    return lambda step: values[step - updates.start]
