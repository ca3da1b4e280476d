"""Launches the compiled kernels of the tensor map (`tensor_map.py`) by the cheaper of its two routes.

* outer: the kernels of the sparse map, which take a tensor map's tables as well (`sparse_native.py`);
* spectral: for k a power of two, one complex transform of length k for every step and one back, a group of examples
  interleaved as for the outer products (`native_spectral.c`).
"""

import functools
from math import log2

import torch
from torch import Tensor

from .native import NativeMap, aligned_scratch
from .sparse_native import (
    add_at_native_,
    add_native_,
    add_outer_native_,
    add_windows_native_,
    address,
    last_contiguous,
    loaded_library,
    sum_lanes_,
)
from .tensor_map import TensorMap

__all__ = [
    "add_tensor_at_native_",
    "add_tensor_native_",
    "add_tensor_outer_native_",
    "add_tensor_windows_native_",
    "spectral_is_cheaper",
]

_FEWEST, _MOST = 3, 16  # powers of two between which k has a transform here
_JOBS = 8  # that a large sum is split into, at least
_PART_STEPS = 16  # of a part at least: each transforms back once
# Nanoseconds for a group of lanes: a step of a transform for each k log2 k, for each entry of the factors, and to
# begin; a coordinate of an outer product, and each of its steps; the latter two for an example on its own
# (`sparse_native.py`).
# The first three were measured beside the others, on a busy machine, which slowed both alike.
_TRANSFORM, _ENTRY, _BEGIN = 0.6, 2.0, 1500.0
_COORDINATE, _STEP = 1.2, 0.17
_COORDINATE_ALONE, _STEP_ALONE = 0.35, 0.02


def spectral_is_cheaper(batch: int, steps: int, o: int, i: int, dim: int) -> bool:
    """Whether the transforms of so many steps cost less than the outer products of (o, i) coordinates."""
    if not has_transform(dim):
        return False
    groups, rest = divmod(batch, _width())
    group = (steps + 1) * _TRANSFORM * dim * log2(dim) + steps * (_BEGIN + _ENTRY * (o + i))
    laned = (_COORDINATE + _STEP * steps) * o * i
    alone = rest * (_COORDINATE_ALONE + _STEP_ALONE * steps) * o * i
    return (groups + bool(rest)) * group < groups * laned + min(laned, alone)


def has_transform(dim: int) -> bool:
    """Whether k is a power of two of the right size."""
    return dim & (dim - 1) == 0 and 1 << _FEWEST <= dim <= 1 << _MOST


def add_tensor_native_(out: Tensor, rows: Tensor, offset: int, matrix: TensorMap) -> None:
    """Add R[:, offset : offset + n] rows (B, n), coordinates of the parameter, to out (B, k)."""
    add_native_(out, rows, offset, _native(matrix))


def add_tensor_at_native_(out: Tensor, values: Tensor, examples: Tensor, index: Tensor, matrix: TensorMap) -> None:
    """Add R vec(e_index[r] (x) values[r]) to out[examples[r]] for every r."""
    add_at_native_(out, values, examples, matrix.offset + matrix.shape[1] * index, _native(matrix))


def add_tensor_outer_native_(
    out: Tensor, left: Tensor, right: Tensor, matrix: TensorMap, *, spectral: bool, scale: Tensor | None
) -> None:
    """Add R vec(sum_t left_t (x) right_t), for left (B, T, o) and right (B, T, i), to out (B, k)."""
    if not spectral:
        add_outer_native_(out, left, right, matrix.offset, _native(matrix), scale)
        return
    (steps, o), i, dim = left.shape[1:], right.shape[2], matrix.dim
    left, right, native = last_contiguous(left), last_contiguous(right), _native(matrix)
    step, work = -(-steps // _parts(len(left), steps)), _work(o, i, dim)

    def add(sums: Tensor, first: int, lanes: int, part: int) -> None:
        begin = min(steps, part * step)
        loaded_library().sp_spectral_lanes(
            sums.data_ptr(),
            aligned_scratch("spectral", work).data_ptr(),
            address(left, first, 0) + 4 * begin * left.stride(1),
            left.stride(0),
            left.stride(1),
            address(right, first, 0) + 4 * begin * right.stride(1),
            right.stride(0),
            right.stride(1),
            lanes,
            min(step, steps - begin),
            o,
            i,
            native,
            _twiddles(dim).data_ptr(),
        )

    sum_lanes_(out, -(-steps // step), 1, _nanoseconds(steps, dim), add)


def add_tensor_windows_native_(
    out: Tensor,
    left: Tensor,
    right: Tensor,
    taps: Tensor,
    windows: Tensor,
    matrix: TensorMap,
    *,
    spectral: bool,
    scale: Tensor | None,
) -> None:
    """Add R vec(G), G[b, o, c, j] = sum_l left[b, o, l] right[b, c, taps[j] + windows[l]], to out (B, k)."""
    if not spectral:
        add_windows_native_(out, left, right, taps, windows, matrix.offset, _native(matrix), scale)
        return
    (batch, o, count), (_, c, plane), dim, j = left.shape, right.shape, matrix.dim, len(taps)
    left, right, native = left.contiguous(), right.contiguous(), _native(matrix)
    taps, windows = taps.int().contiguous(), windows.int().contiguous()
    step = -(-count // _parts(batch, count))
    work = _work(o, c * j, dim) + (o * step + c * plane) * _width()

    def add(sums: Tensor, first: int, lanes: int, part: int) -> None:
        begin = min(count, part * step)
        loaded_library().sp_spectral_windows_lanes(
            sums.data_ptr(),
            aligned_scratch("spectral", work).data_ptr(),
            address(left, first, 0),
            left.stride(0),
            count,
            address(right, first, 0),
            right.stride(0),
            plane,
            taps.data_ptr(),
            windows.data_ptr(),
            lanes,
            o,
            begin,
            min(begin + step, count),
            c,
            j,
            native,
            _twiddles(dim).data_ptr(),
        )

    sum_lanes_(out, -(-count // step), 1, _nanoseconds(count, dim), add)


def _parts(batch: int, steps: int) -> int:
    """How many parts the steps are split into, by shapes alone."""
    groups = -(-batch // _width())
    return max(1, min(-(-_JOBS // groups), steps // _PART_STEPS))


def _work(o: int, i: int, dim: int) -> int:
    """Numbers of work space that the transforms of factors (o,) and (i,) take."""
    return (4 * dim + o + i + 3) * _width() + (-(-o // dim) - (-i // dim)) * dim


def _nanoseconds(steps: int, dim: int) -> float:
    return (steps + 1) * _TRANSFORM * dim * log2(dim) / 16


def _native(matrix: TensorMap) -> NativeMap:
    left, right = matrix.tables(torch.device("cpu"))
    return NativeMap(matrix.dim, offset=matrix.offset, left=left, right=right)


@functools.lru_cache(maxsize=16)
def _twiddles(dim: int) -> Tensor:
    """exp(-2 pi i t / k) for t < k, (k, 2) float32, each rounded once."""
    angles = torch.arange(dim, dtype=torch.float64) * (-2 * torch.pi / dim)
    return torch.stack([angles.cos(), angles.sin()], dim=1).float().contiguous()


def _width() -> int:
    lanes: int = loaded_library().sp_lanes()
    return lanes
