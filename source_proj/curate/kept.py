"""Data sets in memory: the kept examples of one, or new columns for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Subset

from source_proj._errors import MismatchError

__all__ = ["annotate", "take"]


def take(data: Any, kept: np.ndarray, n: int, split: str) -> Any:
    """The examples at some positions, as the same kind of data set where that can be.

    Args:
        data: the data set.
        kept: positions, int64.
        n: how many examples the data set must have.
        split: the split to take from where it has several.

    Raises:
        MismatchError: it has another number of examples.
    """
    if isinstance(data, Mapping):
        return _with_split(data, split, take(_split(data, split), kept, n, split))
    if isinstance(data, DataLoader):
        return take(data.dataset, kept, n, split)
    _require_size(data, n)
    if hasattr(data, "select") and hasattr(data, "add_column"):  # datasets.Dataset
        return data.select(kept.tolist())
    if hasattr(data, "iloc"):  # pandas
        return data.iloc[kept]
    if isinstance(data, list):
        return [data[position] for position in kept.tolist()]
    return Subset(data, kept.tolist())


def annotate(data: Any, columns: Mapping[str, list[Any]], n: int, split: str) -> Any:
    """The data set with new columns.

    Raises:
        MismatchError: it has another number of examples.
        ValueError: it has one of the columns already.
        TypeError: it has no columns.
    """
    if isinstance(data, Mapping):
        return _with_split(data, split, annotate(_split(data, split), columns, n, split))
    _require_size(data, n)
    names = getattr(data, "column_names", None)
    if names is None and hasattr(data, "iloc"):
        names = list(getattr(data, "columns", [])) or None  # a series has none
    if names is None:
        raise TypeError(f"{type(data).__name__} has no columns: give a datasets.Dataset or a pandas frame")
    require_new(columns, names)
    if hasattr(data, "iloc"):
        return data.assign(**columns)
    for name, column in columns.items():
        data = data.add_column(name, column)
    return data


def require_new(columns: Mapping[str, Any], names: list[str]) -> None:
    """Refuse to put a column where one is.

    Raises:
        ValueError: names it.
    """
    taken = [name for name in columns if name in names]
    if taken:
        raise ValueError(f"the data set has a column {taken[0]!r} already: rename it before it is annotated")


def _split(data: Mapping[str, Any], split: str) -> Any:
    if split not in data:
        raise ValueError(f"there is no split {split!r} among {list(data)}: name the training set's by split=")
    return data[split]


def _with_split(data: Mapping[str, Any], split: str, new: Any) -> Any:
    kind: Any = type(data)
    return kind({**data, split: new})


def _require_size(data: Any, n: int) -> None:
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise TypeError(
            f"examples are taken by their positions, which a {type(data).__name__} has none of: give a list, a frame, "
            "a datasets.Dataset or a map-style data set"
        )
    if len(data) != n:
        raise MismatchError(
            f"the data set has {len(data)} examples and the training set of the bank {n}: give the data set that the "
            "bank was built from"
        )
