"""Functions that users give, held to how they will be called before any work is done."""

import inspect
from typing import Any

__all__ = ["require_callable"]


def require_callable(function: Any, name: str, form: str) -> None:
    """Refuse what cannot be called with as many arguments as it will be.

    Args:
        function: what was given.
        name: of the argument.
        form: how it will be called, such as "train(kept, seed)".

    Raises:
        TypeError: names the argument, what was got and the form.

    Example:
        >>> require_callable(lambda kept: None, "train", "train(kept, seed)")
        Traceback (most recent call last):
        TypeError: train is called as train(kept, seed), and got <lambda>(kept): give a function that takes these
    """
    if not callable(function):
        raise TypeError(f"{name} must be a function {form}, got {type(function).__name__}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in functions tell none
        return
    names = form.partition("(")[2].rstrip(")").split(", ")
    try:
        signature.bind(*names)
    except TypeError:
        called = getattr(function, "__name__", type(function).__name__)
        raise TypeError(
            f"{name} is called as {form}, and got {called}{signature}: give a function that takes these"
        ) from None
