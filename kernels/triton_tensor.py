"""The tensor map on GPUs (needs triton): given rows, and what surrounds the transforms of the spectral route.

Given rows: a program owns some examples and a range of the matrix's rows, and keeps their k sums in registers. Every
row is read once and in order, takes its signs, is permuted through shared memory, and added from column h_1(r) on. Of
an outer product the side that fills its blocks better lies along the rows, as a row of few entries costs as much as one
of k. Above `MOST_COLUMNS` columns programs own a piece of the columns each and find their inputs in memory.

No atomics; how a sum is cut depends on shapes alone, so neither the device nor its number of processors changes a bit.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
import torch
import triton
import triton.language as tl
from torch import Tensor

from .tensor_balance import balanced
from .tensor_map import TensorMap
from .tiles import factors_of_one_type, outer_tiles
from .triton_device import (
    add_partials_,
    ceil_div,
    columns_width,
    interpreted,
    on_device,
    signed_by,
    source_of_columns,
)
from .triton_sparse import MOST_COLUMNS

__all__ = [
    "add_tensor_at_triton_",
    "add_tensor_outer_triton_",
    "add_tensor_triton_",
    "factors_triton",
    "sum_of_squares_triton",
]

_TILE = 1024  # columns of a program that owns a piece of them
_PROGRAMS = 528  # four for each processor of a large GPU
_FEWEST_ROWS = 8  # of a range: its sums are written and read once more
_ROWS_AT_ONCE = 16  # rows of one example that a program of the scattered kernel adds, at least
_FEWEST, _MOST = 1 << 26, 1 << 27  # numbers of a tile of gradients: below, launches take the time
_LEAST_ROWS = 256  # of a weight in a tile: products of fewer are slow


@triton.jit
def _narrow_kernel(
    partials,
    rows,
    scales,
    lines,
    entries,
    inverse,
    batch,
    start,
    count,
    length,
    row_stride,
    column_stride,
    first_line,
    n_lines,
    per_part,
    SCALED: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    EXAMPLES: tl.constexpr,
):
    example = tl.program_id(0) * EXAMPLES + tl.arange(0, EXAMPLES)
    part = tl.program_id(1)
    column = tl.arange(0, WIDTH)
    base = rows + example.to(tl.int64)[:, None] * row_stride
    flat_example = tl.arange(0, EXAMPLES)[:, None] * WIDTH
    sums = tl.zeros((EXAMPLES, WIDTH), dtype=tl.float32)
    for line in range(part * per_part, min(n_lines, (part + 1) * per_part)):
        own = tl.load(lines + first_line + line)
        turned = column - (own & 0x7FFFFFFF)
        turned = tl.where(turned < 0, turned + K, turned)
        begin = (first_line + line).to(tl.int64) * length - start
        for first in range(0, length, K):
            inside = (column < K) & (first + column < length)
            place = begin + first + column
            there = inside & (place >= 0) & (place < count)
            both = there[None, :] & (example < batch)[:, None]
            x = tl.load(base + place[None, :] * column_stride, mask=both, other=0.0).to(tl.float32)
            if SCALED:
                x *= tl.load(scales + place, mask=there, other=0.0)[None, :]
            x = signed_by(x, tl.load(entries + first + column, mask=inside, other=0)[None, :], own)
            source = tl.load(inverse + first + turned, mask=column < K, other=0)
            source = tl.reshape(flat_example + source[None, :], (EXAMPLES * WIDTH,))
            sums += tl.reshape(tl.gather(tl.reshape(x, (EXAMPLES * WIDTH,)), source, 0), (EXAMPLES, WIDTH))
    at = partials + (part.to(tl.int64) * batch + example.to(tl.int64))[:, None] * K + column[None, :]
    tl.store(at, sums, mask=(example < batch)[:, None] & (column < K)[None, :])


@triton.jit
def _wide_kernel(
    partials,
    rows,
    scales,
    lines,
    entries,
    inverse,
    batch,
    start,
    count,
    length,
    row_stride,
    column_stride,
    first_line,
    n_lines,
    per_part,
    dim,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    example = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(2)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for line in range(part * per_part, min(n_lines, (part + 1) * per_part)):
        own = tl.load(lines + first_line + line)
        turned = column - (own & 0x7FFFFFFF)
        turned = tl.where(turned < 0, turned + dim, turned)
        begin = (first_line + line).to(tl.int64) * length - start
        for first in range(0, length, dim):
            entry = first + tl.load(inverse + first + turned, mask=column < dim, other=0)
            inside = (column < dim) & (entry < length)
            place = begin + entry
            there = inside & (place >= 0) & (place < count)
            x = tl.load(rows + example * row_stride + place * column_stride, mask=there, other=0.0).to(tl.float32)
            if SCALED:
                x *= tl.load(scales + place, mask=there, other=0.0)
            sums += signed_by(x, tl.load(entries + entry, mask=inside, other=0), own)
    tl.store(partials + (part.to(tl.int64) * batch + example) * dim + column, sums, mask=column < dim)


def add_tensor_triton_(out: Tensor, rows: Tensor, offset: int, matrix: TensorMap) -> None:
    """Add R[:, offset : offset + n] rows, rows (B, n) of any floating-point type and strides, to out (B, k) float32."""
    lines, entries = matrix.tables(out.device)
    if rows.numel():
        _add_lines_(out, rows, offset - matrix.offset, lines, entries, None)


def add_tensor_outer_triton_(
    out: Tensor, left: Tensor, right: Tensor, matrix: TensorMap, scale: Tensor | None = None
) -> None:
    """Add R D vec(sum_t left_t (x) right_t), left (B, T, o) and right (B, T, i), to out (B, k) float32.

    With scale (o i,) float32, contiguous, the diagonal of D.
    """
    lines, entries = matrix.tables(out.device)
    if _fill(len(lines), matrix.dim) > _fill(len(entries), matrix.dim):
        if scale is not None:
            scale = scale.view(matrix.shape).T.contiguous().view(-1)
        left, right, lines, entries = right, left, entries, lines
    elements = min(max(left.numel() + right.numel(), _FEWEST), _MOST)
    for some, start, tile in outer_tiles(*factors_of_one_type(left, right), elements, _LEAST_ROWS):
        own = None if scale is None else scale[start : start + tile.shape[1]]
        _add_lines_(out[some], tile, start, lines, entries, own)


def _fill(length: int, dim: int) -> float:
    """The part of its blocks of k that a side fills."""
    return length / (ceil_div(length, dim) * dim)


@on_device
def _add_lines_(out: Tensor, rows: Tensor, start: int, lines: Tensor, entries: Tensor, scale: Tensor | None) -> None:
    """Add the coordinates [start, start + n) of a matrix (lines, entries) in rows (B, n), each times its scale."""
    (batch, count), dim, length = rows.shape, out.shape[1], len(entries)
    first, last = start // length, (start + count - 1) // length + 1
    wide = dim > MOST_COLUMNS
    examples = 1 if batch == 1 or dim > MOST_COLUMNS // 2 else 2
    if interpreted() and not wide:
        examples = 64  # its time goes by programs; no example's sums depend on its companions
    groups = batch * ceil_div(dim, _TILE) if wide else ceil_div(batch, examples)
    fewest = ceil_div(_FEWEST_ROWS * dim, length * ceil_div(length, dim)) if length < dim else _FEWEST_ROWS
    per_part = max(min(fewest, last - first), ceil_div(last - first, max(1, _PROGRAMS // groups)))
    parts = ceil_div(last - first, per_part)
    partials = torch.empty(parts, batch, dim, device=out.device, dtype=torch.float32)
    given = (
        partials,
        rows,
        partials if scale is None else scale,
        lines,
        entries,
        source_of_columns(entries, dim),
        batch,
    )
    cut = (start, count, length, *rows.stride(), first, last - first, per_part)
    if wide:
        _wide_kernel[(batch, ceil_div(dim, _TILE), parts)](
            *given, *cut, dim, SCALED=scale is not None, BLOCK=_TILE, enable_fp_fusion=True
        )
    else:
        width = columns_width(dim)
        _narrow_kernel[(groups, parts)](
            *given, *cut, SCALED=scale is not None, K=dim, WIDTH=width, EXAMPLES=examples,
            num_warps=max(4, min(16, width * examples // 512)), enable_fp_fusion=True,
        )  # fmt: skip
    add_partials_(out, partials, 1.0)


@triton.jit
def _at_kernel(
    partials,
    values,
    order,
    starts,
    index,
    lines,
    entries,
    batch,
    length,
    row_stride,
    column_stride,
    dim,
    parts,
    BLOCK: tl.constexpr,
):
    """Rows of one example, one after the other, into a sum in memory that belongs to this program alone."""
    example = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    begin, end = tl.load(starts + example), tl.load(starts + example + 1)
    share = tl.cdiv(end - begin, parts)
    sums = partials + (part.to(tl.int64) * batch + example) * dim
    for number in range(begin + part * share, min(end, begin + (part + 1) * share)):
        row = tl.load(order + number)
        own = tl.load(lines + tl.load(index + row))
        for first in range(0, length, dim):
            for piece in range(first, min(first + dim, length), BLOCK):
                place = piece + tl.arange(0, BLOCK)
                there = place < min(first + dim, length)
                entry = tl.load(entries + place, mask=there, other=0)
                at = values + row * row_stride + place.to(tl.int64) * column_stride
                x = signed_by(tl.load(at, mask=there, other=0.0).to(tl.float32), entry, own)
                column = ((entry & 0x7FFFFFFF).to(tl.int64) + (own & 0x7FFFFFFF)) % dim
                tl.store(sums + column, tl.load(sums + column, mask=there, other=0.0) + x, mask=there)
                tl.debug_barrier()


@on_device
def add_tensor_at_triton_(out: Tensor, values: Tensor, examples: Tensor, index: Tensor, matrix: TensorMap) -> None:
    """Add R vec(e_index[r] (x) values[r]) to out[examples[r]] for every row r of values (M, i)."""
    (number, length), (batch, dim) = values.shape, out.shape
    lines, entries = matrix.tables(out.device)
    order = torch.sort(examples, stable=True).indices
    starts = torch.zeros(batch + 1, dtype=torch.int64, device=out.device)
    starts[1:] = torch.bincount(examples, minlength=batch).cumsum(0)
    parts = max(1, min(_PROGRAMS // batch, ceil_div(number, batch * _ROWS_AT_ONCE)))
    partials = torch.zeros(parts, batch, dim, device=out.device, dtype=torch.float32)
    _at_kernel[(batch, parts)](
        partials, values, order, starts, index.contiguous(), lines, entries, batch, length, *values.stride(), dim,
        parts, BLOCK=min(1024, triton.next_power_of_2(min(length, dim))), enable_fp_fusion=True,
    )  # fmt: skip
    add_partials_(out, partials, 1.0)


@triton.jit
def _side(x, entries, inverse, step, length, stride_b, stride_t, stride, steps, column, dim):
    """Sketch of one side at some columns, of one step of one example."""
    base = x + (step // steps).to(tl.int64) * stride_b + (step % steps).to(tl.int64) * stride_t
    total = (column * 0).to(tl.float32)
    for first in range(0, length, dim):
        entry = first + tl.load(inverse + first + column, mask=column < dim, other=0)
        there = (column < dim) & (entry < length)
        value = tl.load(base + entry.to(tl.int64) * stride, mask=there, other=0.0).to(tl.float32)
        total += signed_by(value, tl.load(entries + entry, mask=there, other=0), 0)
    return total


@triton.jit
def _factors_kernel(
    z,
    left,
    right,
    left_scale,
    right_scale,
    left_entries,
    right_entries,
    left_inverse,
    right_inverse,
    o,
    i,
    left_b,
    left_t,
    left_stride,
    right_b,
    right_t,
    right_stride,
    steps,
    dim,
    BLOCK: tl.constexpr,
):
    step = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = _side(left, left_entries, left_inverse, step, o, left_b, left_t, left_stride, steps, column, dim)
    y = _side(right, right_entries, right_inverse, step, i, right_b, right_t, right_stride, steps, column, dim)
    at = z + 2 * (step.to(tl.int64) * dim + column)
    tl.store(at, x * tl.load(left_scale + step), mask=column < dim)
    tl.store(at + 1, y * tl.load(right_scale + step), mask=column < dim)


def factors_triton(left: Tensor, right: Tensor, matrix: TensorMap) -> Tensor:
    """Z (B, T, k) complex: the sketches of left (B, T, o) and right (B, T, i), brought to one size."""
    z = torch.empty(*left.shape[:2], matrix.dim, 2, device=left.device, dtype=torch.float32)
    _fill_factors(z, left, right, matrix)
    return torch.view_as_complex(z)


@on_device
def _fill_factors(z: Tensor, left: Tensor, right: Tensor, matrix: TensorMap) -> None:
    steps, dim, tables = left.shape[1], matrix.dim, matrix.tables(z.device)
    block = min(1 << 13 if interpreted() else _TILE, triton.next_power_of_2(dim))
    _factors_kernel[(len(left) * steps, ceil_div(dim, block))](
        z, left, right, *(scale.contiguous() for scale in balanced(left, right)), *tables,
        *(source_of_columns(table, dim) for table in tables), left.shape[2], right.shape[2], *left.stride(),
        *right.stride(),
        steps, dim, BLOCK=block, enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit
def _squares_kernel(sums, z, steps, dim, BLOCK: tl.constexpr):
    example = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    re_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    im_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    for step in range(steps):
        at = z + 2 * ((example * steps + step) * dim + column)
        re = tl.load(at, mask=column < dim, other=0.0)
        im = tl.load(at + 1, mask=column < dim, other=0.0)
        re_sum += re * re - im * im
        im_sum += 2 * re * im
    to = sums + 2 * (example * dim + column)
    tl.store(to, re_sum, mask=column < dim)
    tl.store(to + 1, im_sum, mask=column < dim)


def sum_of_squares_triton(z: Tensor) -> Tensor:
    """sum_t z_t^2 of z (B, T, k) complex: (B, k)."""
    sums = torch.empty(z.shape[0], z.shape[2], dtype=z.dtype, device=z.device)
    _sum_squares(torch.view_as_real(sums), torch.view_as_real(z.contiguous()))
    return sums


@on_device
def _sum_squares(sums: Tensor, z: Tensor) -> None:
    batch, steps, dim, _ = z.shape
    block = min(1 << 13 if interpreted() else 256, triton.next_power_of_2(dim))
    _squares_kernel[(batch, ceil_div(dim, block))](sums, z, steps, dim, BLOCK=block, enable_fp_fusion=True)
