"""The dense matrix of signs on GPUs (needs triton): signs are made in registers, tensor cores multiply by them.

One call of Philox makes the 128 signs of a coordinate in as many columns, which a tile of examples then shares. Signs
are exact in half precision, so bfloat16 and float16 rows are multiplied as they are. A float32 row is the sum of three
bfloat16 ones, exactly but for the last bits of numbers below 2^-100: three products then sum to that of float32. Sums
are float32; ranges of coordinates are added afterwards, in order, and cut by shapes alone.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_device import add_partials_, ceil_div, interpreted, negative_words, on_device, product, split_seed

__all__ = ["add_dense_triton_", "sign_tile_triton"]

_COLUMNS = 128  # of a tile: those of one call of Philox
_COORDINATES = 32  # with 64, or 128 examples of float32, registers spill on compute capability 8.0
_HOPPER = (9, 0)  # has shared memory for 64, and more examples of halves share signs then
_FEWEST = 32  # tiles of coordinates in a range
_PROGRAMS = 512


@triton.jit
def _signs(coordinate, columns, tag, key0, key1, COORDINATES: tl.constexpr, DTYPE: tl.constexpr):
    """Signs of coordinates in the 128 columns of one group, (COORDINATES, 128), 1 or -1 of a floating-point type.

    A bit of the random word becomes the sign bit of the number 1: two operations, none of which converts a number.
    """
    w0, w1, w2, w3 = _words(coordinate, columns, tag, key0, key1)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (COORDINATES, 4))
    bits = words[:, :, None] >> tl.arange(0, 32).to(tl.uint32)[None, None, :]
    if tl.float32 == DTYPE:
        one: tl.constexpr = 0x3F800000
        patterns = tl.reshape(bits << 31, (COORDINATES, 128)) | one
    else:
        short: tl.constexpr = 0x3C00 if tl.float16 == DTYPE else 0x3F80
        patterns = tl.reshape(bits << 15, (COORDINATES, 128)).to(tl.uint16) | short
    return patterns.to(DTYPE, bitcast=True)


@triton.jit
def _words(coordinate, columns, tag, key0, key1):
    coordinate = tl.cast(coordinate, tl.int64)
    low, high = (coordinate & 0xFFFFFFFF).to(tl.uint32), (coordinate >> 32).to(tl.uint32)
    return negative_words(low, high, columns, tag, key0, key1)


@triton.jit
def _dense_kernel(
    partials,
    rows,
    batch,
    count,
    dim,
    row_stride,
    column_stride,
    offset,
    per_part,
    tag,
    key0,
    key1,
    EXAMPLES: tl.constexpr,
    COORDINATES: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDEN: tl.constexpr,
):
    example = tl.program_id(0) * EXAMPLES + tl.arange(0, EXAMPLES)
    group, part = tl.program_id(1), tl.program_id(2)
    base = rows + example.to(tl.int64)[:, None] * row_stride
    sums = tl.zeros((EXAMPLES, 128), dtype=tl.float32)
    begin = part.to(tl.int64) * per_part
    for start in range(begin, min(begin + per_part, count), COORDINATES):
        place = start + tl.arange(0, COORDINATES)
        x = tl.load(
            base + place[None, :] * column_stride,
            mask=(example < batch)[:, None] & (place < count)[None, :],
            other=0.0,
        )
        at_place = tl.cast(offset, tl.int64) + place
        if SPLIT:
            signs = _signs(at_place, group, tag, key0, key1, COORDINATES, tl.bfloat16)
            high = x.to(tl.bfloat16)
            rest = x - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            sums = product(low, signs, sums, WIDEN)
            sums = product(middle, signs, sums, WIDEN)
            sums = product(high, signs, sums, WIDEN)
        else:
            signs = _signs(at_place, group, tag, key0, key1, COORDINATES, x.dtype)
            sums = product(x, signs, sums, WIDEN)
    column = group * 128 + tl.arange(0, 128)
    at = partials + (part.to(tl.int64) * batch + example.to(tl.int64))[:, None] * dim + column[None, :]
    tl.store(at, sums, mask=(example < batch)[:, None] & (column < dim)[None, :])


@on_device
def add_dense_triton_(out: Tensor, rows: Tensor, offset: int, seed: int, tag: int) -> None:
    """Add R[:, offset : offset + n] rows, rows (B, n) float32, bfloat16 or float16 of any strides, to out (B, k)."""
    (batch, count), dim = rows.shape, out.shape[1]
    if not batch or not count:
        return
    if rows.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        rows = rows.float()
    split = rows.dtype == torch.float32
    examples = 16 if batch <= 16 else 64 if batch <= 64 or split else 128
    coordinates, warps, stages = _COORDINATES, 8 if split and examples == 64 else 4, 3
    if examples == 128 and rows.is_cuda and torch.cuda.get_device_capability(rows.device) >= _HOPPER:
        coordinates = 2 * _COORDINATES
        if batch >= 256:
            examples, warps, stages = 256, 8, 4
    groups = (ceil_div(batch, examples), ceil_div(dim, _COLUMNS))
    tiles = ceil_div(count, coordinates)
    per_part = max(_FEWEST, ceil_div(tiles, max(1, _PROGRAMS // (groups[0] * groups[1]))))
    parts = ceil_div(tiles, per_part)
    partials = torch.empty(parts, batch, dim, device=out.device, dtype=torch.float32)
    _dense_kernel[(*groups, parts)](
        partials, rows, batch, count, dim, rows.stride(0), rows.stride(1), offset, per_part * coordinates, tag,
        *split_seed(seed), EXAMPLES=examples, COORDINATES=coordinates, SPLIT=split, WIDEN=interpreted(),
        num_warps=warps, num_stages=stages, enable_fp_fusion=True,
    )  # fmt: skip
    add_partials_(out, partials, dim**-0.5)


@triton.jit
def _tile_kernel(tile, start, count, columns, tag, key0, key1, COORDINATES: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * COORDINATES + tl.arange(0, COORDINATES)
    group = tl.program_id(1)
    column = group * 128 + tl.arange(0, 128)
    signs = _signs(tl.cast(start, tl.int64) + place, group, tag, key0, key1, COORDINATES, tl.float32)
    there = (place < count)[:, None] & (column < columns)[None, :]
    tl.store(tile + place[:, None] * columns + column[None, :], signs, mask=there)


def sign_tile_triton(start: int, stop: int, count: int, seed: int, tag: int, device: torch.device) -> Tensor:
    """Signs of the coordinates [start, stop) in columns [0, count): (stop - start, count) float32, each 1 or -1."""
    tile = torch.empty(stop - start, count, device=device, dtype=torch.float32)
    _fill(tile, start, seed, tag)
    return tile


@on_device
def _fill(tile: Tensor, start: int, seed: int, tag: int) -> None:
    rows, columns = tile.shape
    grid = (ceil_div(rows, _COORDINATES), ceil_div(columns, _COLUMNS))
    if tile.numel():
        _tile_kernel[grid](
            tile, start, rows, columns, tag, *split_seed(seed), COORDINATES=_COORDINATES, enable_fp_fusion=True
        )
