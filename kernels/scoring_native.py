"""Launches the compiled kernels of scoring: which route, in which thread.

For few queries, and with AVX-512 for more of them, any number where rows are int8 or float16, an inner product is
summed by compiled code in an order of its own, whatever the number of queries and threads; else it is torch's matrix
product, whose order is that of its library.
"""

import ctypes
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .codes import PackedRows
from .native import aligned_scratch, require_library, run_jobs, share_rows
from .scoring_torch import Rows, nan_error

__all__ = ["StrongestNative", "score_native", "takes_product"]

_TYPES = {torch.float32: 0, torch.float16: 1, torch.int8: 2, torch.uint8: 3}  # the last are packed codes
_FEW = 32  # queries: SCORE_FEW of native.c
_FEW_OF_CODES = {1: _FEW, 2: 16, 4: 8}  # queries of packed codes, by bits
_LANES_FOR_ANY = {1: 8, 2: 16}  # by bits: of the instructions with which any number of queries is looked up
_WORTH_GROUPS = 4  # queries at once, the least with which more are taken in groups
_TABLES = 4 << 20  # bytes of several queries' tables: these stay in the last-level cache
_NUMBERS = 1 << 21  # of a block of rows in float32: 8 MiB, which stay in the last-level cache
_BLOCK_SCORES = 1 << 21  # of its product with the queries, likewise
_MANY = 128  # queries of float32 rows that are multiplied in registers with AVX-512
_LANES = 16  # of AVX-512
_HEIGHT = (64, 2048)  # rows of a block, at least and at most
_JOB_BYTES = 4 << 20  # of rows, the least that is worth a job of at most _FEW queries
_CACHED_BYTES = 1 << 20  # of rows that meet all queries, _FEW at a time, while they are in a core's own cache


class _Few(NamedTuple):
    """What the compiled code takes: queries or their tables, rows or their codes, both contiguous along a row."""

    queries: Tensor
    rows: Tensor

    @classmethod
    def of(cls, queries: Tensor, rows: Rows) -> "_Few":
        if isinstance(rows, PackedRows):
            return cls(_nibble_sums(queries, rows), _last_contiguous(rows.codes))
        return cls(_last_contiguous(queries), _last_contiguous(rows))


def _nibble_sums(queries: Tensor, rows: PackedRows) -> Tensor:
    """For each half byte of the rows, the 16 sums that it can make with a query: ``(Q, table size)``."""
    queries, stride = _last_contiguous(queries), _table_size(rows)
    levels = torch.tensor(rows.levels, dtype=torch.float32, device="cpu")
    tables = torch.empty(len(queries), stride, dtype=torch.float32, device="cpu")

    def some(first: int, last: int) -> None:
        require_library().sp_nibbles(
            _address(tables, first), stride, _address(queries, first), queries.stride(0), last - first, rows.k,
            rows.bits, levels.data_ptr(),
        )  # fmt: skip

    share_rows(len(queries), some, 0.5 * tables.numel())
    return tables


def takes_product(count: int, rows: Rows) -> bool:
    """Whether so many queries are multiplied by torch's product of blocks, and not by dot products in registers.

    Measured at k = 4,096 on one core of Zen 4, where a large product runs at 95 to 99 GFLOP/s: dot products of int8
    rows run at 94 to 100 with 32 to 1,024 queries, since they convert rows in registers, and torch's product of
    converted blocks at 66 to 94; with two threads on two busy cores at 93 to 99 and 14 to 55. Of float32 rows, and of
    codes unpacked to them, they run at 88 with 64 queries, where torch has 80, at 89 with 128, where it has 90, and at
    83 with 1,024, where it has 95 to 99. With AVX2 they run at 55 to 62.
    """
    if count <= _FEW or require_library().sp_lanes() < _LANES:
        return count > _FEW
    return (isinstance(rows, PackedRows) or rows.dtype == torch.float32) and count > _MANY


