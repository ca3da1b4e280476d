"""What users give where numbers are wanted: tensors from anywhere, and whole numbers of any library."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

__all__ = ["all_finite", "plain_numbers", "whole_number"]

_NUMPYS_OWN = (torch.float16, torch.float32, torch.float64)


def all_finite(tensor: Tensor) -> bool:
    """Whether no number is infinite or NaN; by the extremes, which takes no memory.

    Example:
        >>> all_finite(torch.tensor([1.0, torch.nan, 0.0])), all_finite(torch.zeros(0))
        (False, True)
    """
    return not tensor.numel() or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def plain_numbers(given: Any) -> Any:
    """What NumPy takes: tensors, also in lists and tuples, come without gradients, to the CPU, in a type that it knows.

    Raises:
        TypeError: numbers are complex, of which NumPy would drop the imaginary part.

    Example:
        >>> import numpy as np
        >>> np.asarray(plain_numbers([torch.ones(2, dtype=torch.bfloat16, requires_grad=True), [1, 2]]))
        array([[1., 1.],
               [1., 2.]])
    """
    if _is_complex(given):
        raise TypeError(f"real numbers are wanted, got complex ones, {given!r:.60}: give their .real, or abs() of them")
    if isinstance(given, Tensor):
        value = given.detach().cpu().resolve_conj().resolve_neg()
        return (value.float() if value.is_floating_point() and value.dtype not in _NUMPYS_OWN else value).numpy()
    if isinstance(given, list | tuple):
        return [plain_numbers(part) for part in given]
    return given


def _is_complex(given: Any) -> bool:
    """Whether it holds complex numbers, as far as its type says."""
    if isinstance(given, Tensor):
        return given.is_complex()
    return isinstance(given, complex) or getattr(getattr(given, "dtype", None), "kind", "") == "c"


def whole_number(given: Any, name: str, *, least: int | None = None) -> int:
    """A whole number as an int; those of NumPy and torch do.

    Args:
        given: what the user gave.
        name: the user's name for it.
        least: the smallest that it may be.

    Raises:
        TypeError: it is none, such as 2.0.
        ValueError: it is smaller than the least.

    Example:
        >>> import numpy as np
        >>> whole_number(np.int64(3), "count")
        3
    """
    try:
        number = operator.index(given)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {given!r}: give an int") from None
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {given!r}")
    return number
