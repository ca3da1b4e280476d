"""The tensor sketch of outer products of halves in the frequency domain, in one kernel on GPUs (needs triton).

A program owns some steps of one example. It reads a step's two factors once, in order, and permutes them to their
sketches x and y through shared memory; transforms z = x + iy by two products with small matrices of cosines and sines
on tensor cores; and adds z^2 to sums in registers, as `tensor_spectral.py` explains. Between the factors and the sums
nothing is written.

With k = L M, entry j1 M + j2 and frequency f1 + L f2: a product with the L x L matrix along j1, a turn by
exp(-2 pi i f1 j2 / k), and one with the M x M matrix along j2. Both sketches are first divided by their norms,
so that neither drowns in the other's rounding, and all numbers fit half precision, which rounds each to 2^-11.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
import functools
from math import pi

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tensor_map import SPLITS, TensorMap
from .triton_device import ceil_div, on_device, source_of_columns

__all__ = ["add_spectra_triton_"]

_WARPS = {1024: 4, 2048: 4, 4096: 4, 8192: 8}
_PROGRAMS = 264  # two for each processor of a large GPU: there is room for no more
_FEWEST_STEPS = 8  # of a program: its sums are written and read once more


@triton.jit
def _sketch(base, sources, length, stride, K: tl.constexpr):
    """Sketch (K,) of one factor of one step."""
    column = tl.arange(0, K)
    total = tl.zeros((K,), dtype=tl.float32)
    for first in range(0, length, K):
        x = tl.load(base + (first + column).to(tl.int64) * stride, mask=first + column < length, other=0.0)
        source = tl.load(sources + first + column)
        x = tl.gather(x.to(tl.float32), (source & 0x7FFF).to(tl.int32), 0)
        total += tl.where(source < 0, -x, x)
    return total


@triton.jit
def _halved(x, L: tl.constexpr, M: tl.constexpr):
    """X (K,) over its norm, as (L, M) in half precision; and that norm.

    By its largest entry alone a factor of one spike would drown in the rounding of one that is spread.
    """
    most = tl.max(tl.abs(x), 0)
    x /= tl.where(most > 0.0, most, 1.0)
    norm = tl.sqrt(tl.sum(x * x, 0))
    return tl.reshape((x / tl.where(norm > 0.0, norm, 1.0)).to(tl.float16), (L, M)), most * norm


@triton.jit
def _spectra_kernel(
    partials,
    left,
    right,
    left_sources,
    right_sources,
    first_waves,
    turns,
    second_waves,
    o,
    i,
    left_b,
    left_t,
    left_stride,
    right_b,
    right_t,
    right_stride,
    batch,
    steps,
    per_part,
    L: tl.constexpr,
    M: tl.constexpr,
):
    example = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row, column = tl.arange(0, L), tl.arange(0, M)
    at_first = row[:, None] * L + row[None, :]
    cosine, sine = tl.load(first_waves + at_first), tl.load(first_waves + L * L + at_first)
    minus_sine = tl.load(first_waves + 2 * L * L + at_first)
    at_second = column[:, None] * M + column[None, :]
    other_cosine, other_sine = tl.load(second_waves + at_second), tl.load(second_waves + M * M + at_second)
    minus_other = tl.load(second_waves + 2 * M * M + at_second)
    place = row[:, None] * M + column[None, :]
    re_sum, im_sum = tl.zeros((L, M), dtype=tl.float32), tl.zeros((L, M), dtype=tl.float32)
    begin = part * per_part
    left += example * left_b + begin.to(tl.int64) * left_t
    right += example * right_b + begin.to(tl.int64) * right_t
    for _ in range(begin, min(steps, begin + per_part)):
        x, norm_x = _halved(_sketch(left, left_sources, o, left_stride, L * M), L, M)
        y, norm_y = _halved(_sketch(right, right_sources, i, right_stride, L * M), L, M)
        left += left_t
        right += right_t
        re = tl.dot(sine, y, tl.dot(cosine, x))
        im = tl.dot(minus_sine, x, tl.dot(cosine, y))
        turn_cosine, turn_sine = tl.load(turns + place), tl.load(turns + L * M + place)
        turned_re = (re * turn_cosine + im * turn_sine).to(tl.float16)
        turned_im = (im * turn_cosine - re * turn_sine).to(tl.float16)
        re = tl.dot(turned_im, other_sine, tl.dot(turned_re, other_cosine))
        im = tl.dot(turned_re, minus_other, tl.dot(turned_im, other_cosine))
        weight = norm_x * norm_y
        re_sum += weight * (re * re - im * im)
        im_sum += (2.0 * weight) * (re * im)
    to = partials + 2 * ((part.to(tl.int64) * batch + example) * L * M + place)
    tl.store(to, re_sum)
    tl.store(to + 1, im_sum)


def add_spectra_triton_(spectrum: Tensor, left: Tensor, right: Tensor, matrix: TensorMap) -> None:
    """Add sum_t F(x_t + i y_t)^2 to spectrum (B, k) complex64, x and y the sketches of both factors of each step.

    For left (B, T, o) and right (B, T, i) in half precision, of any strides, and k of `SPLITS`.
    """
    (batch, steps, _), (first, second) = left.shape, SPLITS[matrix.dim]
    parts = max(1, min(_PROGRAMS // batch, steps // _FEWEST_STEPS))  # one wave of programs: a second would wait
    parts = ceil_div(steps, ceil_div(steps, parts))
    partials = torch.empty(parts, batch, first, second, 2, device=spectrum.device, dtype=torch.float32)
    _fill(partials, _in_order(left), _in_order(right), matrix)
    sums = torch.view_as_complex(partials.sum(0) if parts > 1 else partials[0])
    spectrum.view(batch, second, first).add_(sums.transpose(1, 2))  # frequency f1 + L f2


def _in_order(factor: Tensor) -> Tensor:
    """The factor with each step's entries side by side: read across steps it took ten times as long."""
    return factor if factor.stride(2) == 1 else factor.contiguous()


