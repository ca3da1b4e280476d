"""Scores and the strongest rows on GPUs: each stored row is read once and converted in registers (needs triton).

A program of the search goes through a range of rows, with some queries' best of that range in its registers; what the
programs found is merged by torch. As a rule no score of a tile is among the best, and the tile is forgotten at the cost
of one comparison. That serves up to sixteen queries; for more, torch multiplies blocks converted to float32, and
searches their scores. Products are those of float32 ("ieee"), never of TF32, as everywhere in this package.

With TRITON_INTERPRET=1 set before this module is imported the kernels run on the CPU, for tests.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .scoring_torch import StrongestTorch, nan_error, score_torch
from .triton_device import on_device

__all__ = ["StrongestTriton", "score_triton"]

_NONE = 2**31 - 1  # stands for no row: the weakest of equal scores
_KEEP = 64  # most rows that are kept in registers; beyond it torch searches blocks of scores
_ROWS, _COLUMNS = 64, 64  # of a tile
_PROGRAMS = 1024  # about as many as fill a large GPU several times
_BLOCK = 1 << 24  # scores of a block: 64 MiB
_FUSED = 16  # most queries of these kernels: tiles for more of them spill, and the vendor's product is faster
_CONVERTED = 1 << 14  # rows that are converted to float32 at once for that product


@triton.jit  # type: ignore[untyped-decorator]
def _tile(  # type: ignore[no-untyped-def]
    queries,
    query_stride,
    rows,
    row_stride,
    scale,
    q,
    r,
    count,
    n,
    dim,
    SCALED: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Scores ``(BQ, BN)`` of queries q with rows r; those beyond count or n are 0."""
    total = tl.zeros((BQ, BN), dtype=tl.float32)
    for start in range(0, dim, BK):
        c = start + tl.arange(0, BK)
        x_there = (q < count)[:, None] & (c < dim)[None, :]
        y_there = (r < n)[:, None] & (c < dim)[None, :]
        x = tl.load(queries + q[:, None].to(tl.int64) * query_stride + c[None, :], mask=x_there, other=0.0)
        y = tl.load(rows + r[:, None].to(tl.int64) * row_stride + c[None, :], mask=y_there, other=0).to(tl.float32)
        if BQ < 16:  # too few for a matrix product
            total += tl.sum(x[:, None, :] * y[None, :, :], axis=2)
        else:
            total = tl.dot(x, tl.trans(y), total, input_precision="ieee")
    if SCALED:
        total *= tl.load(scale + r, mask=r < n, other=0.0)[None, :]
    return total


