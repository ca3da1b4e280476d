"""Subsets of training examples as users name them: by ids, or by a mask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["Subset", "TrainingIds"]

Subset = Sequence[Any] | np.ndarray | torch.Tensor
"""Ids, or a boolean mask ``(N,)``."""


class TrainingIds:
    """The ids of N training examples (or of groups of them), and the positions of those that a subset names.

    Args:
        ids: N ids.

    Raises:
        ValueError: one stands there twice.
        TypeError: one is not hashable.
    """

    def __init__(self, ids: Sequence[Any]) -> None:
        self._ids = ids
        self._positions: dict[Any, int] = {}
        for position, train_id in enumerate(ids):
            try:
                first = self._positions.setdefault(train_id, position)
            except TypeError:
                raise TypeError(f"training ids are hashable (numbers, strings, tuples), got {train_id!r}") from None
            if first != position:
                raise ValueError(
                    f"training ids name one example each, and {train_id!r} stands at places {first} and {position}"
                )

    def positions(self, subset: Subset) -> np.ndarray:
        """Where the examples of a subset are, ``(n,)`` int64.

        Raises:
            ValueError: a mask has another shape; or ids are unknown or repeated.
            TypeError: it is neither.
        """
        chosen, count = _ids_or_mask(subset), len(self._ids)
        if isinstance(chosen, np.ndarray):
            if chosen.shape != (count,):
                raise ValueError(f"a mask must have shape ({count},), got {chosen.shape}")
            return np.flatnonzero(chosen)
        try:
            unknown = [train_id for train_id in chosen if train_id not in self._positions]
        except TypeError as error:
            raise TypeError(f"training ids are hashable (numbers, strings, tuples), got {chosen[:5]}") from error
        if unknown:
            raise ValueError(f"unknown training ids {unknown[:5]}; the first known ones are {list(self._ids[:5])}")
        if len(set(chosen)) != len(chosen):
            raise ValueError("a subset must name each training id once; some are repeated")
        return np.array([self._positions[train_id] for train_id in chosen], dtype=np.int64)


def _ids_or_mask(subset: Subset) -> list[Any] | np.ndarray:
    """Return a subset's ids as a list, or its mask as an array.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(subset, torch.Tensor):
        subset = subset.detach().cpu().numpy()
    if isinstance(subset, np.ndarray):
        if subset.dtype == bool:
            return subset
        subset = subset.tolist()
    # The letters of a string, or the keys of a mapping, could pass for ids.
    if isinstance(subset, (str, bytes, Mapping)) or not isinstance(subset, Iterable):
        raise TypeError(
            f"a subset is a sequence of training ids, or a boolean mask, got {subset!r}: give one id as [{subset!r}]"
        )
    chosen = [
        entry.item() if isinstance(entry, np.bool_) or (isinstance(entry, torch.Tensor) and entry.ndim == 0) else entry
        for entry in subset
    ]
    flags = [isinstance(entry, bool) for entry in chosen]
    if not any(flags):
        return chosen
    if not all(flags):  # True would pass for the id 1
        raise TypeError(f"a subset holds training ids, or is a boolean mask; this one mixes both: {chosen[:5]}")
    return np.array(chosen, dtype=bool)