@on_device
def _fill(partials: Tensor, left: Tensor, right: Tensor, matrix: TensorMap) -> None:
    parts, batch, first, second, _ = partials.shape
    sources = (_signed_sources(table, matrix.dim) for table in matrix.tables(partials.device))
    (o, i), steps = matrix.shape, left.shape[1]
    _spectra_kernel[(batch, parts)](
        partials, left, right, *sources, *_waves(first, second, str(partials.device)), o, i, *left.stride(),
        *right.stride(), batch, steps, ceil_div(steps, parts), L=first, M=second, num_warps=_WARPS[matrix.dim],
        enable_fp_fusion=True,
    )  # fmt: skip


@functools.lru_cache(maxsize=1 << 13)  # tables are kept by their maps, and so are these
def _signed_sources(entries: Tensor, dim: int) -> Tensor:
    """For each block and column the entry of the block that goes there, int16, bit 15 set where its sign is -1."""
    sources = source_of_columns(entries, dim)
    blocks = torch.arange(0, len(sources), dim, device=sources.device).repeat_interleave(dim)
    negative = torch.nn.functional.pad(entries < 0, (0, len(sources) - len(entries)))[blocks + sources]
    return (sources - (negative.int() << 15)).to(torch.int16)


@functools.lru_cache(maxsize=16)
def _waves(first: int, second: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines, sines and negative sines in halves: (3, L, L), (3, L, M) of the turns between, and (3, M, M)."""

    def circle(rows: int, columns: int, whole: int) -> Tensor:
        # Reduced as integers, so that no angle loses digits.
        turns = torch.outer(torch.arange(rows, device="cpu"), torch.arange(columns, device="cpu")) % whole
        angle = turns.float() * (2 * pi / whole)
        return torch.stack([angle.double().cos(), angle.double().sin(), -angle.double().sin()]).to(device)

    return (
        circle(first, first, first).half(),
        circle(first, second, first * second).half(),
        circle(second, second, second).half(),
    )
