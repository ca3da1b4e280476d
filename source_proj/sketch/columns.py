"""Blocks of a sketch's columns, each of which is a sketch itself.

Any k' columns of R, times √(k/k'), are a sketch of k' numbers. So a sketch of k numbers is B of k/B, whose scores can
be averaged: their errors are independent of each other. Ĥ is then block-diagonal, each of its B blocks times B,
which takes k² N/B operations and numbers instead of k² N, and k³/B² for its factors instead of k³.
"""

from itertools import pairwise
from typing import NamedTuple

from source_proj.sketch.sketch import Sketch

__all__ = ["Columns", "blocks_of", "default_blocks", "kept_blocks"]

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


def default_blocks(sketch: Sketch, *, few_rows: bool = False) -> int:
    """How many blocks a sketch's columns are taken as where nobody says: as few as have 4,096 columns at most.

    One where a column is a parameter, and where there are so few rows that no matrix of k x k is made.

    Example:
        >>> [default_blocks(Sketch(dim)) for dim in (512, 4096, 16384)]
        [1, 1, 4]
    """
    return 1 if sketch.is_exact or few_rows else -(-sketch.dim // _MOST)


def kept_blocks(sketch: Sketch) -> tuple[Columns, ...]:
    """The blocks of columns that have an Ĥ of their own where it is kept and the rows that it is of are not."""
    return blocks_of(sketch.dim, default_blocks(sketch))
