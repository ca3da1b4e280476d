"""Gradients of many small parameters, kept until they are added in one call.

A bias or a norm has so few coordinates that starting a kernel, or a walk through the rows of the output, costs more
than the sums. So their rows are put beside each other, with one table of columns and signs.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .sparse_map import sparse_map
from .tensor_map import TensorMap

__all__ = ["MOST_COORDINATES", "Piece", "SmallRows", "add_by_table_", "table_of"]

MOST_COORDINATES = 1 << 12  # of a small parameter
_NEGATIVE = np.uint32(1 << 31)
_GATHERED = 1 << 24  # numbers that are gathered at once


@dataclass(frozen=True)
class Piece:
    """Coordinates [start, start + count) of the sparse map of this size and seed, or of the tensor map of a parameter.

    Args:
        start: absolute coordinate of the first.
        count: how many.
        dim: columns, k.
        seed: which matrix.
        matrix: the tensor map of the parameter that they are of; None for the sparse map.
    """

    start: int
    count: int
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


@functools.lru_cache(maxsize=64)
def table_of(pieces: tuple[Piece, ...]) -> Tensor:
    """For each coordinate, int32: bits 0 to 30 are its column, bit 31 is set where its sign is -1."""
    packed = []
    for piece in pieces:
        stop = piece.start + piece.count
        if piece.matrix is None:
            columns, negative = sparse_map(piece.start, stop, dim=piece.dim, seed=piece.seed)
        else:
            columns, negative = piece.matrix.columns(piece.start, stop)
        packed.append(columns.astype(np.uint32) | np.where(negative, _NEGATIVE, np.uint32(0)))
    return torch.from_numpy(np.concatenate(packed).view(np.int32))


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
    table = table_of(pieces).numpy().view(np.uint32)
    columns = (table & ~_NEGATIVE).astype(np.int64)
    order = np.argsort(columns, kind="stable")
    counts = np.bincount(columns, minlength=dim)
    place = np.arange(len(columns)) - np.repeat(np.cumsum(counts) - counts, counts)
    index = np.full((int(counts.max()), dim), len(columns))
    index[place, columns[order]] = order
    signs = np.where(np.append(table, np.uint32(0))[index] & _NEGATIVE, np.float32(-1), np.float32(1))
    return torch.from_numpy(index).to(device), torch.from_numpy(signs).to(device)
