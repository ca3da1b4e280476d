"""Per-example gradients of a matrix, sum_t left_t (x) right_t, in tiles that stay in the cache."""

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["outer_tiles", "scaled", "window_columns"]

_COLUMNS = 6 << 20  # numbers of the columns of a convolution that are held at once

_local = threading.local()


def outer_tiles(left: Tensor, right: Tensor, elements: int) -> Iterator[tuple[slice, int, Tensor]]:
    """Tiles of G_b = sum_t left_t (x) right_t for left (B, T, o) and right (B, T, i), each flattened in C order.

    Yields (examples, first coordinate, tile (examples, coordinates)). A tile is a view of one buffer of about the given
    number of elements (more only where a single row of G is longer), which the next tile overwrites: new memory is
    costly, as the kernel must clear each page of it.
    """
    batch, _, o = left.shape
    i = right.shape[2]
    if 0 in (batch, o, i):
        return
    examples = min(batch, max(1, elements // i))
    height = min(o, max(1, elements // (examples * i)))
    for b in range(0, batch, examples):
        some = slice(b, min(b + examples, batch))
        count = some.stop - some.start
        for row in range(0, o, height):
            piece = left[some, :, row : row + height].transpose(1, 2)  # (b, h, T)
            tile = _buffer(count * piece.shape[1] * i, left).view(count, piece.shape[1], i)
            torch.bmm(piece, right[some], out=tile)
            yield some, row * i, tile.flatten(1)


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


def _buffer(count: int, like: Tensor) -> Tensor:
    """Memory of this thread for count float32 numbers, kept from call to call."""
    kept: Tensor | None = getattr(_local, "buffer", None)
    if kept is None or kept.numel() < count or kept.device != like.device:
        kept = torch.empty(count, dtype=torch.float32, device=like.device)
        _local.buffer = kept
    return kept[:count]
