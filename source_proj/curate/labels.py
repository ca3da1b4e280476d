"""Labels of examples and groups of queries, as names and numbers of classes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from source_proj._errors import MismatchError
from source_proj.attribution.words import id_word

__all__ = ["Labels", "classes_of", "named_column"]

Labels = Sequence[Any] | np.ndarray | Tensor
"""A label of each training example."""


def classes_of(
    labels: Labels, count: int, *, what: str = "labels", of: str = "training examples"
) -> tuple[list[Any], np.ndarray]:
    """Names of the classes, and the number of each example's class ``(N,)`` int64.

    Args:
        labels: a name for each example: a number, a text, a tuple.
        count: how many examples there are, N.
        what: what the labels are called where they are refused.
        of: what they are labels of.

    Returns:
        The names in sorted order; in that of their first examples where names of several types have none.

    Raises:
        MismatchError: labels are not one for each example.
        TypeError: they are a whole data set.
        ValueError: a label is missing (NaN, None), or a row of several numbers.

    Example:
        >>> classes_of(["b", "a", "b"], 3)
        (['a', 'b'], array([1, 0, 1]))
    """
    if isinstance(labels, Dataset | DataLoader):
        raise TypeError(
            f"{what} are one name for each, got a {type(labels).__name__} of {of}: give the names alone, such as "
            "[int(label) for _, label in data]"
        )
    given = [_name(label, place, what) for place, label in enumerate(labels)]
    if len(given) != count:
        raise MismatchError(f"got {len(given)} {what} for {count} {of}: give one for each")
    names = list(dict.fromkeys(given))
    with contextlib.suppress(TypeError):
        names = sorted(names)
    number = {name: position for position, name in enumerate(names)}
    return names, np.array([number[name] for name in given], dtype=np.int64)


def named_column(names: Sequence[Any]) -> np.ndarray:
    """Names as a column that a file can hold: tuples, dates and the like are words, and all are where one is.

    Example:
        >>> named_column([1, 2]).tolist(), named_column([("a", 1), ("b",)]).tolist()
        ([1, 2], ['a/1', 'b'])
    """
    return np.asarray([name if isinstance(name, str | int | float) else str(id_word(name)) for name in names])


def _name(label: Any, place: int, what: str) -> Any:
    if getattr(label, "ndim", 0) or isinstance(label, list | dict | set):
        shown = str(label.tolist() if hasattr(label, "tolist") else label)
        raise ValueError(
            f"{what} are one name for each, got {shown[:60]} at place {place}: give a column as x[:, 0], or as "
            "[row['label'] for row in data], and the classes of one-hot rows as x.argmax(1)"
        )
    name = label.item() if hasattr(label, "item") else label
    if _is_missing(name):  # every NaN would be a class of its own, as none equals another
        raise ValueError(f"{what} hold {name} at place {place}: leave it out, or give those that have none a name")
    return name


def _is_missing(name: Any) -> bool:
    try:
        return name is None or bool(name != name)  # NaN and NaT alone differ from themselves
    except TypeError:  # pandas.NA says neither
        return True
