"""The sparse map of given rows on GPUs (needs triton): one read of every number, no atomics, the same bits every time.

A program owns some examples and a range of blocks, and keeps their k sums in registers; it reads a block's inputs in
order, puts on signs, permutes within the block, and adds. Ranges of one example are added afterwards, in order. How a
sum is cut depends on shapes alone, so neither the device nor its number of processors changes a bit.

Two things bound the speed: the reads, 2 or 4 bytes a coordinate, and two passes through shared memory of 4 bytes each,
at some ten times the bandwidth. A definition of the map with whole lines of memory in place of single coordinates would
save nothing, since the inputs are read in order anyway; it would only make collisions come in groups.

Above `_WIDEST` columns the sums no longer fit: programs then own `_TILE` columns each, and find their inputs in memory,
with a call of Philox for every one: right for any k, and several times slower.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
import functools

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from .sparse_map import permutations
from .triton_device import (
    add_block,
    add_partials_,
    ceil_div,
    columns_width,
    interpreted,
    on_device,
    signed_each,
    split_seed,
)

__all__ = ["MOST_COLUMNS", "add_at_triton_", "add_rank_one_triton_", "add_rows_triton_", "block_tables"]

MOST_COLUMNS = 8192  # whose sums stay in a program's registers
_TILE = 1024
_PROGRAMS = 528  # four for each processor of a large GPU
_FEWEST_BLOCKS = 8  # of a range: its sums are written and read once more
_ROWS_AT_ONCE = 16  # rows of one example that a program of the scattered kernel adds, at least


@functools.lru_cache(maxsize=1 << 14)  # a range for each tile of a model: few bytes each, and worse than none if short
def block_tables(first: int, last: int, dim: int, seed: int, nnz: int, device: str, inverse: bool) -> Tensor:
    """Multiplier and shift of the blocks' permutations, or of their inverses: (2, nnz, last - first) int64.

    They are drawn on the CPU, where rejection is cheap, and kept: a layer asks for the same ones at every batch.
    """
    found = np.empty((2, nnz, last - first), np.int64)
    for copy in range(nnz):
        multiplier, shift = permutations(first, last, dim, seed, copy)
        if inverse:
            multiplier = _inverses(multiplier, dim)
            shift = -(multiplier * shift) % dim
        found[:, copy] = multiplier, shift
    return torch.from_numpy(found).to(device)


def _inverses(units: NDArray[np.int64], dim: int) -> NDArray[np.int64]:
    """Multiplicative inverses modulo dim, by Euclid's algorithm on all at once."""
    rest, other = np.full_like(units, dim), units.copy()
    x, y = np.zeros_like(units), np.ones_like(units)
    while (going := other > 0).any():
        quotient = np.where(going, rest // np.maximum(other, 1), 0)
        rest, other = np.where(going, other, rest), np.where(going, rest - quotient * other, other)
        x, y = np.where(going, y, x), np.where(going, x - quotient * y, y)
    return x % dim


@triton.jit
def _rows_kernel(
    partials,
    rows,
    left,
    scales,
    tables,
    batch,
    count,
    columns,
    row_stride,
    column_stride,
    left_batch,
    left_row,
    offset,
    first_block,
    blocks,
    per_part,
    key0,
    key1,
    RANK_ONE: tl.constexpr,
    SCALED: tl.constexpr,
    NNZ: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    EXAMPLES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    example = tl.program_id(0) * EXAMPLES + tl.arange(0, EXAMPLES)
    part = tl.program_id(1)
    column = tl.arange(0, WIDTH)
    base = rows + example.to(tl.int64)[:, None] * row_stride
    sums = tl.zeros((EXAMPLES, WIDTH), dtype=tl.float32)
    for block in range(part * per_part, min(blocks, (part + 1) * per_part)):
        start = (first_block + block).to(tl.int64) * K
        place = start - offset + column
        there = (place >= 0) & (place < count) & (column < K)
        both = there[None, :] & (example < batch)[:, None]
        if RANK_ONE:
            at = tl.where(there, place, 0).to(tl.int32)
            row = at // columns
            x = tl.load(base + (at - row * columns)[None, :] * column_stride, mask=both, other=0.0).to(tl.float32)
            other = left + example.to(tl.int64)[:, None] * left_batch + row[None, :] * left_row
            x *= tl.load(other, mask=both, other=0.0).to(tl.float32)
        else:
            x = tl.load(base + place[None, :] * column_stride, mask=both, other=0.0).to(tl.float32)
        if SCALED:
            x *= tl.load(scales + place, mask=there, other=0.0)[None, :]
        for copy in tl.static_range(NNZ):
            multiplier = tl.load(tables + copy * blocks + block)
            shift = tl.load(tables + (NNZ + copy) * blocks + block)
            sums = add_block(sums, x, start, multiplier, shift, copy, key0, key1, K, WIDTH, ALIGNED)
    at = partials + (part.to(tl.int64) * batch + example.to(tl.int64))[:, None] * K + column[None, :]
    tl.store(at, sums, mask=(example < batch)[:, None] & (column < K)[None, :])


@triton.jit
def _wide_kernel(
    partials,
    rows,
    scales,
    tables,
    batch,
    count,
    row_stride,
    column_stride,
    offset,
    first_block,
    blocks,
    per_part,
    dim,
    key0,
    key1,
    nnz,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    example = tl.program_id(0).to(tl.int64)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    part = tl.program_id(2)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for block in range(part * per_part, min(blocks, (part + 1) * per_part)):
        start = (first_block + block).to(tl.int64) * dim
        for copy in range(nnz):
            multiplier = tl.load(tables + copy * blocks + block)
            shift = tl.load(tables + (nnz + copy) * blocks + block)
            coordinate = start + (multiplier * column + shift) % dim
            place = coordinate - offset
            there = (place >= 0) & (place < count) & (column < dim)
            x = tl.load(rows + example * row_stride + place * column_stride, mask=there, other=0.0).to(tl.float32)
            if SCALED:
                x *= tl.load(scales + place, mask=there, other=0.0)
            sums += signed_each(x, coordinate, copy, key0, key1)
    tl.store(partials + (part.to(tl.int64) * batch + example) * dim + column, sums, mask=column < dim)


@on_device
def add_rows_triton_(out: Tensor, rows: Tensor, offset: int, seed: int, nnz: int, scale: Tensor | None = None) -> None:
    """Add R[:, offset : offset + n] rows, rows (B, n) of any floating-point type and strides, to out (B, k) float32.

    With scale (n,) float32, contiguous, each coordinate counts times its entry.
    """
    (batch, count), dim = rows.shape, out.shape[1]
    if not batch or not count:
        return
    if dim <= MOST_COLUMNS:
        _add_narrow_(out, rows, None, count, 1, offset, seed, nnz, scale)
        return
    first, blocks, tables = _blocks(offset, count, dim, seed, nnz, out)
    per_part, parts = _parts(blocks, batch * ceil_div(dim, _TILE))
    partials = torch.empty(parts, batch, dim, device=out.device, dtype=torch.float32)
    _wide_kernel[(batch, ceil_div(dim, _TILE), parts)](
        partials, rows, partials if scale is None else scale, tables, batch, count, *rows.stride(), offset, first,
        blocks, per_part, dim, *split_seed(seed), nnz, SCALED=scale is not None, BLOCK=_TILE, enable_fp_fusion=True,
    )  # fmt: skip
    add_partials_(out, partials, nnz**-0.5)


@on_device
def add_rank_one_triton_(
    out: Tensor, left: Tensor, right: Tensor, offset: int, seed: int, nnz: int, scale: Tensor | None = None
) -> None:
    """Add R vec(left (x) right), left (B, o) and right (B, i) of any types and strides, to out (B, k) float32.

    For k of at most `MOST_COLUMNS` and less than 2^31 coordinates. With scale (o i,) float32, contiguous, each
    coordinate counts times its entry.
    """
    count = left.shape[1] * right.shape[1]
    if len(left) and count:
        _add_narrow_(out, right, left, count, right.shape[1], offset, seed, nnz, scale)


def _add_narrow_(
    out: Tensor, rows: Tensor, left: Tensor | None, count: int, columns: int, offset: int, seed: int, nnz: int,
    scale: Tensor | None,
) -> None:  # fmt: skip
    batch, dim = out.shape
    first, blocks, tables = _blocks(offset, count, dim, seed, nnz, out)
    examples = 1 if batch == 1 or dim > MOST_COLUMNS // 2 else 2
    if interpreted():
        examples = 64  # its time goes by programs; no example's sums depend on its companions
    width, groups = columns_width(dim), ceil_div(batch, examples)
    per_part, parts = _parts(blocks, groups)
    partials = torch.empty(parts, batch, dim, device=out.device, dtype=torch.float32)
    _rows_kernel[(groups, parts)](
        partials, rows, rows if left is None else left, partials if scale is None else scale, tables, batch, count,
        columns, *rows.stride(), *(rows if left is None else left).stride(), offset, first, blocks, per_part,
        *split_seed(seed), RANK_ONE=left is not None, SCALED=scale is not None, NNZ=nnz, K=dim, WIDTH=width,
        EXAMPLES=examples, ALIGNED=dim % 128 == 0, num_warps=max(4, min(16, width * examples // 512)),
        enable_fp_fusion=True,
    )  # fmt: skip
    add_partials_(out, partials, nnz**-0.5)


def _blocks(offset: int, count: int, dim: int, seed: int, nnz: int, out: Tensor) -> tuple[int, int, Tensor]:
    """The first block that coordinates touch, how many they touch, and the tables of these."""
    first, last = offset // dim, (offset + count - 1) // dim + 1
    return first, last - first, block_tables(first, last, dim, seed, nnz, str(out.device), inverse=True)


def _parts(blocks: int, groups: int) -> tuple[int, int]:
    """How many blocks make a range, and how many ranges there are, by shapes alone."""
    per_part = max(_FEWEST_BLOCKS, ceil_div(blocks, max(1, _PROGRAMS // groups)))
    return per_part, ceil_div(blocks, per_part)


@triton.jit
def _at_kernel(
    partials,
    rows,
    order,
    starts,
    offsets,
    tables,
    batch,
    count,
    row_stride,
    column_stride,
    first_block,
    blocks,
    dim,
    parts,
    key0,
    key1,
    nnz,
    BLOCK: tl.constexpr,
):
    """Rows of one example, one after the other, into a sum in memory that belongs to this program alone."""
    example = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    begin, end = tl.load(starts + example), tl.load(starts + example + 1)
    own = tl.cdiv(end - begin, parts)
    sums = partials + (part.to(tl.int64) * batch + example) * dim
    for index in range(begin + part * own, min(end, begin + (part + 1) * own)):
        row = tl.load(order + index)
        offset = tl.load(offsets + row)
        for piece in range(0, count, BLOCK):
            place = piece + tl.arange(0, BLOCK)
            coordinate = offset + place
            block = coordinate // dim
            x = tl.load(rows + row * row_stride + place.to(tl.int64) * column_stride, mask=place < count, other=0.0)
            for copy in range(nnz):
                signed = signed_each(x.to(tl.float32), coordinate, copy, key0, key1)
                # Coordinates of one block never meet; those of the next one wait until these are written.
                for current in range((offset + piece) // dim, (offset + min(piece + BLOCK, count) - 1) // dim + 1):
                    multiplier = tl.load(tables + copy * blocks + current - first_block)
                    shift = tl.load(tables + (nnz + copy) * blocks + current - first_block)
                    column = (multiplier * (coordinate % dim) + shift) % dim
                    there = (place < count) & (block == current)
                    tl.store(sums + column, tl.load(sums + column, mask=there, other=0.0) + signed, mask=there)
                    tl.debug_barrier()


@on_device
def add_at_triton_(out: Tensor, rows: Tensor, examples: Tensor, offsets: Tensor, seed: int, nnz: int) -> None:
    """Add R[:, offsets[r] : offsets[r] + n] rows[r] to out[examples[r]] for every row r of rows (M, n)."""
    (number, count), (batch, dim) = rows.shape, out.shape
    if not number or not count:
        return
    first, last = int(offsets.min()) // dim, (int(offsets.max()) + count - 1) // dim + 1
    tables = block_tables(first, last, dim, seed, nnz, str(rows.device), inverse=False)
    order = torch.sort(examples, stable=True).indices
    starts = torch.zeros(batch + 1, dtype=torch.int64, device=out.device)
    starts[1:] = torch.bincount(examples, minlength=batch).cumsum(0)
    parts = max(1, min(_PROGRAMS // batch, ceil_div(number, batch * _ROWS_AT_ONCE)))
    partials = torch.zeros(parts, batch, dim, device=out.device, dtype=torch.float32)
    _at_kernel[(batch, parts)](
        partials, rows, order, starts, offsets.contiguous(), tables, batch, count, rows.stride(0), rows.stride(1),
        first, last - first, dim, parts, *split_seed(seed), nnz, BLOCK=min(1024, triton.next_power_of_2(count)),
        enable_fp_fusion=True,
    )  # fmt: skip
    add_partials_(out, partials, nnz**-0.5)
