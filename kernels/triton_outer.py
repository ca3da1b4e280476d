"""Gradients of layers into the sparse map on GPUs (needs triton): the vendor's product in tiles, then one kernel.

A weight's gradient, sum_t left_t (x) right_t, is made for many examples and some rows of the weight at a time, in a
buffer of bounded size, from which the kernel for given rows reads it once. A kernel that multiplied, signed and
permuted at one go, with its tiles in the second-level cache, was measured on an H100 and given up: its products ran at
a quarter of the vendor's rate, whose detour over main memory costs 8 bytes a coordinate, 3 ns for a thousand.

A single step (T = 1) needs no product: the kernel multiplies two numbers for each coordinate, and nothing is written.
Convolutions get their columns from a kernel here, of a type as narrow as the input's.

Products of half precision are summed and written in float32. Those of float32 follow torch's setting for all of them
(`torch.set_float32_matmul_precision`), full precision by default.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
import functools
from collections.abc import Iterator

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import factors_of_one_type, outer_tiles
from .triton_device import ceil_div, interpreted, on_device
from .triton_sparse import MOST_COLUMNS, add_rank_one_triton_, add_rows_triton_

__all__ = ["add_outer_triton_", "add_windows_triton_", "window_columns_triton"]

_FEWEST, _MOST = 1 << 26, 1 << 27  # numbers of a tile of gradients: below, launches take the time
_LEAST_ROWS = 256  # of a weight in a tile: products of fewer are slow
_COLUMNS = 1 << 26  # numbers of the columns of a convolution that are held at once
_MOST_ONCE = 1 << 31  # coordinates that 32 bits can count


def add_outer_triton_(
    out: Tensor, left: Tensor, right: Tensor, offset: int, seed: int, nnz: int, scale: Tensor | None = None
) -> None:
    """Add R vec(sum_t left_t (x) right_t), left (B, T, o) and right (B, T, i) of any strides, to out (B, k) float32.

    With scale (o i,) float32, contiguous, each coordinate counts times its entry.
    """
    if left.shape[1] == 1 and left.shape[2] * right.shape[2] < _MOST_ONCE and out.shape[1] <= MOST_COLUMNS:
        add_rank_one_triton_(out, left[:, 0], right[:, 0], offset, seed, nnz, scale)
        return
    # A tile is as large as the factors, so that memory stays of their order.
    elements = min(max(left.numel() + right.numel(), _FEWEST), _MOST)
    for some, start, tile in outer_tiles(*factors_of_one_type(left, right), elements, _LEAST_ROWS):
        own = None if scale is None else scale[start : start + tile.shape[1]]
        add_rows_triton_(out[some], tile, offset + start, seed, nnz, own)


def add_windows_triton_(
    out: Tensor, left: Tensor, right: Tensor, taps: Tensor, windows: Tensor, offset: int, seed: int, nnz: int,
    scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Add R vec(G), G[b, o, c, j] = sum_l left[b, o, l] right[b, c, taps[j] + windows[l]], to out (B, k) float32.

    With scale (o c J,) float32, contiguous, each coordinate counts times its entry.
    """
    left, right = factors_of_one_type(left, right)
    for some, columns in window_columns_triton(right, taps, windows):
        add_outer_triton_(out[some], left[some].transpose(1, 2), columns, offset, seed, nnz, scale)


def window_columns_triton(right: Tensor, taps: Tensor, windows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some examples, and their columns right[b, c, taps[j] + windows[l]] as (b, L, C J)."""
    batch, channels, _ = right.shape
    tap, window = _places(_bytes(taps), _bytes(windows), str(right.device))
    step = max(1, _COLUMNS // (channels * len(tap) * len(window)))
    for b in range(0, batch, step):
        part = right[b : b + step]
        made = right.new_empty(len(part), channels * len(tap), len(window))
        _fill_columns(made, part, tap, window)
        yield slice(b, b + len(part)), made.transpose(1, 2)


def _bytes(index: Tensor) -> bytes:
    return index.to("cpu", torch.int64).numpy().tobytes()


@functools.lru_cache(maxsize=256)
def _places(taps: bytes, windows: bytes, device: str) -> tuple[Tensor, Tensor]:
    """Taps (J,) and windows (L,) on the device: kept, as a layer asks for them at every batch."""
    tap, window = (np.frombuffer(index, np.int64) for index in (taps, windows))
    return torch.tensor(tap, dtype=torch.int64, device=device), torch.tensor(window, dtype=torch.int64, device=device)


@triton.jit
def _columns_kernel(
    made, right, taps, windows, channels, n_taps, count, batch_stride, channel_stride, stride,
    CHANNELS: tl.constexpr, TAPS: tl.constexpr, WINDOWS: tl.constexpr,
):  # fmt: skip
    """Some channels of one example: n_taps rows of count numbers for each."""
    example = tl.program_id(0).to(tl.int64)
    flat = tl.arange(0, CHANNELS * TAPS)
    channel, tap = tl.program_id(1) * CHANNELS + flat // TAPS, flat % TAPS
    window = tl.program_id(2) * WINDOWS + tl.arange(0, WINDOWS)
    known, there = (channel < channels) & (tap < n_taps), window < count
    first = example * batch_stride + channel * channel_stride + tl.load(taps + tap, mask=tap < n_taps, other=0) * stride
    place = first[:, None] + (tl.load(windows + window, mask=there, other=0) * stride)[None, :]
    both = known[:, None] & there[None, :]
    row = (example * channels + channel) * n_taps + tap
    tl.store(made + row[:, None] * count + window[None, :], tl.load(right + place, mask=both, other=0.0), mask=both)


@on_device
def _fill_columns(made: Tensor, right: Tensor, taps: Tensor, windows: Tensor) -> None:
    batch, channels, _ = right.shape
    tile = 1 << 16 if interpreted() else 4096  # the interpreter's time goes by programs
    across = min(tile, triton.next_power_of_2(len(windows)))
    down = triton.next_power_of_2(len(taps))
    together = max(1, min(tile // across // down, triton.next_power_of_2(channels)))
    _columns_kernel[(batch, ceil_div(channels, together), ceil_div(len(windows), across))](
        made, right, taps, windows, channels, len(taps), len(windows), *right.stride(), CHANNELS=together, TAPS=down,
        WINDOWS=across, enable_fp_fusion=True,
    )  # fmt: skip
