"""Rows in memory that is used again, as fresh memory costs more than a small model's sketches."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["RowMemory"]

_KEPT, _MOST_KEPT = 2, 1 << 22  # pieces of memory, and their numbers at most


class RowMemory:
    """Zeros on any device; on a CPU in the memory of rows that it gave before and nobody holds any more.

    The allocator may give a batch's memory back to the system when its rows are let go, and the next batch then pays
    for every page of it: 64 rows of 4,096 cost as much as the forward pass of a small network.

    Example:
        >>> memory = RowMemory()
        >>> first = memory.zeros(2, 3, torch.device("cpu"))
        >>> address, part = first.data_ptr(), first[1]
        >>> del first
        >>> memory.zeros(2, 3, torch.device("cpu")).data_ptr() == address  # a part is still held
        False
    """

    def __init__(self) -> None:
        self._kept: list[tuple[NDArray[np.float32], weakref.ref[Any]]] = []

    def zeros(self, size: int, dim: int, device: torch.device) -> Tensor:
        """(size, dim) float32."""
        if device.type != "cpu" or not 0 < size * dim <= _MOST_KEPT:
            return torch.zeros(size, dim, device=device, dtype=torch.float32)
        fits = [n for n, (own, lent) in enumerate(self._kept) if own.shape == (size, dim) and lent() is None]
        own = self._kept.pop(fits[0])[0] if fits else np.empty((size, dim), np.float32)
        lent = own.view()  # the tensor's storage holds it, and whatever shares that storage
        rows = torch.from_numpy(lent).zero_()
        self._kept = [(own, weakref.ref(lent)), *self._kept][:_KEPT]
        return rows