def looked_up(count: int, rows: Rows) -> int:
    """How many of so many queries meet packed codes at once, by tables of their sums; 0 where rows are not looked up.

    Looking up takes time by the bytes of codes and the queries alone, and tables must stay in the cache. With AVX2, 8
    queries are 1.5 (4 bits), 3 (2) and 6 (1) times as fast as torch's product of unpacked blocks. With AVX-512, 4 bits
    and 9, 12 and 16 queries the dot products take 10, 11 and 12 ms for 8,000 rows of 4,096 numbers, 5 of them to
    unpack, where torch's product of the same blocks takes 15, 16 and 19. Of 64 and 1,000 queries, some at a time, 1
    bit is 3 and 2.5 times as fast as the product (with AVX2 a quarter faster), 2 bits with AVX-512 1.6 and 1.2 times.
    """
    if isinstance(rows, Tensor):
        return 0
    together = max(1, min(_FEW_OF_CODES[rows.bits], _TABLES // (4 * _table_size(rows))))
    lanes = _LANES_FOR_ANY.get(rows.bits, 2 * _LANES)
    any_number = require_library().sp_lanes() >= lanes and together >= _WORTH_GROUPS
    return together if any_number or count <= together else 0


def _table_size(rows: PackedRows) -> int:
    """Numbers of a query's table: 16 for each half byte of the rows' words of 32 bits."""
    return -(-rows.codes.shape[1] // 4) * 8 * 16


def score_native(queries: Tensor, rows: Rows, scale: Tensor | None) -> Tensor:
    """scale_r · q·row_r for all queries and rows: ``(Q, n)`` float32."""
    count, n, scale = len(queries), len(rows), _contiguous(scale)
    out = torch.empty(count, n, dtype=torch.float32, device="cpu")
    if not out.numel():
        return out
    if together := looked_up(count, rows):
        for asked in range(0, count, together):
            few = _Few.of(queries[asked : asked + together], rows)
            _score_few(out[asked : asked + together], *few, scale)
        return out
    product = takes_product(count, rows)
    if product:
        for start, stop, part in _blocks(rows, count, convert=True):
            torch.mm(queries, part.T, out=out[:, start:stop])
        return out if scale is None else out.mul_(scale)
    for start, stop, part in _pieces(rows, count):
        _score_few(out[:, start:stop], *_Few.of(queries, part), None if scale is None else scale[start:stop])
    return out


def _score_few(out: Tensor, taken: Tensor, stored: Tensor, scale: Tensor | None) -> None:
    """Fill (Q, n), contiguous along a row; more than _FEW queries are taken in groups of so many."""
    groups = range(0, len(taken), _FEW)
    bounds = _shares(stored, len(groups))
    step = len(stored) if len(groups) == 1 else max(1, _CACHED_BYTES // max(1, stored.shape[1] * stored.element_size()))

    def some(first: int, last: int) -> None:
        for row in range(first, last, step):
            for query in groups:
                require_library().sp_score(
                    out.data_ptr() + 4 * (query * out.stride(0) + row),
                    out.stride(0),
                    _address(taken, query),
                    taken.stride(0),
                    min(_FEW, len(taken) - query),
                    _address(stored, row),
                    stored.stride(0) * stored.element_size(),
                    _address(scale, row),
                    min(step, last - row),
                    stored.shape[1],
                    _TYPES[stored.dtype],
                )

    run_jobs([partial(some, *pair) for pair in pairwise(bounds)], _nanoseconds(len(taken), stored))


class StrongestNative:
    """See `Strongest`: a heap for each query, its root the weakest of what is kept.

    The lowest are the highest of the negated scores.
    """

    def __init__(self, count: int, k: int, largest: bool) -> None:
        self._k, self._sign = k, 1.0 if largest else -1.0
        self._heaps = _Heaps.empty(count, k, -torch.inf)

    def add(self, queries: Tensor, rows: Rows, scale: Tensor | None, first: int) -> None:
        """Offer rows."""
        count, scale = len(queries), _contiguous(scale)
        if together := looked_up(count, rows):
            for asked in range(0, count, together):
                few = _Few.of(queries[asked : asked + together], rows)
                self._add_few(*few, scale, first, asked)
            return
        product = takes_product(count, rows)
        if not product and count <= _FEW:
            for start, stop, part in _pieces(rows, count):
                own = None if scale is None else scale[start:stop]
                self._add_few(*_Few.of(queries, part), own, first + start, 0)
            return
        for start, stop, part in _blocks(rows, count, convert=product):
            block = aligned_scratch("scores", count * len(part)).view(count, len(part))
            if product:
                torch.mm(queries, part.T, out=block)
            else:
                _score_few(block, *_Few.of(queries, part), None)
            self.add_scores(block, None if scale is None else scale[start:stop], first + start)

    def _add_few(self, queries: Tensor, rows: Tensor, scale: Tensor | None, first: int, asked: int) -> None:
        """Of queries from `asked` on; each job has heaps of its own, which take no score that theirs would refuse."""
        heaps = self._heaps.part(asked, len(queries))
        bounds = _shares(rows, 1)
        pairs = list(pairwise(bounds))
        own = [heaps]
        if len(pairs) > 1:
            own = [_Heaps.empty(len(queries), min(self._k, b - a), heaps.threshold) for a, b in pairs]
        bad = (ctypes.c_int64 * len(pairs))()

        def some(job: int) -> None:
            a, b = pairs[job]
            require_library().sp_best(
                *own[job].arguments,
                queries.data_ptr(),
                queries.stride(0),
                len(queries),
                _address(rows, a),
                rows.stride(0) * rows.element_size(),
                _address(scale, a),
                b - a,
                rows.shape[1],
                _TYPES[rows.dtype],
                first + a,
                self._sign,
                ctypes.addressof(bad) + 8 * job,
            )

        run_jobs([partial(some, job) for job in range(len(pairs))], _nanoseconds(len(queries), rows))
        _refuse(bad)
        if len(pairs) > 1:
            for found in own:
                heaps.merge(found)

    def add_scores(self, scores: Tensor, scale: Tensor | None, first: int) -> None:
        """Offer given scores, times a scale for each row; the queries are shared among threads."""
        scores, scale = _last_contiguous(scores), _contiguous(scale)
        (count, n), threads = scores.shape, torch.get_num_threads()
        share = -(-count // min(count, threads))
        starts = range(0, count, share)
        bad = (ctypes.c_int64 * len(starts))()

        def some(job: int) -> None:
            query = starts[job]
            require_library().sp_keep(
                *self._heaps.part(query, share).arguments,
                _address(scores, query),
                scores.stride(0),
                _address(scale, 0),
                min(share, count - query),
                n,
                first,
                self._sign,
                ctypes.addressof(bad) + 8 * job,
            )

        run_jobs([partial(some, job) for job in range(len(starts))], 0.2 * count * n)
        _refuse(bad)

    def result(self) -> tuple[Tensor, Tensor]:
        """Scores and rows, strongest first."""
        there = int(self._heaps.filled.max()) if len(self._heaps.filled) else 0
        rows, order = self._heaps.row[:, :there].sort(1)
        values, by_value = self._heaps.value[:, :there].gather(1, order).sort(dim=1, descending=True, stable=True)
        return values * self._sign, rows.gather(1, by_value)


class _Heaps(NamedTuple):
    """What native_heap.c calls best: values and rows ``(count, k)``, how many are there, and thresholds."""

    value: Tensor
    row: Tensor
    filled: Tensor
    threshold: Tensor

    @classmethod
    def empty(cls, count: int, k: int, threshold: Tensor | float) -> "_Heaps":
        limits = torch.empty(count, dtype=torch.float32, device="cpu")
        limits[:] = threshold
        return cls(
            torch.empty(count, k, dtype=torch.float32, device="cpu"),
            torch.empty(count, k, dtype=torch.int64, device="cpu"),
            torch.zeros(count, dtype=torch.int64, device="cpu"),
            limits,
        )

    def part(self, first: int, count: int) -> "_Heaps":
        """Those of some queries, in the same memory."""
        return _Heaps(*(array[first : first + count] for array in self))

    @property
    def arguments(self) -> tuple[int, ...]:
        return *(array.data_ptr() for array in self), self.value.shape[1]

    def merge(self, other: "_Heaps") -> None:
        require_library().sp_merge(*self.arguments, len(self.filled), *other.arguments[:3], other.value.shape[1])


def _blocks(rows: Rows, count: int, *, convert: bool) -> Iterator[tuple[int, int, Tensor]]:
    """Blocks of rows; those that must become float32, as codes must, all in the same memory."""
    dim = rows.shape[1]
    height = min(max(_NUMBERS // max(1, dim), _HEIGHT[0]), max(_BLOCK_SCORES // count, _HEIGHT[0]), _HEIGHT[1])
    if isinstance(rows, PackedRows):
        yield from ((start, start + len(part), part) for start, part in rows.blocks(height))
        return
    for start in range(0, len(rows), height):
        part = rows[start : start + height]
        if convert and rows.dtype != torch.float32:
            part = aligned_scratch("rows", height * dim)[: part.numel()].view(part.shape).copy_(part)
        yield start, start + len(part), part


def _pieces(rows: Rows, count: int) -> Iterator[tuple[int, int, Tensor]]:
    """What dot products in registers take: rows as they are, all at once, or codes by unpacked blocks."""
    if isinstance(rows, PackedRows):
        yield from _blocks(rows, count, convert=False)
    else:
        yield 0, len(rows), rows


def _refuse(bad: "ctypes.Array[ctypes.c_int64]") -> None:
    found = [row for row in bad if row >= 0]
    if found:
        raise nan_error(min(found))


def _shares(rows: Tensor, groups: int) -> list[int]:
    """Bounds of the rows that jobs take, each with so many groups of queries."""
    n, size = len(rows), rows.shape[1] * rows.element_size()
    most = 2 * torch.get_num_threads() if torch.get_num_threads() > 1 else 1
    jobs = max(1, min(most, n * size * groups // _JOB_BYTES))
    step = -(-n // jobs)
    return [*range(0, n, step), n]


def _nanoseconds(count: int, rows: Tensor) -> float:
    return rows.numel() * max(0.04 * rows.element_size(), 0.025 * count)


def _address(x: Tensor | None, first: int) -> int | None:
    return None if x is None else x.data_ptr() + first * x.stride(0) * x.element_size()


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
