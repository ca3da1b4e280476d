"""Block-permutation CountSketch: every coordinate goes, with a random sign, to one of k columns.

The matrix is a pure function of (seed, coordinate, copy). Write i for the absolute coordinate and b = i // k for its
block. For copy j < nnz, with Philox under the key of the seed:

* sign: counter (low i//128, high i//128, j, ``TAG_SIGN``), bit i % 128 of the 128; a set bit means -1;
* permutation of block b: for t = 0, 1, ... counter (low b, high b, j | t << 16, ``TAG_PERM``) gives w0..w3,
  a = (w0 | w1 << 32) mod k and c = (w2 | w3 << 32) mod k; the first t with gcd(a, k) = 1 is taken;
* column of i: (a (i mod k) + c) mod k; value: sign / sqrt(nnz).

Within a block no two coordinates share a column, also in a last, short block, as the map is affine with a unit
multiplier. Charikar, Chen and Farach-Colton, "Finding frequent items in data streams" (2002), is the unblocked case.
Sums run in float32. The number of threads does not change a bit of them, nor, with backend "torch", a split of batches.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .philox import philox4x32, sign_bits
from .sparse_native import add_at_native_, add_native_, add_outer_native_, add_windows_native_
from .tiles import outer_tiles, scaled, window_columns

__all__ = [
    "TAG_PERM",
    "TAG_SIGN",
    "permutations",
    "sparse_add_",
    "sparse_add_at_",
    "sparse_add_outer_",
    "sparse_add_windows_",
    "sparse_map",
]

TAG_SIGN = 0x5349474E
TAG_PERM = 0x5045524D

_WORD = 0xFFFFFFFF
_CHUNK = 1 << 16  # coordinates whose columns and signs are held at once
_OUTER_TILE = 1 << 18  # numbers of the gradients of one tile


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
    return columns, _negative(start, stop, seed, copy)


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


def _negative(start: int, stop: int, seed: int, copy: int) -> NDArray[np.bool_]:
    group = np.arange(start // 128, (stop - 1) // 128 + 1, dtype=np.uint64)
    words = philox4x32(group & np.uint64(_WORD), group >> np.uint64(32), copy, TAG_SIGN, seed=seed)
    skip = start % 128
    return sign_bits(words).reshape(-1)[skip : skip + stop - start].astype(np.bool_)


def sparse_add_(out: Tensor, rows: Tensor, offset: int, *, seed: int, nnz: int = 1, backend: str = "torch") -> None:
    """Add R[:, offset : offset + n] rows, for rows (B, n), to out (B, k), in place.

    Both are float32; backend "triton" takes rows of any floating-point type.
    """
    if backend == "triton":
        from .triton_sparse import add_rows_triton_

        add_rows_triton_(out, rows, offset, seed, nnz)
        return
    add = add_native_ if backend == "native" else _add_torch_
    add(out, rows, offset, seed, nnz)


def sparse_add_at_(
    out: Tensor,
    rows: Tensor,
    examples: Tensor,
    offsets: Tensor,
    *,
    seed: int,
    nnz: int = 1,
    backend: str = "torch",
) -> None:
    """Add R[:, offsets[r] : offsets[r] + n] rows[r] to out[examples[r]] for every row r of rows (M, n), in place."""
    if backend == "native":
        add_at_native_(out, rows, examples, offsets, seed, nnz)
        return
    if backend == "triton":
        from .triton_sparse import add_at_triton_

        add_at_triton_(out, rows, examples, offsets, seed, nnz)
        return
    for offset in torch.unique(offsets).tolist():
        here = offsets == offset
        sums = torch.zeros(int(here.sum()), out.shape[1], device=out.device)
        _add_torch_(sums, rows[here], offset, seed, nnz)
        out.index_add_(0, examples[here], sums)


def sparse_add_outer_(
    out: Tensor,
    left: Tensor,
    right: Tensor,
    offset: int,
    *,
    seed: int,
    nnz: int = 1,
    backend: str = "torch",
    scale: Tensor | None = None,
) -> None:
    """Add R vec(sum_t left_t (x) right_t), left (B, T, o) and right (B, T, i), to out (B, k), in place.

    All are float32; backend "triton" also takes left and right in half precision. With scale (o i,), contiguous, each
    coordinate counts times its entry.
    """
    if backend == "native":
        add_outer_native_(out, left, right, offset, seed, nnz, scale)
        return
    if backend == "triton":
        from .triton_outer import add_outer_triton_

        add_outer_triton_(out, left, right, offset, seed, nnz, scale)
        return
    for some, start, tile in outer_tiles(left, right, _OUTER_TILE):
        sparse_add_(out[some], scaled(tile, start, scale), offset + start, seed=seed, nnz=nnz, backend=backend)


def sparse_add_windows_(
    out: Tensor,
    left: Tensor,
    right: Tensor,
    taps: Tensor,
    windows: Tensor,
    offset: int,
    *,
    seed: int,
    nnz: int = 1,
    backend: str = "torch",
    scale: Tensor | None = None,
) -> None:
    """Add R vec(G), G[b, o, c, j] = sum_l left[b, o, l] right[b, c, taps[j] + windows[l]], to out (B, k), in place.

    For left (B, o, L) and right (B, c, plane), float32 (with backend "triton" also in half precision), and integer
    taps (J,) and windows (L,). With scale (o c J,), contiguous, each coordinate counts times its entry.
    """
    if backend == "native":
        add_windows_native_(out, left, right, taps, windows, offset, seed, nnz, scale)
        return
    if backend == "triton":
        from .triton_outer import add_windows_triton_

        add_windows_triton_(out, left, right, taps, windows, offset, seed, nnz, scale)
        return
    for some, columns in window_columns(right, taps, windows):
        turned = left[some].transpose(1, 2)
        sparse_add_outer_(out[some], turned, columns, offset, seed=seed, nnz=nnz, backend=backend, scale=scale)


def _add_torch_(out: Tensor, rows: Tensor, offset: int, seed: int, nnz: int) -> None:
    _add_reference_(out, rows, offset, seed, nnz, ordered=out.device.type == "cpu")


def _add_reference_(out: Tensor, rows: Tensor, offset: int, seed: int, nnz: int, *, ordered: bool) -> None:
    """The reference: torch alone, on any device; ordered says that scatter_add_ adds one element after the other."""
    dim = out.shape[1]
    scale = np.float32(nnz**-0.5)
    # Elsewhere a chunk stays within one block: no two of its coordinates meet, so no order of sums is left open.
    step = _CHUNK if ordered else min(_CHUNK, dim)
    for start, stop in _chunks(offset, offset + rows.shape[1], dim, step):
        piece = rows[:, start - offset : stop - offset]
        for copy in range(nnz):
            columns, negative = sparse_map(start, stop, dim=dim, seed=seed, copy=copy)
            index = torch.from_numpy(columns).to(out.device)
            values = piece * torch.from_numpy(np.where(negative, -scale, scale)).to(out.device)
            if ordered:
                out.scatter_add_(1, index.expand(values.shape), values)
            else:
                out[:, index] += values


def _chunks(start: int, end: int, dim: int, step: int) -> Iterator[tuple[int, int]]:
    """Cut [start, end) into ranges of at most step coordinates, at block borders where a block fits into a step."""
    while start < end:
        border = (start + step) // dim * dim
        stop = min(border if border > start else start + step, end)
        yield start, stop
        start = stop
