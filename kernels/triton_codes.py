"""Scores of packed codes on GPUs: their bytes are read once, and become levels in registers (needs triton).

Up to sixteen queries are multiplied in float32, as `triton_scoring` does it for numbers. More meet the levels in tensor
cores, as three products of TensorFloat-32 that make one of float32 ("tf32x3": the error of a product is 2⁻²², and an
infinite query stays infinite). With TRITON_INTERPRET=1 set before this module is imported the kernels run on the CPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import PackedRows
from .triton_device import ceil_div, interpreted, on_device

__all__ = ["score_packed"]

_FEW = 16  # most queries without tensor cores
_SUMS = {1: 4096, 2: 4096, 4: 4096, 8: 8192, 16: 8192}  # in a program's registers, by queries
_BYTES = 64  # of a row, next to each other
_TILE = (64, 128, 32)  # queries, rows and bytes of a row for tensor cores


@triton.jit  # type: ignore[untyped-decorator]
def _levels_of(codes, levels, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Levels of codes int32: by choices where there are few, else from the table, which is in the first-level cache."""
    if BITS == 1:
        return tl.where(codes == 0, tl.load(levels), tl.load(levels + 1))
    if BITS == 2:
        low = tl.where((codes & 1) == 0, tl.load(levels), tl.load(levels + 1))
        high = tl.where((codes & 1) == 0, tl.load(levels + 2), tl.load(levels + 3))
        return tl.where(codes < 2, low, high)
    return tl.load(levels + codes)


@triton.jit  # type: ignore[untyped-decorator]
def _few_kernel(  # type: ignore[no-untyped-def]
    out, queries, rows, row_stride, scale, levels, count, n, width,
    SCALED: tl.constexpr, BITS: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Queries are (count, 8 / BITS, width): number `place` of every byte beside each other."""
    q, r, byte = tl.arange(0, BQ), tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BW)
    at_rows = rows + r[None, :, None].to(tl.int64) * row_stride
    at_queries = queries + q[:, None, None].to(tl.int64) * (8 // BITS * width)
    sums = tl.zeros((BQ, BN, BW), dtype=tl.float32)
    for start in range(0, width, BW):
        at = (start + byte)[None, None, :]
        codes = tl.load(at_rows + at, mask=(r < n)[None, :, None] & (at < width), other=0).to(tl.int32)
        for place in tl.static_range(8 // BITS):
            y = _levels_of((codes >> (BITS * place)) & ((1 << BITS) - 1), levels, BITS)
            there = (q < count)[:, None, None] & (at < width)
            sums += tl.load(at_queries + place * width + at, mask=there, other=0.0) * y
    _store(out, tl.sum(sums, axis=2), scale, q, r, count, n, SCALED)


@triton.jit  # type: ignore[untyped-decorator]
def _many_kernel(  # type: ignore[no-untyped-def]
    out, queries, rows, row_stride, scale, levels, count, n, width,
    SCALED: tl.constexpr, BITS: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """The same by tensor cores; programs of the same rows follow each other, and share their bytes."""
    q, r = tl.program_id(0) * BQ + tl.arange(0, BQ), tl.program_id(1) * BN + tl.arange(0, BN)
    at_rows = rows + r[None, :].to(tl.int64) * row_stride
    at_queries = queries + q[:, None].to(tl.int64) * (8 // BITS * width)
    sums = tl.zeros((BQ, BN), dtype=tl.float32)
    for start in range(0, width, BW):
        at = start + tl.arange(0, BW)
        codes = tl.load(at_rows + at[:, None], mask=(r < n)[None, :] & (at < width)[:, None], other=0).to(tl.int32)
        for place in range(8 // BITS):
            y = _levels_of((codes >> (BITS * place)) & ((1 << BITS) - 1), levels, BITS)  # (BW, BN)
            there = (q < count)[:, None] & (at < width)[None, :]
            x = tl.load(at_queries + place * width + at[None, :], mask=there, other=0.0)
            sums = tl.dot(x, y, sums, input_precision="tf32x3")
    _store(out, sums, scale, q, r, count, n, SCALED)


@triton.jit  # type: ignore[untyped-decorator]
def _store(out, scores, scale, q, r, count, n, SCALED: tl.constexpr):  # type: ignore[no-untyped-def]
    if SCALED:
        scores *= tl.load(scale + r, mask=r < n, other=0.0)[None, :]
    tl.store(out + q[:, None].to(tl.int64) * n + r[None, :], scores, mask=(q < count)[:, None] & (r < n)[None, :])


def score_packed(queries: Tensor, rows: PackedRows, scale: Tensor | None) -> Tensor:
    """scale_r · q·row_r for all queries and rows: ``(Q, n)`` float32."""
    out = torch.empty(len(queries), len(rows), device=rows.device, dtype=torch.float32)
    if out.numel():
        per, width = 8 // rows.bits, rows.codes.shape[1]
        padded = torch.nn.functional.pad(queries, (0, per * width - rows.k))
        by_place = padded.view(len(queries), width, per).transpose(1, 2).contiguous()
        _score_into(out, by_place, rows, scale)
    return out


@on_device
def _score_into(out: Tensor, queries: Tensor, rows: PackedRows, scale: Tensor | None) -> None:
    (count, n), codes = out.shape, rows.codes if rows.codes.stride(1) == 1 else rows.codes.contiguous()
    given = queries if scale is None else scale.contiguous()  # a pointer that is not read
    width, levels = codes.shape[1], torch.tensor(rows.levels, device=out.device, dtype=torch.float32)
    arguments = out, queries, codes, codes.stride(0), given, levels, count, n, width
    options = {"SCALED": scale is not None, "BITS": rows.bits, "enable_fp_fusion": True}
    if count > _FEW:
        bq, bn, bw = _TILE
        grid = ceil_div(count, bq), ceil_div(n, bn)
        _many_kernel[grid](*arguments, BQ=bq, BN=bn, BW=bw, num_warps=8, **options)
        return
    bq, bw = triton.next_power_of_2(count), min(_BYTES, triton.next_power_of_2(width))
    bn = 1024 if interpreted() else _SUMS[bq] // (bq * bw)  # the interpreter's time goes by programs
    _few_kernel[(ceil_div(n, bn),)](*arguments, BQ=bq, BN=bn, BW=bw, num_warps=4 if bq < 8 else 8, **options)
