"""Launches the compiled kernels of the sparse map: which of them, on which examples, in which thread.

Two routes, chosen by shapes and the processor, never by the number of threads, which therefore changes no bit of a sum:

* lanes: a group of examples interleaved (16 with AVX-512, 8 with AVX2, else 4), summed into a buffer of its own that is
  then added to the output. Given rows out of main memory cost, on Zen 4, 3.3 ns a coordinate of a group, 2.7 ns with 8
  lanes, either full or not; outer products and convolutions what `product_costs` says.
* rows: one example after the other; outer products become tiles before, and convolutions columns before those.

Hence the lanes serve groups that are full enough, unless there are too few coordinates to pay for the buffer. Where
there are fewer groups than `_JOBS`, each is split into parts with buffers of their own, which are added in order.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .native import NativeMap, aligned_scratch, require_library, run_jobs, share_rows
from .tiles import outer_tiles, scaled, window_columns

__all__ = [
    "add_at_native_",
    "add_native_",
    "add_outer_native_",
    "add_windows_native_",
    "address",
    "last_contiguous",
    "product_nanoseconds",
    "sparse_map_native",
    "sum_lanes_",
]

_NEGATIVE = np.uint32(1 << 31)
_TILE = 1 << 18  # numbers of a tile of gradients: a megabyte, so that it stays in the second-level cache
_LANES_DIM = 1 << 18  # beyond it a buffer of sixteen sums per column leaves the caches
_JOBS = 8  # that a large sum is split into, at least
_PART = 16  # a part's coordinates, in units of k: keeps the cost of its buffer below a tenth
_PART_ROWS = 64  # rows of an outer product per part: each part interleaves all of right again
_WINDOW_ROWS = 16  # rows of a convolution's weight per part: each part interleaves its input again
_WINDOW_WORK = (8192, 65536)  # vectors of work space for the two sides of a convolution: 4 MB with AVX-512
_BUFFERS = 1 << 24  # numbers in the buffers of parts at one time
_OUTER_COPIES = 64  # largest nnz of sp_outer_lanes
_FULL_ENOUGH = {16: 8, 8: 6, 4: 5}  # fewest given rows that are interleaved, by lanes: never only four


class _Costs(NamedTuple):
    """Nanoseconds of a coordinate of a product, and of each step: of a group in lanes, and of an example alone."""

    lanes: float
    lanes_step: float
    alone: float
    alone_step: float


# By lanes, measured beside each other: 16 on Zen 5 with AVX-512, 8 on Zen 3 with AVX2, one busy core each. Lanes win on
# convolutions by far, whose columns are never made: 128 channels to 128 on 16 x 16 positions, 16 examples, took 19 ms
# with 8 lanes, and 106 ms by columns.
_OUTER = {16: _Costs(1.2, 0.17, 0.35, 0.02), 8: _Costs(3.9, 0.38, 1.5, 0.085), 4: _Costs(1.2, 0.2, 0.35, 0.02)}
_WINDOWS = {16: _Costs(1.2, 0.15, 0.35, 0.033), 8: _Costs(2.5, 0.24, 1.5, 0.15), 4: _Costs(1.2, 0.2, 0.35, 0.033)}

# sum(buffer, first example, examples, part): the interleaved sum of one part of one group
_Sum = Callable[[Tensor, int, int, int], None]


def sparse_map_native(
    start: int, stop: int, *, dim: int, seed: int, copy: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The same as `sparse_map`, by the compiled code that the sums use."""
    table = np.empty(max(stop - start, 0), np.uint32)
    require_library().sp_table(table.ctypes.data, start, table.size, NativeMap(dim, seed), copy)
    return (table & ~_NEGATIVE).astype(np.int64), (table & _NEGATIVE) != 0


