"""The sparse map applied: given rows, outer products, convolutions and scattered rows, on any backend.

`sparse_map.py` defines the matrix. Sums run in float32. The number of threads does not change a bit of them, nor, with
backend "torch", a split of batches.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .native import NativeMap
from .sparse_map import sparse_map
from .sparse_native import add_at_native_, add_native_, add_outer_native_, add_windows_native_
from .tiles import outer_tiles, scaled, window_columns

__all__ = ["sparse_add_", "sparse_add_at_", "sparse_add_outer_", "sparse_add_windows_"]

_CHUNK = 1 << 16  # coordinates whose columns and signs are held at once
_OUTER_TILE = 1 << 18  # numbers of the gradients of one tile


def sparse_add_(out: Tensor, rows: Tensor, offset: int, *, seed: int, nnz: int = 1, backend: str = "torch") -> None:
    """Add R[:, offset : offset + n] rows, for rows (B, n), to out (B, k), in place.

    Both are float32; backend "triton" takes rows of any floating-point type.
    """
    if backend == "triton":
        from .triton_sparse import add_rows_triton_

        add_rows_triton_(out, rows, offset, seed, nnz)
        return
    if backend == "native":
        add_native_(out, rows, offset, NativeMap(out.shape[1], seed, nnz))
        return
    _add_torch_(out, rows, offset, seed, nnz)


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
        add_at_native_(out, rows, examples, offsets, NativeMap(out.shape[1], seed, nnz))
        return
    if backend == "triton":
        from .triton_sparse import add_at_triton_

        add_at_triton_(out, rows, examples, offsets, seed, nnz)
        return
    for offset in torch.unique(offsets).tolist():
        here = offsets == offset
        sums = torch.zeros(int(here.sum()), out.shape[1], device=out.device, dtype=torch.float32)
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
        add_outer_native_(out, left, right, offset, NativeMap(out.shape[1], seed, nnz), scale)
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
        add_windows_native_(out, left, right, taps, windows, offset, NativeMap(out.shape[1], seed, nnz), scale)
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
