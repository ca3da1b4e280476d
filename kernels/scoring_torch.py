"""Scores and the strongest rows by plain torch operators: the reference, and the way on devices without kernels."""

import torch
from torch import Tensor

from .codes import PackedRows

__all__ = ["Rows", "StrongestTorch", "check_operands", "nan_error", "score_torch", "strongest_columns"]

Rows = Tensor | PackedRows
"""Stored rows ``(n, k)``: numbers, or packed codes of levels."""

_TYPES = (torch.float32, torch.float16, torch.int8)
_BLOCK = 1 << 22  # scores of a block, and numbers of its rows in float32: 16 MiB each
_CHUNK = 128  # scores whose maximum stands for them
_LONG = 4  # times k chunks make a row long


def check_operands(queries: Tensor, rows: Rows, scale: Tensor | None) -> None:
    """Refuse what cannot be multiplied.

    Raises:
        ValueError: for shapes or devices that do not fit.
        TypeError: for types that are not among those of `score`.
    """
    if queries.ndim != 2 or len(rows.shape) != 2 or queries.shape[1] != rows.shape[1]:
        raise ValueError(f"queries (Q, k) and rows (n, k) must fit, got {tuple(queries.shape)} and {tuple(rows.shape)}")
    if scale is not None and scale.shape != (len(rows),):
        raise ValueError(f"scale must have one entry for each of {len(rows)} rows, got shape {tuple(scale.shape)}")
    if isinstance(rows, Tensor) and rows.dtype not in _TYPES:
        raise TypeError(f"rows must be packed or one of {_TYPES}, got {rows.dtype}")
    for name, one in (("queries", queries), ("scale", scale)):
        if one is not None and one.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {one.dtype}")
        if one is not None and one.device != rows.device:
            raise ValueError(f"{name} are on {one.device} and rows on {rows.device}; move them to one device")


def nan_error(row: int) -> ValueError:
    """The refusal of a score of NaN."""
    return ValueError(f"a score of row {row} is NaN, which has no place in an order; look for NaN or infinite operands")


def score_torch(queries: Tensor, rows: Rows, scale: Tensor | None) -> Tensor:
    """scale_r · q·row_r for all queries and rows: ``(Q, n)`` float32."""
    if isinstance(rows, PackedRows):
        height = max(1, _BLOCK // max(1, rows.k))
        parts = [queries @ block.T for _, block in rows.blocks(height)]
        scores = torch.cat(parts, dim=1) if parts else queries.new_empty(len(queries), 0)
    else:
        scores = queries @ rows.to(torch.float32).T
    return scores if scale is None else scores.mul_(scale)


def strongest_columns(scores: Tensor, k: int) -> Tensor:
    """Columns of the k largest entries of each row of ``(Q, n)``, in ascending order; of equal entries the first ones.

    Of long rows only the k chunks with the largest maxima are looked at, and the rest behind the last whole chunk: what
    another chunk holds is not above those maxima, and comes after them where it is equal. Nothing here waits for a GPU.
    """
    (count, n), device = scores.shape, scores.device
    if k >= n:
        return torch.arange(n, device=device).expand(count, -1)
    chunks = n // _CHUNK
    if chunks > _LONG * k:
        whole = chunks * _CHUNK
        chosen = strongest_columns(scores[:, :whole].reshape(count, chunks, _CHUNK).amax(2), k)  # (Q, k)
        inside = (chosen[:, :, None] * _CHUNK + torch.arange(_CHUNK, device=device)).flatten(1)
        columns = torch.cat([inside, torch.arange(whole, n, device=device).expand(count, -1)], 1)
        return columns.gather(1, strongest_columns(scores.gather(1, columns), k))
    if device.type != "cpu":
        return scores.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    # torch.topk leaves open which of equal entries it takes, but not their values: the k-th value decides.
    last = torch.topk(scores, k, dim=1).values[:, -1:]  # (Q, 1)
    above, equal = scores > last, scores == last
    room = k - above.sum(1, keepdim=True)
    kept = above | (equal & (equal.cumsum(1) <= room))
    return kept.nonzero()[:, 1].view(count, k)


class StrongestTorch:
    """See `Strongest`; the lowest are the highest of the negated scores."""

    def __init__(self, count: int, k: int, largest: bool, device: torch.device) -> None:
        self._k, self._sign = k, 1.0 if largest else -1.0
        self._values = torch.empty(count, 0, device=device, dtype=torch.float32)
        self._rows = torch.empty(count, 0, dtype=torch.int64, device=device)

    def add(self, queries: Tensor, rows: Rows, scale: Tensor | None, first: int) -> None:
        """Offer rows, block by block."""
        height, largest = self._height(queries, rows.shape[1]), []
        for start in range(0, len(rows), height):
            scores = self._scores(queries, rows, scale, start, height)
            if scores.device.type == "cpu":
                self.add_scores(scores, None, first + start)
            else:
                largest.append(self._offer(scores, first + start))
        # A GPU is waited for once, and a block with NaN scored again to tell where.
        for index in torch.stack(largest).isnan().nonzero().flatten().tolist() if largest else ():
            start = index * height
            self.add_scores(self._scores(queries, rows, scale, start, height), None, first + start)

    def add_scores(self, scores: Tensor, scale: Tensor | None, first: int) -> None:
        """Offer given scores, times a scale for each row."""
        found = scores.to(self._values.device)
        found = found if scale is None else found * scale
        if found.amax().isnan():
            raise nan_error(first + int(found.isnan().any(0).nonzero()[0]))
        self._offer(found, first)

    def _height(self, queries: Tensor, dim: int) -> int:
        """How many rows are scored at once."""
        return max(1, _BLOCK // max(len(queries), dim))

    def _scores(self, queries: Tensor, rows: Rows, scale: Tensor | None, start: int, height: int) -> Tensor:
        """Scores of the rows start to start + height."""
        part = slice(start, start + height)
        return self._score(queries, rows[part], None if scale is None else scale[part])

    def _score(self, queries: Tensor, rows: Rows, scale: Tensor | None) -> Tensor:
        return score_torch(queries, rows, scale)

    def _offer(self, scores: Tensor, first: int) -> Tensor:
        """Keep the best of scores; returns their largest number, or NaN where one is NaN."""
        found = scores if self._sign > 0 else -scores
        columns = strongest_columns(found, self._k)
        self.merge(found.gather(1, columns), columns + first)
        return found.amax()

    def merge(self, values: Tensor, rows: Tensor) -> None:
        """Offer candidates ``(Q, m)``, each query with rows of its own, in any order."""
        values, rows = torch.cat([self._values, values], 1), torch.cat([self._rows, rows], 1)
        order = rows.argsort(1)
        values, rows = values.gather(1, order), rows.gather(1, order)
        columns = strongest_columns(values, self._k)
        self._values, self._rows = values.gather(1, columns), rows.gather(1, columns)

    def result(self) -> tuple[Tensor, Tensor]:
        """Scores and rows, strongest first."""
        values, order = self._values.sort(dim=1, descending=True, stable=True)  # rows are in ascending order
        return values * self._sign, self._rows.gather(1, order)
