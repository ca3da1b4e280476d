"""TensorSketch of one matrix parameter: a coordinate's column is the sum of a column of its row and one of its column.

For a parameter of shape (o, i) at an absolute offset, with Philox under the key of the seed:

* its two sides have seeds of their own: words w0..w3 of counter (low offset, high offset, 0, ``TAG_SIDES``) make
  w0 | w1 << 32 for the first axis and w2 | w3 << 32 for the second;
* h(e), the column of entry e of a side: the rank of e among the k entries of its block e // k by the 64-bit word
  w0 | w1 << 32 of counter (low e, high e, 0, ``TAG_RANK``) under the side's seed, equal words in their order; so every
  block is a random permutation of [0, k), and a last, short one is injective;
* s(e), its sign: that of coordinate e in the sparse map (`sparse_map.py`) of the side's seed;
* coordinate offset + r i + c has the column (h_1(r) + h_2(c)) mod k and the sign s_1(r) s_2(c).

Then the sketch of an outer product is the circular convolution of its factors' sketches, and row r of a matrix is, with
its entries in the order of h_2, one run of k columns that begins at h_1(r) and goes around. Pham and Pagh, "Fast and
scalable polynomial kernels via explicit feature maps" (KDD 2013).

Two coordinates of one row, or of one column, within a block never meet; others do with probability 1/(k - 1). (Affine
permutations would not do: their sums collide along diagonals.)
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .philox import philox4x32
from .sparse_map import signs_negative

__all__ = ["SPLITS", "TAG_RANK", "TAG_SIDES", "TensorMap"]

SPLITS = {1024: (32, 32), 2048: (32, 64), 4096: (64, 64), 8192: (64, 128)}
"""Each k whose halves one kernel of `triton_spectral` transforms, and the two factors that it does so by."""

TAG_SIDES = 0x53494445
TAG_RANK = 0x52414E4B

_WORD = 0xFFFFFFFF
_NEGATIVE = np.uint32(1 << 31)
_HALF = np.uint64(32)


class TensorMap(NamedTuple):
    """The part of a tensor sketch's matrix that belongs to one parameter.

    Attributes:
        dim: columns, k.
        seed: which matrix.
        offset: absolute coordinate of the parameter's first entry.
        shape: (o, i); further axes are to be joined with the second.

    >>> matrix = TensorMap(dim=8, seed=0, offset=100, shape=(3, 5))
    >>> columns, negative = matrix.columns(100 + 5, 100 + 10)  # the second row
    >>> len(set(columns.tolist()))
    5
    """

    dim: int
    seed: int
    offset: int
    shape: tuple[int, int]

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """For each row (o,) and each column (i,), int32: bits 0 to 30 are h(e), bit 31 is set where s(e) is -1."""
        left, right = _side_seeds(self.seed, self.offset)
        o, i = self.shape
        return _table(o, self.dim, left, str(device)), _table(i, self.dim, right, str(device))

    def columns(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Columns, and whether the sign is -1, of the absolute coordinates [start, stop) of the parameter."""
        row, column = np.divmod(np.arange(start - self.offset, stop - self.offset), self.shape[1])
        left, right = (table.numpy().view(np.uint32) for table in self.tables(torch.device("cpu")))
        sums = (left[row] & ~_NEGATIVE).astype(np.int64) + (right[column] & ~_NEGATIVE)
        return sums % self.dim, ((left[row] ^ right[column]) & _NEGATIVE) != 0

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Cut [start, stop) into ranges no two coordinates of which meet: pieces of rows that lie in one block."""
        while start < stop:
            column = (start - self.offset) % self.shape[1]
            end = min(stop, start + min(self.shape[1] - column, self.dim - column % self.dim))
            yield start, end
            start = end


@functools.lru_cache(maxsize=1 << 13)
def _side_seeds(seed: int, offset: int) -> tuple[int, int]:
    words = [int(word) for word in philox4x32(offset & _WORD, offset >> 32, 0, TAG_SIDES, seed=seed)]
    return words[0] | words[1] << 32, words[2] | words[3] << 32


@functools.lru_cache(maxsize=1 << 13)  # a layer asks for the same ones at every batch
def _table(count: int, dim: int, seed: int, device: str) -> Tensor:
    columns = np.concatenate([_permutation(start, dim, seed) for start in range(0, count, dim)])[:count]
    packed = columns.astype(np.uint32) | np.where(signs_negative(0, count, seed), _NEGATIVE, np.uint32(0))
    return torch.from_numpy(packed.view(np.int32)).to(device)


def _permutation(start: int, dim: int, seed: int) -> NDArray[np.int64]:
    entries = np.arange(start, start + dim, dtype=np.uint64)
    words = philox4x32(entries & np.uint64(_WORD), entries >> _HALF, 0, TAG_RANK, seed=seed).astype(np.uint64)
    order = np.argsort(words[:, 0] | words[:, 1] << _HALF, kind="stable")
    ranks = np.empty(dim, np.int64)
    ranks[order] = np.arange(dim)
    return ranks
