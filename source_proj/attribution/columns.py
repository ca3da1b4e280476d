"""Blocks of a sketch's columns, each of which is a sketch itself.

Any k' columns of R, times √(k/k'), are a sketch of k' numbers. So a sketch of k numbers is B of k/B, whose scores can
be averaged: their errors are independent of each other. Ĥ is then block-diagonal, each of its B blocks times B,
which takes k² N/B operations and numbers instead of k² N, and k³/B² for its factors instead of k³.
"""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from source_proj.attribution.spectral import Hessian, SpectralFunction
from source_proj.sketch import Sketch

__all__ = ["BlockHessian", "Columns", "blocks_of", "checked_blocks", "default_blocks"]

_MOST = 4096  # columns of a block, by default


class Columns(NamedTuple):
    """One of a sketch's blocks of columns.

    Attributes:
        start: its first column.
        stop: its end.
        dim: the sketch's k.

    Example:
        >>> [(columns.start, columns.stop, columns.scale) for columns in blocks_of(8, 2)]
        [(0, 4, 2.0), (4, 8, 2.0)]
    """

    start: int
    stop: int
    dim: int

    @property
    def width(self) -> int:
        """Number k' of its columns."""
        return self.stop - self.start

    @property
    def scale(self) -> float:
        """k/k', what products of two of its rows are times."""
        return self.dim / self.width

    @property
    def slice(self) -> slice:
        """Its columns, as an index."""
        return slice(self.start, self.stop)


def blocks_of(dim: int, count: int) -> tuple[Columns, ...]:
    """Cut k columns into blocks, of which no two differ by more than a column."""
    ends = [dim * index // count for index in range(count + 1)]
    return tuple(Columns(start, stop, dim) for start, stop in pairwise(ends))


def default_blocks(sketch: Sketch, *, few_rows: bool) -> int:
    """How many blocks a sketch's columns are taken as where nobody says: as few as have 4,096 columns at most.

    One where a column is a parameter, and where there are so few rows that no matrix of k x k is made.

    Example:
        >>> [default_blocks(Sketch(dim), few_rows=False) for dim in (512, 4096, 16384)]
        [1, 1, 4]
    """
    return 1 if sketch.is_exact or few_rows else -(-sketch.dim // _MOST)


def checked_blocks(blocks: int | None, sketches: Iterable[Sketch]) -> int | None:
    """Return into how many blocks columns are to be cut, as an int; None is the default.

    Args:
        blocks: what the user gave; integers of NumPy do.
        sketches: whose columns.

    Raises:
        TypeError: it is no integer.
        ValueError: it is not in 1..k, or more than one of an exact sketch.
    """
    if blocks is None:
        return None
    try:
        count = operator.index(blocks)
    except TypeError:
        raise TypeError(f"blocks must be an integer, got {blocks!r}") from None
    for sketch in sketches:
        if isinstance(blocks, bool) or not 1 <= count <= sketch.dim:
            raise ValueError(f"blocks must lie in 1..{sketch.dim}, the sketch's columns, got {blocks}")
        if count > 1 and sketch.is_exact:
            raise ValueError(
                f"blocks={count} takes a sketch as several, and an exact one has a column a parameter: leave it out"
            )
    return count


@dataclass(frozen=True)
class BlockHessian:
    """Ĥ of several blocks of columns, each a sketch's own; what a block has of Ĥ is times k/k'.

    Attributes:
        blocks: the columns.
        hessians: Ĥ of each.

    Example:
        >>> from source_proj.attribution.spectral import Spectrum, ridge_inverse
        >>> halves = [Spectrum(torch.ones(1) * value, torch.eye(1)) for value in (1.0, 3.0)]
        >>> BlockHessian(blocks_of(2, 2), halves).multiply(torch.ones(1, 2), ridge_inverse(1.0, 2))
        tensor([[0.5000, 0.2500]])
    """

    blocks: Sequence[Columns]
    hessians: Sequence[Hessian]

    @property
    def dim(self) -> int:
        """The size k of the space."""
        return self.blocks[0].dim

    @property
    def trace(self) -> float:
        """tr(Ĥ) of the whole sketch, to which each block adds what its own columns have of it."""
        pairs = zip(self.blocks, self.hessians, strict=True)
        return sum(hessian.trace / columns.scale for columns, hessian in pairs)

    def multiply(self, rows: Tensor, function: SpectralFunction) -> Tensor:
        """Return ``rows @ f(Ĥ)``, ``(n, k)``."""
        pairs = zip(self.blocks, self.hessians, strict=True)
        moved = [hessian.multiply(rows[:, columns.slice], function) for columns, hessian in pairs]
        types = [part.dtype for part in moved]
        widest = torch.float64 if torch.float64 in types else types[0]
        return torch.cat([part.to(widest) for part in moved], dim=1)

    def apply(self, function: SpectralFunction) -> Tensor:
        """Return the matrix f(Ĥ), ``(k, k)``, zero outside its blocks."""
        matrix: Tensor = torch.block_diag(*(hessian.apply(function).double() for hessian in self.hessians))
        return matrix

    def effective_dimension(self, ridge: float) -> float:
        """Tr Ĥ(Ĥ + λ)⁻¹, for λ > 0, the mean over the blocks."""
        return sum(hessian.effective_dimension(ridge) for hessian in self.hessians) / len(self.hessians)