@triton.jit  # type: ignore[untyped-decorator]
def _score_kernel(  # type: ignore[no-untyped-def]
    out,
    queries,
    query_stride,
    rows,
    row_stride,
    scale,
    count,
    n,
    dim,
    SCALED: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    q = tl.program_id(0) * BQ + tl.arange(0, BQ)
    r = tl.program_id(1) * BN + tl.arange(0, BN)
    scores = _tile(queries, query_stride, rows, row_stride, scale, q, r, count, n, dim, SCALED, BQ, BN, BK)
    tl.store(out + q[:, None].to(tl.int64) * n + r[None, :], scores, mask=(q < count)[:, None] & (r < n)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _best_kernel(  # type: ignore[no-untyped-def]
    values_out,
    rows_out,
    bad,
    queries,
    query_stride,
    rows,
    row_stride,
    scale,
    count,
    n,
    dim,
    step,
    k,
    sign,
    NONE: tl.constexpr,
    SCALED: tl.constexpr,
    KEEP: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The k best of each query among rows [program * step, (program + 1) * step); step is a multiple of BN."""
    q = tl.program_id(0) * BQ + tl.arange(0, BQ)
    slots = tl.arange(0, KEEP)
    # Slots beyond k hold what nothing can be better than, so that they are never given away.
    best = tl.zeros((BQ, KEEP), dtype=tl.float32) + tl.where(slots < k, -float("inf"), float("inf"))[None, :]
    where = tl.zeros((BQ, KEEP), dtype=tl.int32) + tl.where(slots < k, NONE, -1)[None, :]
    begin = tl.program_id(1) * step
    for start in range(begin, tl.minimum(begin + step, n), BN):
        r = start + tl.arange(0, BN)
        scores = _tile(queries, query_stride, rows, row_stride, scale, q, r, count, n, dim, SCALED, BQ, BN, BK) * sign
        there = (q < count)[:, None] & (r < n)[None, :]
        nan = (scores != scores) & there
        first_nan = tl.min(tl.min(tl.where(nan, r[None, :], NONE), axis=1), axis=0)
        if first_nan < NONE:
            tl.atomic_min(bad, first_nan)
        scores = tl.where(there & (scores == scores), scores, -float("inf"))
        name = tl.where(there, r[None, :], NONE)
        going = 1
        while going > 0:
            top = tl.max(scores, axis=1)
            top_row = tl.min(tl.where(scores == top[:, None], name, NONE), axis=1)
            worst = tl.min(best, axis=1)
            worst_row = tl.max(tl.where(best == worst[:, None], where, -1), axis=1)
            takes = (top > worst) | ((top == worst) & (top_row < worst_row))
            match = (best == worst[:, None]) & (where == worst_row[:, None])
            slot = tl.min(tl.where(match, slots[None, :], KEEP), axis=1)
            put = (slots[None, :] == slot[:, None]) & takes[:, None]
            best = tl.where(put, top[:, None], best)
            where = tl.where(put, top_row[:, None], where)
            taken = (name == top_row[:, None]) & takes[:, None]
            scores = tl.where(taken, -float("inf"), scores)
            name = tl.where(taken, NONE, name)
            going = tl.max(takes.to(tl.int32), axis=0)
    out = (q[:, None].to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * k + slots[None, :]
    mask = (q < count)[:, None] & (slots < k)[None, :]
    tl.store(values_out + out, best, mask=mask)
    tl.store(rows_out + out, where, mask=mask)


def score_triton(queries: Tensor, rows: Tensor, scale: Tensor | None) -> Tensor:
    """scale_r · q·row_r for all queries and rows: ``(Q, n)`` float32."""
    out = torch.empty(len(queries), len(rows), device=rows.device)
    if len(queries) > _FUSED:
        for start in range(0, len(rows), _CONVERTED):
            part = slice(start, start + _CONVERTED)
            out[:, part] = score_torch(queries, rows[part], None if scale is None else scale[part])
    elif out.numel():
        _score_into(out, queries, rows, scale)
    return out


@on_device
def _score_into(out: Tensor, queries: Tensor, rows: Tensor, scale: Tensor | None) -> None:
    arguments, blocks = _operands(queries, rows, scale)
    grid = (triton.cdiv(len(queries), blocks["BQ"]), triton.cdiv(len(rows), _ROWS))
    _score_kernel[grid](out, *arguments, **blocks, enable_fp_fusion=True)


@on_device
def _best_into(values: Tensor, grid: tuple[int, int], *arguments: Any, **blocks: Any) -> None:
    _best_kernel[grid](values, *arguments, **blocks, enable_fp_fusion=True)


class StrongestTriton(StrongestTorch):
    """See `Strongest`: the search in registers for small k, torch's in blocks of scores for others."""

    def __init__(self, count: int, k: int, largest: bool, device: torch.device) -> None:
        super().__init__(count, k, largest, device)
        self._seen = 0

    def add(self, queries: Tensor, rows: Tensor, scale: Tensor | None, first: int) -> None:
        """Offer rows."""
        if self._k > _KEEP or len(queries) > _FUSED:
            height = max(_ROWS, _BLOCK // len(queries))
            for start in range(0, len(rows), height):
                part = slice(start, start + height)
                scores = score_triton(queries, rows[part], None if scale is None else scale[part])
                self.add_scores(scores, None, first + start)
            return
        arguments, blocks = _operands(queries, rows, scale)
        groups, tiles = triton.cdiv(len(queries), blocks["BQ"]), triton.cdiv(len(rows), _ROWS)
        step = triton.cdiv(tiles, max(1, _PROGRAMS // groups)) * _ROWS
        programs = triton.cdiv(len(rows), step)
        values = torch.empty(len(queries), programs * self._k, device=rows.device)
        found = torch.empty(values.shape, dtype=torch.int32, device=rows.device)
        bad = torch.full((1,), _NONE, dtype=torch.int32, device=rows.device)
        keep = triton.next_power_of_2(self._k)
        _best_into(
            values, (groups, programs), found, bad, *arguments, step, self._k, self._sign, NONE=_NONE, KEEP=keep,
            **blocks,
        )  # fmt: skip
        if int(bad) < _NONE:
            raise nan_error(first + int(bad))
        self._seen += len(rows)
        # An empty slot comes after every row, those of later calls included.
        self.merge(values, torch.where(found == _NONE, 2**62, found.long() + first))

    def add_scores(self, scores: Tensor, scale: Tensor | None, first: int) -> None:
        """Offer given scores."""
        super().add_scores(scores, scale, first)
        self._seen += scores.shape[1]

    def result(self) -> tuple[Tensor, Tensor]:
        """Scores and rows, strongest first, without empty slots."""
        values, rows = super().result()
        there = min(self._k, self._seen)
        return values[:, :there], rows[:, :there]


def _operands(queries: Tensor, rows: Tensor, scale: Tensor | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the operands, and block sizes."""
    if len(rows) >= _NONE:
        raise ValueError(f"got {len(rows)} rows at once; offer fewer than {_NONE} a call")
    queries = queries if queries.stride(1) == 1 else queries.contiguous()
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    scale = None if scale is None else scale.contiguous()
    few = triton.next_power_of_2(len(queries))
    blocks = {
        "SCALED": scale is not None,
        "BQ": few if few <= 4 else 16,
        "BN": _ROWS,
        "BK": _COLUMNS if few <= 4 or rows.dtype == torch.float32 else _COLUMNS // 2,
    }
    sizes = (len(queries), len(rows), rows.shape[1])
    given = queries if scale is None else scale  # a pointer that is not read
    return (queries, queries.stride(0), rows, rows.stride(0), given, *sizes), blocks
