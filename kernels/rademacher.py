"""Dense Rademacher matrix: k x d entries +-1/sqrt(k), made tile by tile when they are needed and never kept.

The sign of entry (column c, coordinate i) is bit c % 128 of the 128 bits of Philox counter
(low i, high i, c // 128, tag) under the key of the seed; a set bit means -1. Other tags give other matrices.
Achlioptas, "Database-friendly random projections" (2003).

float32 rows are multiplied and summed in float32. Measured against float64, 2^18 coordinates, normal or heavy-tailed
(log-normal sizes), k = 256: an error of 9e-6 of a row's norm. fast-jl rounds entries to half precision (`fast_jl.py`),
which alone makes 2e-4.
"""

import numpy as np
import torch
from torch import Tensor

from .native import native_library, share_rows
from .philox import philox4x32, sign_bits

__all__ = ["TAG_DENSE", "rademacher_add_", "sign_tile"]

TAG_DENSE = 0x44454E53

_WORD = np.uint64(0xFFFFFFFF)
_TILE = 1 << 20  # entries of the matrix that are held at once


def sign_tile(
    start: int,
    stop: int,
    count: int,
    *,
    seed: int,
    tag: int = TAG_DENSE,
    backend: str = "torch",
    device: torch.device | str = "cpu",
) -> Tensor:
    """Signs of the coordinates [start, stop) in columns [0, count): (stop - start, count) float32, each 1 or -1."""
    if backend == "triton":
        from .triton_rademacher import sign_tile_triton

        return sign_tile_triton(start, stop, count, seed, tag, torch.device(device))
    if backend == "native":
        return _sign_tile_native(start, stop, count, seed, tag).to(device)
    coordinates = np.arange(start, stop, dtype=np.uint64)[:, None]
    words = np.arange(-(-count // 128), dtype=np.uint64)
    random = philox4x32(coordinates & _WORD, coordinates >> np.uint64(32), words, tag, seed=seed)
    bits = sign_bits(random.reshape(stop - start, 4 * words.size))[:, :count]
    return torch.from_numpy(1 - 2 * bits.astype(np.float32)).to(device)


def _sign_tile_native(start: int, stop: int, count: int, seed: int, tag: int) -> Tensor:
    library, rows = native_library(), stop - start
    if library is None:
        raise RuntimeError("the compiled kernels are not there; use backend 'torch'")
    tile = torch.empty(rows, count, dtype=torch.float32, device="cpu")

    def fill(first: int, last: int) -> None:
        library.sp_signs(tile[first].data_ptr(), start + first, last - first, count, seed, tag)

    if rows:
        share_rows(rows, fill, 0.1 * tile.numel())
    return tile


def rademacher_add_(out: Tensor, rows: Tensor, offset: int, *, seed: int, backend: str = "torch") -> None:
    """Add R[:, offset : offset + n] rows, for rows (B, n), to out (B, k); both float32, in place.

    Backend "triton" takes rows of any floating-point type.
    """
    if backend == "triton":
        from .triton_rademacher import add_dense_triton_

        add_dense_triton_(out, rows, offset, seed, TAG_DENSE)
        return
    dim = out.shape[1]
    step = max(_TILE // dim, 1)
    for start in range(0, rows.shape[1], step):
        piece = rows[:, start : start + step]
        signs = sign_tile(
            offset + start, offset + start + piece.shape[1], dim, seed=seed, backend=backend, device=out.device
        )
        out.addmm_(piece, signs, alpha=dim**-0.5)
