"""Scores and the strongest rows on GPUs: stored rows are read as they are, and converted in registers (needs triton).

For up to sixteen queries a kernel reads each row once and multiplies it by all of them, in float32, at the speed of
memory. For more the vendor's product of a block of rows serves, in full float32 precision (never TF32, unless torch is
told so): float32 rows as they are; int8 and float16 rows as halves, which hold them exactly, by three halves that sum
to a query, whose products tensor cores sum in float32, far faster than float32 products could be. Packed codes have
kernels of their own (`triton_codes`).

The search scores blocks of rows, and forgets a block but for its best before the next: no Q x N matrix is ever there.
With TRITON_INTERPRET=1 set before this module is imported the kernels run on the CPU, for tests.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import PackedRows
from .scoring_torch import Rows, StrongestTorch, score_torch
from .tiles import product_of_halves
from .triton_codes import score_packed
from .triton_device import ceil_div, interpreted, on_device

__all__ = ["StrongestTriton", "score_triton"]

_BLOCK = 1 << 24  # scores of a block: 64 MiB
_FEW = 16  # most queries of the kernel; for more the products cost more than the reads
_CONVERTED = 1 << 14  # rows that are converted at once for a product
_SUMS = {1: 8192, 2: 8192, 4: 8192, 8: 16384, 16: 16384}  # sums in a program's registers, by queries
_COLUMNS = {1: 256, 2: 256, 4: 128, 8: 128, 16: 128}  # of them next to each other


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
    STAGES: tl.constexpr,
):
    """Sums are kept for each column of a tile, and added up at the end: within the loop threads do not meet.

    On an H100 one query reads int8, float16 and float32 rows at 3.0 TB/s, as fast as torch sums them; reading ahead
    (STAGES) is worth a tenth there, and halves the speed for four queries and more.
    """
    q, r, c = tl.arange(0, BQ), tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    at_queries = queries + q[:, None, None].to(tl.int64) * query_stride
    at_rows = rows + r[None, :, None].to(tl.int64) * row_stride
    sums = tl.zeros((BQ, BN, BK), dtype=tl.float32)
    for start in tl.range(0, dim, BK, num_stages=STAGES):
        column = (start + c)[None, None, :]
        x = tl.load(at_queries + column, mask=(q < count)[:, None, None] & (column < dim), other=0.0)
        y = tl.load(at_rows + column, mask=(r < n)[None, :, None] & (column < dim), other=0).to(tl.float32)
        sums += x * y
    scores = tl.sum(sums, axis=2)
    if SCALED:
        scores *= tl.load(scale + r, mask=r < n, other=0.0)[None, :]
    tl.store(out + q[:, None].to(tl.int64) * n + r[None, :], scores, mask=(q < count)[:, None] & (r < n)[None, :])


def score_triton(queries: Tensor, rows: Rows, scale: Tensor | None) -> Tensor:
    """scale_r · q·row_r for all queries and rows: ``(Q, n)`` float32."""
    if isinstance(rows, PackedRows):
        return score_packed(queries, rows, scale)
    out = torch.empty(len(queries), len(rows), device=rows.device, dtype=torch.float32)
    if len(queries) <= _FEW:
        if out.numel():
            _score_into(out, queries, rows, scale)
        return out
    parts = None if rows.dtype == torch.float32 else _three_halves(queries, rows.dtype)
    for start in range(0, len(rows), _CONVERTED):
        part = slice(start, start + _CONVERTED)
        own = None if scale is None else scale[part]
        if parts is None:
            out[:, part] = score_torch(queries, rows[part], own)
        else:
            _multiply_into(out[:, part], *parts, rows[part], own)
    return out


def _three_halves(queries: Tensor, stored: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Three halves whose sum is a number of the queries, (3 Q, k), and what a query was divided by, (Q, 1).

    In bfloat16, for int8 rows, they are the number to the last bit. In float16, for rows of that type, a query is
    divided by the power of two that brings its largest number just below 2^14: the third half then loses less than
    2^-38 of the largest.
    """
    unit, dtype = None, torch.bfloat16
    if stored == torch.float16:
        dtype, largest = torch.float16, queries.abs().amax(1, keepdim=True)
        unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 14)
        unit = torch.where(largest.isfinite() & (unit > 0), unit, 1.0)
        queries = queries / unit
    parts, rest = [], queries
    for _ in range(3):
        parts.append(rest.to(dtype))
        rest = (rest - parts[-1].float()).nan_to_num(0.0)  # an infinity is in the first half alone
    return torch.cat(parts), unit


def _multiply_into(out: Tensor, parts: Tensor, unit: Tensor | None, rows: Tensor, scale: Tensor | None) -> None:
    products = torch.empty(len(parts), len(rows), device=rows.device, dtype=torch.float32)
    product_of_halves(parts, rows.to(parts.dtype).T, products)
    torch.sum(products.view(3, *out.shape), 0, out=out)
    for factor in (unit, scale):
        if factor is not None:
            out.mul_(factor)


@on_device
def _score_into(out: Tensor, queries: Tensor, rows: Tensor, scale: Tensor | None) -> None:
    queries = queries if queries.stride(1) == 1 else queries.contiguous()
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    given = queries if scale is None else scale.contiguous()  # a pointer that is not read
    bq = triton.next_power_of_2(len(queries))
    bk = min(_COLUMNS[bq], max(16, triton.next_power_of_2(rows.shape[1])))
    bn = 1024 if interpreted() else _SUMS[bq] // (bq * bk)  # the interpreter's time goes by programs
    _score_kernel[(ceil_div(len(rows), bn),)](
        out, queries, queries.stride(0), rows, rows.stride(0), given, *out.shape, rows.shape[1],
        SCALED=scale is not None, BQ=bq, BN=bn, BK=bk, STAGES=3 if bq < 4 else 1, num_warps=4 if bq < 8 else 8,
        enable_fp_fusion=True,
    )  # fmt: skip


class StrongestTriton(StrongestTorch):
    """See `Strongest`: the kernels' scores, searched by torch in blocks."""

    def _height(self, queries: Tensor, dim: int) -> int:  # noqa: ARG002
        height = max(1, _BLOCK // len(queries))
        return height - (height % _CONVERTED if height > _CONVERTED else 0)

    def _score(self, queries: Tensor, rows: Rows, scale: Tensor | None) -> Tensor:
        return score_triton(queries, rows, scale)