def add_native_(out: Tensor, rows: Tensor, offset: int, matrix: NativeMap) -> None:
    """Add R[:, offset : offset + n] rows (B, n) to out (B, k)."""
    (batch, count), dim, nnz = rows.shape, out.shape[1], matrix.nnz
    if rows.stride(1) != 1 and count > 1:
        rows = rows.contiguous()
    width = require_library().sp_lanes()
    pays = count >= dim and dim <= _LANES_DIM
    laned = _in_lanes(batch, width, _FULL_ENOUGH[width]) if pays else 0
    if laned:
        groups = -(-laned // width)
        parts = max(1, min(-(-_JOBS // groups), count // (_PART * dim)))
        step = -(-count // parts)

        def add(sums: Tensor, first: int, lanes: int, part: int) -> None:
            start = part * step
            require_library().sp_add_lanes(
                sums.data_ptr(),
                address(rows, first, start),
                rows.stride(0),
                lanes,
                max(0, min(step, count - start)),
                offset + start,
                matrix,
            )

        sum_lanes_(out[:laned], parts, nnz, 0.25 * count * nnz, add)
    if laned < batch:
        _add_rows_(out[laned:], rows[laned:], offset, matrix)


def add_outer_native_(
    out: Tensor, left: Tensor, right: Tensor, offset: int, matrix: NativeMap, scale: Tensor | None = None
) -> None:
    """Add R vec(sum_t left_t (x) right_t), for left (B, T, o) and right (B, T, i), to out (B, k); see `scaled`."""
    (batch, steps, o), i, dim, nnz = left.shape, right.shape[2], out.shape[1], matrix.nnz
    left, right = last_contiguous(left), last_contiguous(right)
    work = (1 + steps // 8) * o * i
    pays = work >= dim and dim <= _LANES_DIM and nnz <= _OUTER_COPIES
    width = require_library().sp_lanes()
    laned = _in_lanes(batch, width, _full_enough_product(_OUTER[width], steps)) if pays else 0
    if laned:
        groups = -(-laned // width)
        parts = max(1, min(-(-_JOBS // groups), work // (_PART * 4 * dim), o // _PART_ROWS))
        height = -(-o // (4 * parts)) * 4  # whole panels of four rows

        def add(sums: Tensor, first: int, lanes: int, part: int) -> None:
            row = part * height
            require_library().sp_outer_lanes(
                sums.data_ptr(),
                aligned_scratch("work", require_library().sp_outer_work()).data_ptr(),
                address(left, first, row),
                left.stride(0),
                left.stride(1),
                address(right, first, 0),
                right.stride(0),
                right.stride(1),
                lanes,
                steps,
                max(0, min(height, o - row)),
                i,
                offset + row * i,
                matrix,
                _scale_address(scale, row * i),
            )

        sum_lanes_(out[:laned], parts, nnz, (0.07 * nnz + 0.01 * steps) * o * i, add)
    if laned < batch:
        for some, start, tile in outer_tiles(left[laned:], right[laned:], _TILE):
            _add_rows_(out[laned:][some], scaled(tile, start, scale), offset + start, matrix)


def add_windows_native_(
    out: Tensor,
    left: Tensor,
    right: Tensor,
    taps: Tensor,
    windows: Tensor,
    offset: int,
    matrix: NativeMap,
    scale: Tensor | None = None,
) -> None:
    """Add R vec(G), G[b, o, c, j] = sum_l left[b, o, l] right[b, c, taps[j] + windows[l]], to out (B, k)."""
    (batch, o, count), (_, c, plane), dim, j = left.shape, right.shape, out.shape[1], len(taps)
    nnz = matrix.nnz
    left, right = left.contiguous(), right.contiguous()
    taps, windows = taps.int().contiguous(), windows.int().contiguous()
    work = (1 + count // 8) * o * c * j
    pays = work >= dim and dim <= _LANES_DIM and nnz <= _OUTER_COPIES
    width = require_library().sp_lanes()
    laned = _in_lanes(batch, width, _full_enough_product(_WINDOWS[width], count)) if pays else 0
    if laned:
        groups = -(-laned // width)
        parts = max(1, min(-(-_JOBS // groups), work // (_PART * 4 * dim), o // _WINDOW_ROWS))
        height = -(-o // (4 * parts)) * 4  # whole panels of four rows
        left_work, right_work = max(_WINDOW_WORK[0], 4 * count), max(_WINDOW_WORK[1], plane)

        def add(sums: Tensor, first: int, lanes: int, part: int) -> None:
            row = part * height
            require_library().sp_windows_lanes(
                sums.data_ptr(),
                aligned_scratch("windows", (left_work + right_work) * width).data_ptr(),
                left_work,
                right_work,
                address(left, first, row * count),
                left.stride(0),
                count,
                address(right, first, 0),
                right.stride(0),
                plane,
                taps.data_ptr(),
                windows.data_ptr(),
                lanes,
                max(0, min(height, o - row)),
                count,
                c,
                j,
                offset + row * c * j,
                matrix,
                _scale_address(scale, row * c * j),
            )

        sum_lanes_(out[:laned], parts, nnz, (0.07 * nnz + 0.01 * count) * o * c * j, add)
    for some, columns in window_columns(right[laned:], taps, windows):
        add_outer_native_(out[laned:][some], left[laned:][some].transpose(1, 2), columns, offset, matrix, scale)


def add_at_native_(out: Tensor, rows: Tensor, examples: Tensor, offsets: Tensor, matrix: NativeMap) -> None:
    """Add R[:, offsets[r] : offsets[r] + n] rows[r] to out[examples[r]] for every row r; both index tensors int64."""
    (number, count), batch = rows.shape, len(out)
    if rows.stride(1) != 1 and count > 1:
        rows = rows.contiguous()
    examples, offsets = examples.contiguous(), offsets.contiguous()

    def some(first: int, last: int) -> None:
        require_library().sp_add_at(
            out.data_ptr(),
            out.stride(0),
            rows.data_ptr(),
            rows.stride(0),
            number,
            count,
            examples.data_ptr(),
            offsets.data_ptr(),
            first,
            last,
            matrix,
            matrix.nnz**-0.5,
        )

    share_rows(batch, some, 1.0 * number * count * matrix.nnz)


def _in_lanes(batch: int, width: int, full_enough: int) -> int:
    """How many examples, from the first on, go into lanes: those of whole groups, and of a last one if full enough."""
    if width < full_enough:
        return 0
    rest = batch % width
    return batch if rest >= full_enough else batch - rest


def _full_enough_product(costs: _Costs, steps: int) -> int:
    """From how many examples on a group costs less in lanes than each alone."""
    return int((costs.lanes + costs.lanes_step * steps) / (costs.alone + costs.alone_step * steps)) + 1


def product_nanoseconds(batch: int, steps: int, o: int, i: int, *, windows: bool) -> float:
    """What an outer product of so many steps costs, or a convolution of so many windows, of (o, i) coordinates."""
    width: int = require_library().sp_lanes()
    costs = (_WINDOWS if windows else _OUTER)[width]
    laned = _in_lanes(batch, width, _full_enough_product(costs, steps))
    group, alone = costs.lanes + costs.lanes_step * steps, costs.alone + costs.alone_step * steps
    return (-(-laned // width) * group + (batch - laned) * alone) * o * i


def sum_lanes_(out: Tensor, parts: int, nnz: int, nanoseconds: float, add: _Sum) -> None:
    """Add the sums of all parts of all groups of sixteen examples to out; nanoseconds are those of one example."""
    (batch, dim), width = out.shape, require_library().sp_lanes()
    if parts == 1:

        def whole(first: int) -> None:
            lanes = min(width, batch - first)
            sums = aligned_scratch("sums", dim * width)
            add(sums, first, lanes, 0)
            _gather_(out[first : first + lanes], sums, 1, nnz)

        run_jobs([partial(whole, first) for first in range(0, batch, width)], nanoseconds * batch)
        return
    # Rounds bound the memory of the buffers.
    size = parts * dim * width
    for start in range(0, batch, max(1, _BUFFERS // size) * width):
        firsts = range(start, min(batch, start + max(1, _BUFFERS // size) * width), width)
        buffers = aligned_scratch("parts", len(firsts) * size).view(len(firsts), parts, dim * width)
        jobs = [
            partial(add, buffers[group, part], first, min(width, batch - first), part)
            for group, first in enumerate(firsts)
            for part in range(parts)
        ]
        run_jobs(jobs, nanoseconds * width * len(firsts))
        for group, first in enumerate(firsts):
            _gather_(out[first : first + width], buffers[group], parts, nnz)


def _gather_(out: Tensor, sums: Tensor, parts: int, nnz: int) -> None:
    lanes, dim = out.shape
    require_library().sp_gather_lanes(out.data_ptr(), out.stride(0), sums.data_ptr(), parts, lanes, dim, nnz**-0.5)


def _add_rows_(out: Tensor, rows: Tensor, offset: int, matrix: NativeMap) -> None:
    """One example after the other; the examples are split among threads."""
    batch, count = rows.shape

    def some(first: int, last: int) -> None:
        require_library().sp_add_rows(
            address(out, first, 0),
            out.stride(0),
            address(rows, first, 0),
            rows.stride(0),
            last - first,
            count,
            offset,
            matrix,
            matrix.nnz**-0.5,
        )

    share_rows(batch, some, 0.5 * batch * count * matrix.nnz)


def last_contiguous(x: Tensor) -> Tensor:
    """X (B, T, n), copied unless its last axis is contiguous."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def address(x: Tensor, first: int, column: int) -> int:
    """Of element (first, ..., column) of float32 numbers whose last axis is contiguous."""
    return x.data_ptr() + 4 * (first * x.stride(0) + column)


def _scale_address(scale: Tensor | None, first: int) -> int | None:
    return None if scale is None else scale.data_ptr() + 4 * first
