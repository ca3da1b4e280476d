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

_FEWEST, _MOST = 1 << 24, 1 << 27  # numbers of a tile of gradients, 64 to 512 MiB: below, launches take the time
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
    tap, window = (torch.tensor(np.frombuffer(index, np.int64)) for index in (taps, windows))
    return tap.to(device), window.to(device)


@triton.jit
def _columns_kernel(
    made, right, taps, windows, channels, n_taps, count, batch_stride, channel_stride, stride, BLOCK: tl.constexpr
):
    """One channel of one example: n_taps rows of count numbers."""
    example, channel = (tl.program_id(0) // channels).to(tl.int64), tl.program_id(0) % channels
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = index < n_taps * count
    place = tl.load(taps + index // count, mask=there, other=0) + tl.load(windows + index % count, mask=there, other=0)
    x = tl.load(right + example * batch_stride + channel * channel_stride + place * stride, mask=there, other=0.0)
    tl.store(made + tl.program_id(0).to(tl.int64) * n_taps * count + index, x, mask=there)


@on_device
def _fill_columns(made: Tensor, right: Tensor, taps: Tensor, windows: Tensor) -> None:
    (batch, channels, _), numbers = right.shape, len(taps) * len(windows)
    block = 1 << 16 if interpreted() else 1024  # the interpreter's time goes by programs
    block = min(block, triton.next_power_of_2(numbers))
    _columns_kernel[(batch * channels, ceil_div(numbers, block))](
        made, right, taps, windows, channels, len(taps), len(windows), *right.stride(), BLOCK=block,
        enable_fp_fusion=True,
    )  # fmt: skip
