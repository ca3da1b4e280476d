"""What normalisations need, in one read of a layer's input and of its output's gradient on GPUs (needs triton).

With y = weight * n + bias, n the normalised input, an example's gradients are the sums of g * n and of g over its
positions. Torch would write n, and its product with g, in float32.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_device import ceil_div, interpreted, on_device

__all__ = ["channel_sums_triton", "row_sums_triton"]

_PROGRAMS = 1024  # about as many as fill a large GPU several times
_FEWEST_ROWS = 8  # of a program: its sums are written and read once more
_TILE = 4096  # numbers of channels and positions that a program reads at once


@triton.jit
def _rows_kernel(sums, x, g, batch, rows, width, per_part, eps, CENTRED: tl.constexpr, WIDTH: tl.constexpr):
    example, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, WIDTH)
    there = column < width
    weight, bias = tl.zeros((WIDTH,), dtype=tl.float32), tl.zeros((WIDTH,), dtype=tl.float32)
    for row in range(part * per_part, min(rows, (part + 1) * per_part)):
        at = (example * rows + row) * width + column
        own = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
        gradient = tl.load(g + at, mask=there, other=0.0).to(tl.float32)
        if CENTRED:
            own = tl.where(there, own - tl.sum(own, 0) / width, 0.0)
        own *= 1.0 / tl.sqrt(tl.sum(own * own, 0) / width + eps)
        weight += gradient * own
        bias += gradient
    at = sums + (part.to(tl.int64) * batch + example) * 2 * width + column
    tl.store(at, weight, mask=there)
    tl.store(at + width, bias, mask=there)


def row_sums_triton(x: Tensor, g: Tensor, eps: float, *, centred: bool) -> tuple[Tensor, Tensor]:
    """Sums over r of g[b, r] n[b, r] and of g[b, r], both (B, D) float32, for x and g (B, R, D) of any types.

    n is the input over its root mean square along D; centred: less its mean, before.
    """
    batch, rows, width = x.shape
    parts = max(1, min(ceil_div(_PROGRAMS, batch), rows // _FEWEST_ROWS))
    per_part = ceil_div(rows, parts)
    sums = torch.empty(ceil_div(rows, per_part), batch, 2, width, device=x.device, dtype=torch.float32)
    _sum_rows(sums, x.contiguous(), g.contiguous(), per_part, eps, centred)
    weight, bias = sums.sum(0).unbind(1)
    return weight, bias


@on_device
def _sum_rows(sums: Tensor, x: Tensor, g: Tensor, per_part: int, eps: float, centred: bool) -> None:
    (parts, batch, _, width), block = sums.shape, triton.next_power_of_2(sums.shape[3])
    _rows_kernel[(batch, parts)](
        sums, x, g, batch, x.shape[1], width, per_part, eps, CENTRED=centred, WIDTH=block,
        num_warps=max(1, min(16, block // 256)), enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit
def _channels_kernel(
    sums, x, g, mean, scale, batch, channels, positions, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr
):
    example = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    own_mean = tl.load(mean + channel, mask=known, other=0.0)[:, None]
    own_scale = tl.load(scale + channel, mask=known, other=0.0)[:, None]
    begin = ((example * channels + channel) * positions)[:, None]
    weight = tl.zeros((CHANNELS, POSITIONS), dtype=tl.float32)
    bias = tl.zeros((CHANNELS, POSITIONS), dtype=tl.float32)
    for first in range(0, positions, POSITIONS):
        position = (first + tl.arange(0, POSITIONS))[None, :]
        there = known[:, None] & (position < positions)
        own = tl.load(x + begin + position, mask=there, other=0.0).to(tl.float32)
        gradient = tl.load(g + begin + position, mask=there, other=0.0).to(tl.float32)
        weight += gradient * ((own - own_mean) * own_scale)
        bias += gradient
    at = sums + example * channels + channel
    tl.store(at, tl.sum(weight, 1), mask=known)
    tl.store(at + tl.cast(batch, tl.int64) * channels, tl.sum(bias, 1), mask=known)


def channel_sums_triton(x: Tensor, g: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over p of g[b, c, p] n[b, c, p] and of g[b, c, p], both (B, C) float32, for x and g (B, C, P) of any types.

    n = (x - mean) scale, with mean and scale (C,) float32.
    """
    sums = torch.empty(2, *x.shape[:2], device=x.device, dtype=torch.float32)
    _sum_channels(sums, x.contiguous(), g.contiguous(), mean.contiguous(), scale.contiguous())
    weight, bias = sums
    return weight, bias


@on_device
def _sum_channels(sums: Tensor, x: Tensor, g: Tensor, mean: Tensor, scale: Tensor) -> None:
    batch, channels, positions = x.shape
    tile = 1 << 16 if interpreted() else _TILE
    across = min(tile, triton.next_power_of_2(positions))
    together = max(1, min(tile // across, triton.next_power_of_2(channels)))
    _channels_kernel[(batch, ceil_div(channels, together))](
        sums, x, g, mean, scale, batch, channels, positions, CHANNELS=together, POSITIONS=across, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip
