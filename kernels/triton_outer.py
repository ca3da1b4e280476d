"""Gradients of layers straight into the sparse map on GPUs (needs triton): one kernel multiplies, signs and permutes.

A weight's gradient, sum_t left_t (x) right_t, exists for some rows of the weight of one example at a time: a program
makes them with tensor cores into a scratch of its own that never leaves the second-level cache, then adds them block by
block to k sums in registers. Scratch is for as many programs as run at once, and each of them does one task after the
other; every task's sums are kept apart and added in order, so that the number of programs changes no bit.

Half-precision operands are multiplied as they are, float32 ones as three products of TF32 (``tf32x3``, whose error is
that of float32), all summed in float32. Convolutions read their windows in place, without making columns.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
import functools

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_device import add_block, add_partials_, columns_width, interpreted, on_device, product, split_seed
from .triton_sparse import MOST_COLUMNS, block_tables

__all__ = ["add_outer_triton_", "add_windows_triton_", "fused_pays"]

_TASK = 16  # blocks of k coordinates whose rows make a task: its k sums are then a sixteenth of the traffic
_FEWEST_COORDINATES = 4  # blocks, below which a launch costs more than the detour over memory
_PROGRAMS_PER_PROCESSOR = 2
_STEPS = {True: 64, False: 32}  # at once, by whether operands are of half precision; more of float32 spill registers
_HALVES = (torch.float16, torch.bfloat16)
_LARGE = 128  # rows and columns of a large tile
_FILL = 128  # tasks, about as many as a large GPU has processors


def fused_pays(dim: int, rows: int, columns: int) -> bool:
    """Whether the fused kernel serves a weight of shape (rows, columns).

    Its k sums must fit into registers, and its coordinates be worth its tasks: a task writes and reads k sums once for
    the coordinates it covers. Otherwise tiles of the gradient go through memory to the kernel for given rows.
    """
    return dim <= MOST_COLUMNS and rows * columns >= _FEWEST_COORDINATES * dim


@triton.jit
def _outer_kernel(
    partials,
    scratch,
    left,
    right,
    steps,
    columns,
    tables,
    scales,
    batch,
    count,
    n_rows,
    n_columns,
    left_batch,
    left_step,
    left_row,
    right_batch,
    right_step,
    right_column,
    task_rows,
    tasks_per_example,
    offset,
    first_block,
    blocks,
    key0,
    key1,
    WINDOWS: tl.constexpr,
    SCALED: tl.constexpr,
    NNZ: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    program = tl.program_id(0)
    own = scratch + program.to(tl.int64) * task_rows * n_columns
    row, column, step = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, STEPS)
    position = tl.arange(0, WIDTH)
    for task in range(program, batch * tasks_per_example, tl.num_programs(0)):
        example = tl.cast(task // tasks_per_example, tl.int64)
        first_row = (task % tasks_per_example) * task_rows
        rows_here = min(task_rows, n_rows - first_row)
        at_left = left + example * left_batch
        at_right = right + example * right_batch
        for r in range(0, rows_here, ROWS):
            for c in range(0, n_columns, COLUMNS):
                products = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
                row_there, column_there = r + row < rows_here, c + column < n_columns
                if WINDOWS:
                    column_place = tl.load(columns + c + column, mask=column_there, other=0)
                else:
                    column_place = (c + column) * right_column
                for t in range(0, count, STEPS):
                    step_there = t + step < count
                    if WINDOWS:
                        step_place = tl.load(steps + t + step, mask=step_there, other=0)
                    else:
                        step_place = (t + step) * right_step
                    a = tl.load(
                        at_left + (first_row + r + row)[:, None] * left_row + (t + step)[None, :] * left_step,
                        mask=row_there[:, None] & step_there[None, :],
                        other=0.0,
                    )
                    b = tl.load(
                        at_right + step_place[:, None] + column_place[None, :],
                        mask=step_there[:, None] & column_there[None, :],
                        other=0.0,
                    )
                    products = product(a, b, products, WIDEN, PRECISION)
                tl.store(
                    own + (r + row)[:, None] * n_columns + (c + column)[None, :],
                    products,
                    mask=row_there[:, None] & column_there[None, :],
                )
        tl.debug_barrier()  # the gradient is there for all threads
        begin = tl.cast(offset, tl.int64) + first_row * n_columns
        end = begin + rows_here * n_columns
        sums = tl.zeros((1, WIDTH), dtype=tl.float32)
        for block in range(begin // K, (end - 1) // K + 1):
            start = block * K
            place = start - begin + position
            there = (place >= 0) & (place < end - begin) & (position < K)
            x = tl.load(own + place[None, :], mask=there[None, :], other=0.0)
            if SCALED:
                x *= tl.load(scales + (begin - offset + place)[None, :], mask=there[None, :], other=0.0)
            for copy in tl.static_range(NNZ):
                multiplier = tl.load(tables + copy * blocks + block - first_block)
                shift = tl.load(tables + (NNZ + copy) * blocks + block - first_block)
                sums = add_block(sums, x, start, multiplier, shift, copy, key0, key1, K, WIDTH, ALIGNED)
        part = task % tasks_per_example
        tl.store(partials + (part * batch + example) * K + position[None, :], sums, mask=(position < K)[None, :])
        tl.debug_barrier()  # before the next task overwrites the scratch


def add_outer_triton_(
    out: Tensor, left: Tensor, right: Tensor, offset: int, seed: int, nnz: int, scale: Tensor | None = None
) -> None:
    """Add R vec(sum_t left_t (x) right_t), left (B, T, o) and right (B, T, i) of any strides, to out (B, k) float32.

    With scale (o i,) float32, contiguous, each coordinate counts times its entry.
    """
    left, right = _operands(left, right)
    strides = (left.stride(0), left.stride(1), left.stride(2), right.stride(0), right.stride(1), right.stride(2))
    shape = (left.shape[1], left.shape[2], right.shape[2])
    _launch(out, left, right, None, None, shape, strides, offset, seed, nnz, scale)


def add_windows_triton_(
    out: Tensor, left: Tensor, right: Tensor, taps: Tensor, windows: Tensor, offset: int, seed: int, nnz: int,
    scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Add R vec(G), G[b, o, c, j] = sum_l left[b, o, l] right[b, c, taps[j] + windows[l]], to out (B, k) float32.

    With scale (o c J,) float32, contiguous, each coordinate counts times its entry.
    """
    left, right = _operands(left, right)
    right = right if right.stride(2) == 1 else right.contiguous()
    where = _places(_bytes(taps), _bytes(windows), right.shape[1], right.stride(1), str(right.device))
    strides = (left.stride(0), left.stride(2), left.stride(1), right.stride(0), 0, 0)
    shape = (left.shape[2], left.shape[1], right.shape[1] * len(taps))
    _launch(out, left, right, *where, shape, strides, offset, seed, nnz, scale)


def _bytes(index: Tensor) -> bytes:
    return index.to("cpu", torch.int64).numpy().tobytes()


@functools.lru_cache(maxsize=256)
def _places(taps: bytes, windows: bytes, channels: int, stride: int, device: str) -> tuple[Tensor, Tensor]:
    """Where steps (L,) and columns (C J) begin in an example's input: kept, as a layer asks for them at every batch."""
    tap, step = (np.frombuffer(index, np.int64) for index in (taps, windows))
    columns = np.add.outer(stride * np.arange(channels), tap).ravel()
    return torch.tensor(step, device=device), torch.tensor(columns, device=device)


@on_device
def _launch(
    out: Tensor, left: Tensor, right: Tensor, steps: Tensor | None, columns: Tensor | None,
    shape: tuple[int, int, int], strides: tuple[int, ...], offset: int, seed: int, nnz: int, scale: Tensor | None,
) -> None:  # fmt: skip
    (count, n_rows, n_columns), (batch, dim) = shape, out.shape
    half = left.dtype in _HALVES
    tile_rows, tile_columns, warps = _tile(half, steps is not None, batch, n_rows, n_columns)
    task_rows = triton.cdiv(max(1, _TASK * dim // n_columns), tile_rows) * tile_rows
    tasks = triton.cdiv(n_rows, task_rows)
    first, last = offset // dim, (offset + n_rows * n_columns - 1) // dim + 1
    tables = block_tables(first, last, dim, seed, nnz, str(out.device), inverse=True)
    programs = min(batch * tasks, _programs(out.device))
    scratch = torch.empty(programs, min(task_rows, n_rows) * n_columns, device=out.device)
    partials = torch.empty(tasks, batch, dim, device=out.device)
    _outer_kernel[(programs,)](
        partials, scratch, left, right, left if steps is None else steps, left if columns is None else columns, tables,
        partials if scale is None else scale, batch, count, n_rows, n_columns, *strides, min(task_rows, n_rows), tasks,
        offset, first, last - first, *split_seed(seed), WINDOWS=steps is not None, SCALED=scale is not None, NNZ=nnz,
        K=dim, WIDTH=columns_width(dim), ALIGNED=dim % 128 == 0, ROWS=tile_rows, COLUMNS=tile_columns,
        STEPS=min(_STEPS[half], 64 if count >= 64 else 16), PRECISION="ieee" if half else "tf32x3",
        WIDEN=interpreted(), num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    add_partials_(out, partials, nnz**-0.5)


def _operands(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one half precision, or else in float32."""
    if left.dtype == right.dtype and left.dtype in _HALVES:
        return left, right
    return left.float(), right.float()


def _tile(half: bool, windows: bool, batch: int, n_rows: int, n_columns: int) -> tuple[int, int, int]:
    """Rows and columns of a tile of the gradient, and warps, from shapes alone.

    A tile of 64 x 64 does 32 operations for each byte of half precision that comes from the second-level cache, which
    on an H100 (some 5 TB/s) holds tensor cores to a fifth of their peak; one of 128 x 128 does 64. It takes a whole
    processor's registers, so there must be a task for each processor. Of float32 operands it would spill them, and
    windows, read number by number, would gain little.
    """
    if half and not windows and min(n_rows, n_columns) >= _LARGE and batch * triton.cdiv(n_rows, _LARGE) >= _FILL:
        return _LARGE, _LARGE, 16
    return (64, 64, 8) if n_rows >= 64 else (16, 128, 8)


def _programs(device: torch.device) -> int:
    """How many programs run at once."""
    if interpreted():
        return 3
    return _PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
