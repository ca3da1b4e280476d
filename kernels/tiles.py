"""Per-example gradients of a matrix, sum_t left_t (x) right_t, in tiles that stay in the cache."""

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["factors_of_one_type", "outer_tiles", "product_of_halves", "scaled", "window_columns"]

_HALVES = (torch.float16, torch.bfloat16)
_ALIGNMENT = 8  # halves in 16 bytes
_COLUMNS = 6 << 20  # numbers of the columns of a convolution that are held at once

# Whether halves can be multiplied to float32, on CUDA devices.
_WIDENS = hasattr(torch.ops.aten.bmm, "dtype_out")

_local = threading.local()


def outer_tiles(left: Tensor, right: Tensor, elements: int, least_rows: int = 1) -> Iterator[tuple[slice, int, Tensor]]:
    """Tiles of G_b = sum_t left_t (x) right_t for left (B, T, o) and right (B, T, i), each flattened in C order.

    Tiles are float32; on CUDA devices the operands may be halves, whose products are summed in float32. Those of
    bfloat16 are then rounded to it, as the operands themselves were: reading and writing them takes the time.

    Yields (examples, first coordinate, tile (examples, coordinates)). A tile is a view of one buffer of about the given
    number of elements (more only where a single row of G is longer) and of at least so many rows of G, which the next
    tile overwrites: new memory is costly, as the kernel must clear each page of it. On a GPU each has its own memory.
    """
    batch, _, o = left.shape
    i = right.shape[2]
    if 0 in (batch, o, i):
        return
    examples = min(batch, max(1, elements // (i * min(o, least_rows))))
    height = min(o, max(1, elements // (examples * i)))
    if height > _ALIGNMENT:
        height -= height % _ALIGNMENT
    for b in range(0, batch, examples):
        some = slice(b, min(b + examples, batch))
        count = some.stop - some.start
        for row in range(0, o, height):
            rows = left[some, :, row : row + height]
            own = rows.shape[2]
            piece = _aligned(rows).transpose(1, 2)  # (b, h, T)
            narrow = left.is_cuda and left.dtype == torch.bfloat16
            numbers = count * piece.shape[1] * i
            tile = left.new_empty(numbers) if narrow else _buffer(numbers, left)
            tile = tile.view(count, piece.shape[1], i)
            if left.dtype == torch.float32 or narrow:
                torch.bmm(piece, right[some], out=tile)
            else:
                product_of_halves(piece, right[some], tile)
            yield some, row * i, tile.flatten(1)[:, : own * i]


def factors_of_one_type(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one half precision, or else in float32."""
    if left.dtype == right.dtype and left.dtype in _HALVES:
        return left, right
    return left.float(), right.float()


def scaled(tile: Tensor, start: int, scale: Tensor | None) -> Tensor:
    """The tile with each coordinate, the first of them `start`, times its entry of scale, in place; None for ones."""
    return tile if scale is None else tile.mul_(scale[start : start + tile.shape[1]])


def window_columns(right: Tensor, taps: Tensor, windows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The columns (b, L, C J) of a convolution, right[b, c, taps[j] + windows[l]], for right (B, C, plane).

    Yields (examples, their columns), as many examples as stay in a cache and in memory that is used again.
    """
    index = (taps.long().unsqueeze(1) + windows.long()).flatten().to(right.device)  # (J L)
    batch, channels, _ = right.shape
    step = max(1, _COLUMNS // max(1, channels * len(index)))
    for b in range(0, batch, step):
        some = slice(b, min(b + step, batch))
        columns = right[some].index_select(2, index).view(-1, channels * len(taps), len(windows))
        yield some, columns.transpose(1, 2)


def _aligned(rows: Tensor) -> Tensor:
    """Halves (b, T, h) on CUDA devices in memory whose rows begin at 16 bytes, some unused numbers behind them.

    For others the vendor's products are three times slower: GPT-2's 50,257 tokens are such a case.
    """
    lines = rows.stride(2) if rows.stride(1) == 1 else rows.stride(1)
    if not rows.is_cuda or rows.dtype == torch.float32 or lines % _ALIGNMENT == 0:
        return rows
    b, steps, h = rows.shape
    found = rows.new_empty(b, steps, -(-h // _ALIGNMENT) * _ALIGNMENT)
    found[:, :, :h] = rows
    return found


def product_of_halves(left: Tensor, right: Tensor, out: Tensor) -> None:
    """The product of two matrices, or batches of them, in half precision into out float32, summed in float32."""
    multiply = torch.mm if left.ndim == 2 else torch.bmm
    if left.is_cuda and _WIDENS:
        multiply(left, right, out_dtype=torch.float32, out=out)
    else:
        multiply(left.float(), right.float(), out=out)


def _buffer(count: int, like: Tensor) -> Tensor:
    """Memory of this thread for count float32 numbers, on the CPU kept from call to call; torch keeps that of GPUs."""
    if like.device.type != "cpu":
        return torch.empty(count, dtype=torch.float32, device=like.device)
    kept: Tensor | None = getattr(_local, "buffer", None)
    if kept is None or kept.numel() < count or kept.device != like.device:
        kept = torch.empty(count, dtype=torch.float32, device=like.device)
        _local.buffer = kept
    return kept[:count]
