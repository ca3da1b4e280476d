"""Gradients of many small parameters, kept until they are added in one call.

A bias or a norm has so few coordinates that starting a kernel, or a walk through the rows of the output, costs more
than the sums. So their rows are put beside each other, with one table of columns and signs.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .sparse_map import sparse_map
from .tensor_map import TensorMap

__all__ = ["MOST_COORDINATES", "Piece", "SmallRows", "add_by_table_", "columns_of"]

MOST_COORDINATES = 1 << 12  # of a small parameter
_GATHERED = 1 << 24  # numbers that are gathered at once


class Piece(NamedTuple):
    """Coordinates [start, start + size) of the sparse map of this size and seed, or of the tensor map of a parameter.

    Attributes:
        start: absolute coordinate of the first.
        size: how many.
        dim: columns, k.
        seed: which matrix.
        matrix: the tensor map of the parameter that they are of; None for the sparse map.
    """

    start: int
    size: int
    dim: int
    seed: int
    matrix: TensorMap | None = None


class SmallRows:
    """Rows (B, n) of small parameters, with what defines their part of the matrix."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._pieces: list[Piece] = []

    def __len__(self) -> int:
        """How many numbers are kept."""
        return sum(rows.numel() for rows in self._rows)

    def take(self, rows: Tensor, piece: Piece) -> None:
        """Keep rows (B, n) of any floating-point type; they must not change until they are given away."""
        self._rows.append(rows)
        self._pieces.append(piece)

    def give(self) -> tuple[Tensor, tuple[Piece, ...]] | None:
        """All rows beside each other (B, sum of n) float32, and their pieces; None where there are none."""
        if not self._rows:
            return None
        rows, pieces = torch.cat([rows.float() for rows in self._rows], dim=1), tuple(self._pieces)
        self._rows, self._pieces = [], []
        return rows, pieces


def columns_of(piece: Piece) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Columns, and whether the sign is -1, of a piece's coordinates."""
    stop = piece.start + piece.size
    if piece.matrix is None:
        return sparse_map(piece.start, stop, dim=piece.dim, seed=piece.seed)
    return piece.matrix.columns(piece.start, stop)


def add_by_table_(out: Tensor, rows: Tensor, pieces: tuple[Piece, ...]) -> None:
    """Add the sketch of rows (B, n) float32 to out (B, k), in place, on any device and always in the same order."""
    index, signs = _by_column(pieces, out.shape[1], str(out.device))
    padded = torch.nn.functional.pad(rows, (0, 1))  # a zero, for columns that hold fewer coordinates
    step = max(1, _GATHERED // index.numel())
    for start in range(0, len(out), step):
        some = slice(start, start + step)
        out[some] += (padded[some, index.flatten()].unflatten(1, index.shape) * signs).sum(1)


@functools.lru_cache(maxsize=64)
def _by_column(pieces: tuple[Piece, ...], dim: int, device: str) -> tuple[Tensor, Tensor]:
    """Index (J, k) of the coordinates in each column, the number of them where there are fewer; and signs (J, k)."""
    columns, negative = (np.concatenate(parts) for parts in zip(*map(columns_of, pieces), strict=True))
    order = np.argsort(columns, kind="stable")
    counts = np.bincount(columns, minlength=dim)
    place = np.arange(len(columns)) - np.repeat(np.cumsum(counts) - counts, counts)
    index = np.full((int(counts.max()), dim), len(columns))
    index[place, columns[order]] = order
    signs = np.where(np.append(negative, False)[index], np.float32(-1), np.float32(1))
    return torch.from_numpy(index).to(device), torch.from_numpy(signs).to(device)
