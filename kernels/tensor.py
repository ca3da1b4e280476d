"""The tensor map applied: gradients of one matrix parameter, given or as outer products, windows or scattered rows.

`tensor_map.py` defines the matrix. Two routes give the same numbers but for rounding: *outer* makes the coordinates of
the product and maps them; *spectral* convolves the two factors' sketches in the frequency domain and never makes the
product, O(o + i + k log k) a step in place of O(o i). Unless one is asked for, shapes and device choose the cheaper.
"""

import numpy as np
import torch
from torch import Tensor

from .tensor_held import is_spectral
from .tensor_map import TensorMap
from .tensor_native import (
    add_tensor_at_native_,
    add_tensor_native_,
    add_tensor_outer_native_,
    add_tensor_windows_native_,
    spectral_is_cheaper,
)
from .tensor_spectral import TorchSpectra, columns_of
from .tiles import outer_tiles, scaled

__all__ = ["tensor_add_", "tensor_add_at_", "tensor_add_outer_", "tensor_add_windows_"]

_CHUNK = 1 << 16  # coordinates whose columns and signs are held at once
_OUTER_TILE = 1 << 18  # numbers of the gradients of one tile


def tensor_add_(out: Tensor, rows: Tensor, offset: int, matrix: TensorMap, *, backend: str = "torch") -> None:
    """Add R[:, offset : offset + n] rows (B, n), coordinates of the map's parameter, to out (B, k), in place.

    Both are float32; backend "triton" takes rows of any floating-point type.
    """
    if backend == "native":
        add_tensor_native_(out, rows, offset, matrix)
    elif backend == "triton":
        from .triton_tensor import add_tensor_triton_

        add_tensor_triton_(out, rows, offset, matrix)
    else:
        _add_reference_(out, rows, offset, matrix, ordered=out.device.type == "cpu")


def tensor_add_at_(
    out: Tensor, values: Tensor, examples: Tensor, index: Tensor, matrix: TensorMap, *, backend: str = "torch"
) -> None:
    """Add R vec(e_index[r] (x) values[r]) to out[examples[r]] for every row r of values (M, i) float32, in place."""
    if backend == "native":
        add_tensor_at_native_(out, values, examples, index, matrix)
        return
    if backend == "triton":
        from .triton_tensor import add_tensor_at_triton_

        add_tensor_at_triton_(out, values, examples, index, matrix)
        return
    for row in torch.unique(index).tolist():
        here = index == row
        sums = torch.zeros(int(here.sum()), matrix.dim, device=out.device, dtype=torch.float32)
        tensor_add_(sums, values[here], matrix.offset + row * matrix.shape[1], matrix, backend=backend)
        out.index_add_(0, examples[here], sums)


def tensor_add_outer_(
    out: Tensor,
    left: Tensor,
    right: Tensor,
    matrix: TensorMap,
    *,
    backend: str = "torch",
    scale: Tensor | None = None,
    spectral: bool | None = None,
) -> None:
    """Add R D vec(sum_t left_t (x) right_t), left (B, T, o) and right (B, T, i), to out (B, k), in place.

    Both are float32; backend "triton" also takes them in half precision.

    Args:
        out: where to add.
        left: factors of the parameter's first axis.
        right: factors of its second axis.
        matrix: the map of the parameter.
        backend: "native", "triton" or "torch".
        scale: (o i,) float32, contiguous, the diagonal of D; None for ones. Only the outer route knows it.
        spectral: the route; None for the cheaper one.
    """
    if spectral is None:
        spectral = scale is None and is_spectral(backend, left, right.shape[2], matrix.dim)
    if backend == "native":
        add_tensor_outer_native_(out, left, right, matrix, spectral=spectral, scale=scale)
    elif spectral:
        spectra = TorchSpectra(out, backend)
        spectra.add_outer(left, right, matrix)
        spectra.finish_()
    elif backend == "triton":
        from .triton_tensor import add_tensor_outer_triton_

        add_tensor_outer_triton_(out, left, right, matrix, scale)
    else:
        for some, start, tile in outer_tiles(left, right, _OUTER_TILE):
            tensor_add_(out[some], scaled(tile, start, scale), matrix.offset + start, matrix, backend=backend)


def tensor_add_windows_(
    out: Tensor,
    left: Tensor,
    right: Tensor,
    taps: Tensor,
    windows: Tensor,
    matrix: TensorMap,
    *,
    backend: str = "torch",
    scale: Tensor | None = None,
    spectral: bool | None = None,
) -> None:
    """Add R D vec(G), G[b, o, c, j] = sum_l left[b, o, l] right[b, c, taps[j] + windows[l]], to out (B, k), in place.

    For left (B, o, L), right (B, c, plane), taps (J,) and windows (L,), the matrix of shape (o, c J); the rest as in
    `tensor_add_outer_`.
    """
    if backend == "native":
        if spectral is None:
            (batch, o, count), i = left.shape, matrix.shape[1]
            spectral = scale is None and spectral_is_cheaper(batch, count, o, i, matrix.dim, windows=True)
        add_tensor_windows_native_(out, left, right, taps, windows, matrix, spectral=spectral, scale=scale)
        return
    for some, columns in columns_of(right, taps, windows, backend):
        turned = left[some].transpose(1, 2)
        tensor_add_outer_(out[some], turned, columns, matrix, backend=backend, scale=scale, spectral=spectral)


def _add_reference_(out: Tensor, rows: Tensor, offset: int, matrix: TensorMap, *, ordered: bool) -> None:
    """The reference: torch alone, on any device; ordered says that scatter_add_ adds one element after the other."""
    end = offset + rows.shape[1]
    # Elsewhere a chunk holds no two coordinates that meet, so no order of sums is left open.
    chunks = ((start, min(start + _CHUNK, end)) for start in range(offset, end, _CHUNK))
    for start, stop in chunks if ordered else matrix.runs(offset, end):
        columns, negative = matrix.columns(start, stop)
        index = torch.from_numpy(columns).to(out.device)
        signs = torch.from_numpy(np.where(negative, np.float32(-1), np.float32(1))).to(out.device)
        values = rows[:, start - offset : stop - offset] * signs
        if ordered:
            out.scatter_add_(1, index.expand(values.shape), values)
        else:
            out[:, index] += values
