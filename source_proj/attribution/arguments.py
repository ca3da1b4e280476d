"""Numbers among a method's options, checked when it is made and not when it is first asked."""

from __future__ import annotations

import math
import numbers
from typing import Any

__all__ = ["checked_number"]


def checked_number(
    name: str, given: Any, *, above: float = -math.inf, least: float = -math.inf, hint: str = ""
) -> float:
    """A finite real number within its bounds, as a float; NumPy's do.

    Args:
        name: the option's.
        given: what the user gave.
        above: it is larger than this,
        least: and no smaller than this.
        hint: what else may be given, or an example, for the message.

    Raises:
        TypeError: it is no number.
        ValueError: it is not finite, or out of bounds.

    Example:
        >>> checked_number("ridge", 1, least=0)
        1.0
    """
    bound = f" > {above:g}" if above > -math.inf else f" >= {least:g}" if least > -math.inf else ""
    message = f"{name} must be {hint and f'{hint} or '}a number{bound}, got {given!r}"
    if isinstance(given, bool) or not isinstance(given, numbers.Real):
        raise TypeError(message)
    try:
        number = float(given)
    except OverflowError:
        raise ValueError(message) from None
    if not (math.isfinite(number) and number > above and number >= least):
        raise ValueError(message)
    return number
