"""Block-permutation CountSketch: every coordinate goes, with a random sign, to one of k columns.

The matrix is a pure function of (seed, coordinate, copy). Write i for the absolute coordinate and b = i // k for its
block. For copy j < nnz, with Philox under the key of the seed:

* sign: counter (low i//128, high i//128, j, ``TAG_SIGN``), bit i % 128 of the 128; a set bit means -1;
* permutation of block b: for t = 0, 1, ... counter (low b, high b, j | t << 16, ``TAG_PERM``) gives w0..w3,
  a = (w0 | w1 << 32) mod k and c = (w2 | w3 << 32) mod k; the first t with gcd(a, k) = 1 is taken;
* column of i: (a (i mod k) + c) mod k; value: sign / sqrt(nnz).

Within a block no two coordinates share a column, also in a last, short block, as the map is affine with a unit
multiplier. Charikar, Chen and Farach-Colton, "Finding frequent items in data streams" (2002), is the unblocked case.
"""

import numpy as np
from numpy.typing import NDArray

from .philox import philox4x32, sign_bits

__all__ = ["TAG_PERM", "TAG_SIGN", "permutations", "signs_negative", "sparse_map"]

TAG_SIGN = 0x5349474E
TAG_PERM = 0x5045524D

_WORD = 0xFFFFFFFF


def sparse_map(
    start: int, stop: int, *, dim: int, seed: int, copy: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Columns, and whether the sign is -1, of the coordinates [start, stop) for one copy.

    >>> columns, negative = sparse_map(10, 15, dim=5, seed=0)
    >>> sorted(columns.tolist())  # coordinates 10 to 14 are one whole block of five
    [0, 1, 2, 3, 4]
    """
    if stop <= start:
        return np.empty(0, np.int64), np.empty(0, np.bool_)
    first = start // dim
    multiplier, shift = permutations(first, (stop - 1) // dim + 1, dim, seed, copy)
    coordinates = np.arange(start, stop, dtype=np.int64)
    block, position = np.divmod(coordinates, dim)
    columns = (multiplier[block - first] * position + shift[block - first]) % dim
    return columns, signs_negative(start, stop, seed, copy)


def permutations(first: int, last: int, dim: int, seed: int, copy: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Multiplier and shift of the blocks [first, last): one draw after the other until the multiplier is a unit."""
    blocks = np.arange(first, last, dtype=np.uint64)
    multiplier = np.empty(blocks.size, np.int64)
    shift = np.empty(blocks.size, np.int64)
    open_ = np.arange(blocks.size)
    attempt = 0
    while open_.size:
        low, high = blocks[open_] & np.uint64(_WORD), blocks[open_] >> np.uint64(32)
        words = philox4x32(low, high, copy | attempt << 16, TAG_PERM, seed=seed).astype(np.uint64)
        a = ((words[:, 0] | words[:, 1] << np.uint64(32)) % np.uint64(dim)).astype(np.int64)
        c = ((words[:, 2] | words[:, 3] << np.uint64(32)) % np.uint64(dim)).astype(np.int64)
        unit = np.gcd(a, dim) == 1
        multiplier[open_[unit]], shift[open_[unit]] = a[unit], c[unit]
        open_ = open_[~unit]
        attempt += 1
    return multiplier, shift


def signs_negative(start: int, stop: int, seed: int, copy: int = 0) -> NDArray[np.bool_]:
    """Whether the sign is -1, of the coordinates [start, stop) for one copy."""
    group = np.arange(start // 128, (stop - 1) // 128 + 1, dtype=np.uint64)
    words = philox4x32(group & np.uint64(_WORD), group >> np.uint64(32), copy, TAG_SIGN, seed=seed)
    skip = start % 128
    return sign_bits(words).reshape(-1)[skip : skip + stop - start].astype(np.bool_)
