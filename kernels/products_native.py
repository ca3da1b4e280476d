"""Rank-one products and rows of many parameters of a batch, held until all are added in one call of compiled code.

Where an example is one step, each coordinate of a linear layer's gradient is the product of two numbers. Those that
meet in a column are listed, once for a set of parameters, so that a column's sum grows in registers, 16 examples at a
time, and is written once (`native_products.c`). A row of numbers, as a bias's gradient, is the product with one.

Measured on one core of a Zen 3 with AVX2, MLP 784-256-128-10 with k = 4,096: 0.6 ns a coordinate of 8 examples, where
products in lanes that are added to their columns take 4.3 (`sparse_native.py`).
"""

import ctypes
import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .native import PANEL, Addition, aligned_scratch, require_library, run_additions
from .small_rows import MOST_COORDINATES, Piece, columns_of

__all__ = ["HeldProducts", "held_nanoseconds"]

_MOST_ENTRIES = 1 << 13  # of factors at one time: 512 KB for a panel, the second-level cache
_MOST_PRODUCTS = 1 << 20  # coordinates of products in all: their list takes four bytes each
_MOST_COLUMNS = 1 << 16  # each is written for every panel
_FIRST = 3  # entries before those of factors: zero, one and minus one
_TOGETHER = 4  # pairs of a column come in so many
_PRODUCT = {16: 0.8, 8: 1.2, 4: 2.4}  # nanoseconds of a coordinate of a panel, by lanes


class _Listed(NamedTuple):
    """Pairs of entries, sorted by column.

    Attributes:
        pairs: int32, the places of two entries in its halves.
        starts: (k + 1,) int32, where each column's pairs begin.
    """

    pairs: Tensor
    starts: Tensor


class HeldProducts:
    """What is to be added to out (B, k) float32; tensors that were taken must not change until `finish_`."""

    def __init__(self, out: Tensor) -> None:
        self._out = out
        self._left: list[Tensor] = []
        self._right: list[Tensor] = []
        self._rows: list[Tensor] = []
        self._products: list[Piece] = []
        self._vectors: list[Piece] = []
        self._entries, self._coordinates = _FIRST, 0

    def takes_rows(self, rows: Tensor, piece: Piece) -> bool:
        """Keep rows (B, n) of a small parameter, of any floating-point type; False where it is not small."""
        if piece.size > MOST_COORDINATES or piece.dim > _MOST_COLUMNS:
            return False
        self._make_room(piece.size)
        self._rows.append(_contiguous(rows.float()))
        self._vectors.append(piece)
        return True

    def takes_product(self, left: Tensor, right: Tensor, piece: Piece) -> bool:
        """Keep left (x) right, for left (B, o) and right (B, i) float32; False where there are too many coordinates."""
        entries, coordinates = 2 * left.shape[1] + right.shape[1], self._coordinates + piece.size
        too_many = coordinates > _MOST_PRODUCTS or entries > _MOST_ENTRIES - _FIRST
        if too_many or piece.dim > _MOST_COLUMNS:
            return False
        self._make_room(entries)
        self._left.append(_contiguous(left))
        self._right.append(_contiguous(right))
        self._products.append(piece)
        self._coordinates = coordinates
        return True

    def finish_(self) -> None:
        """Add all that is kept."""
        run_additions(len(self._out), self.addition())

    def addition(self) -> Addition | None:
        """What adds all that is kept, and is not kept any more; None where there is nothing."""
        factors = [*self._left, *self._right, *self._rows]
        if not factors or not len(self._out):
            return None
        (batch, dim), doubled, out, entries = self._out.shape, len(self._left), self._out, self._entries
        shapes = tuple((x.shape[1], y.shape[1]) for x, y in zip(self._left, self._right, strict=True))
        listed = _listed(shapes, tuple(self._products), tuple(self._vectors), dim)
        pointers = (ctypes.c_void_p * len(factors))(*[x.data_ptr() for x in factors])
        strides = (ctypes.c_int64 * len(factors))(*[x.stride(0) for x in factors])
        counts = (ctypes.c_int64 * len(factors))(*[x.shape[1] for x in factors])

        def add(first: int, last: int) -> None:
            require_library().sp_products(
                out.data_ptr(),
                out.stride(0),
                aligned_scratch("products", PANEL * entries).data_ptr(),
                pointers,
                strides,
                counts,
                len(factors),
                doubled,
                first,
                last,
                listed.pairs.data_ptr(),
                listed.starts.data_ptr(),
                dim,
            )

        self._left, self._right, self._rows, self._products, self._vectors = [], [], [], [], []
        self._entries = _FIRST
        return Addition(add, _nanoseconds(batch, len(listed.pairs)))

    def _make_room(self, entries: int) -> None:
        if self._entries + entries > _MOST_ENTRIES:
            self.finish_()
        self._entries += entries


def held_nanoseconds(batch: int, o: int, i: int) -> float:
    """What the product of (o, i) coordinates costs."""
    return _nanoseconds(batch, o * i)


def _nanoseconds(batch: int, pairs: int) -> float:
    return -(-batch // PANEL) * pairs * _PRODUCT[require_library().sp_lanes()]


def _contiguous(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


@functools.lru_cache(maxsize=32)  # a pass over a batch asks for the same ones each time
def _listed(
    shapes: tuple[tuple[int, int], ...], products: tuple[Piece, ...], vectors: tuple[Piece, ...], dim: int
) -> _Listed:
    """The list for products of these shapes and vectors, whose factors lie as sp_products has them."""
    left, right = _FIRST, _FIRST + 2 * sum(o for o, _ in shapes)
    columns, pairs = [], []
    for (o, i), piece in zip(shapes, products, strict=True):
        column, negative = columns_of(piece)
        row, place = np.divmod(np.arange(o * i, dtype=np.uint32), np.uint32(i))
        columns.append(column)
        pairs.append((left + row + o * negative) << 16 | (right + place))
        left, right = left + 2 * o, right + i
    for piece in vectors:
        column, negative = columns_of(piece)
        columns.append(column)
        pairs.append((right + np.arange(piece.size)) << 16 | (1 + negative))
        right += piece.size
    return _sorted(np.concatenate(columns), np.concatenate(pairs), dim)


def _sorted(columns: np.ndarray, pairs: np.ndarray, dim: int) -> _Listed:
    order = np.argsort(columns.astype(np.uint16), kind="stable")  # columns of 16 bits are sorted by their digits
    counts = np.bincount(columns, minlength=dim)
    rounded = -(-counts // _TOGETHER) * _TOGETHER
    starts = np.concatenate([[0], np.cumsum(rounded)])
    listed = np.zeros(starts[-1], np.uint32)  # zero times zero, behind those of each column
    listed[np.arange(len(columns)) + np.repeat(starts[:-1] - np.cumsum(counts) + counts, counts)] = pairs[order]
    return _Listed(torch.from_numpy(listed.view(np.int32)), torch.from_numpy(starts.astype(np.int32)))
