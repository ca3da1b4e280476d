"""Inner products of queries with stored rows, and each query's strongest rows without the matrix of all products.

Rows ``(n, k)`` are float32, float16, int8, or packed codes of levels (`codes.PackedRows`), with or without one float32
scale a row; score(q, r) = scale_r · q·row_r, summed in float32. `Strongest` streams over rows and keeps k of them for
each query. Of equal scores the lower row is the stronger one, for the lowest as for the highest, so that what is kept
is unique: it depends on neither the backend nor the order in which rows arrive. A score of NaN has no place in an order
and is refused; infinite scores have one.

Backends, all of which apply the same definitions, so that they differ by the rounding of a sum alone:

* native: few queries are multiplied by compiled code that reads each row once, converts it in registers (or looks codes
  up in a query's table of sums) and forgets a score at once unless it is among the best. Many are multiplied by this
  code too, some at a time, or by torch, blocks of rows being converted into memory that stays in the cache; compiled
  code scans the products. `takes_product` draws the line.
* triton: the same for GPUs, in `triton_scoring`.
* torch: blocks of products and torch's own search; the plain reference on any device.
"""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch
from torch import Tensor

from .native import native_library
from .scoring_native import StrongestNative, score_native
from .scoring_torch import Rows, StrongestTorch, check_operands, score_torch

__all__ = ["ScoringBackend", "Strongest", "bottom_k", "score", "scoring_backend", "scoring_backends", "top_k"]

ScoringBackend = Literal["native", "triton", "torch"]


def scoring_backends(device: str = "cpu") -> tuple[ScoringBackend, ...]:
    """Names of the backends that can score on this type of device, fastest first.

    >>> scoring_backends("meta")
    ('torch',)
    """
    able: list[ScoringBackend] = ["torch"]
    if device == "cuda" and importlib.util.find_spec("triton") is not None:
        able.insert(0, "triton")
    if device == "cpu" and native_library() is not None:
        able.insert(0, "native")
    return tuple(able)


def scoring_backend(backend: ScoringBackend | None, device: str) -> ScoringBackend:
    """The named backend, or for None the fastest one for this type of device.

    "triton" is honoured on the CPU too where TRITON_INTERPRET=1 was set before triton was imported.

    Raises:
        ValueError: the backend cannot score there; the message lists those that can.
    """
    able = scoring_backends(device)
    if backend is None:
        return able[0]
    if backend == "triton" and importlib.util.find_spec("triton") is not None:
        from .triton_device import interpreted

        if interpreted() or "triton" in able:
            return backend
    if backend in able:
        return backend
    hints = {
        "triton": "; it needs a CUDA device and the package triton, which torch for CUDA brings along",
        "native": "; it needs the CPU and the compiled extension",
    }
    raise ValueError(
        f"backend {backend!r} cannot score on {device}{hints.get(backend, '')}; choose one of {able} or None"
    )


def score(queries: Tensor, rows: Rows, scale: Tensor | None = None, *, backend: ScoringBackend | None = None) -> Tensor:
    """Scores of all queries with all rows.

    Args:
        queries: ``(Q, k)`` float32.
        rows: ``(n, k)`` float32, float16, int8 or packed, on the queries' device.
        scale: a factor for each row, ``(n,)`` float32, or None for 1.
        backend: "native", "triton" or "torch"; default: the fastest one that is present.

    Returns:
        ``(Q, n)`` float32, NaN where an operand holds NaN, or infinity times zero.

    Raises:
        ValueError: shapes do not fit, or the backend cannot score on this device.
        TypeError: the types are others.

    Example:
        >>> rows = torch.tensor([[1, 2], [-127, 127]], dtype=torch.int8)
        >>> score(torch.tensor([[1.0, 1.0]]), rows, torch.tensor([0.5, 2.0])).tolist()
        [[1.5, 0.0]]
    """
    check_operands(queries, rows, scale)
    chosen = scoring_backend(backend, rows.device.type)
    if chosen == "native":
        return score_native(queries, rows, scale)
    if chosen == "triton":
        from .triton_scoring import score_triton

        return score_triton(queries, rows, scale)
    return score_torch(queries, rows, scale)


class Strongest:
    """The k strongest rows of each query, while rows stream by in any order.

    Args:
        count: Q, the number of queries.
        k: how many rows are kept for each.
        largest: keep the highest scores, or else the lowest.
        device: of the scores.
        backend: as for `score`.

    Raises:
        ValueError: k is not positive, or the backend cannot score on this device.

    Example:
        >>> best = Strongest(count=1, k=2)
        >>> best.add(torch.ones(1, 2), torch.tensor([[1, 0], [5, 4], [0, 1]], dtype=torch.int8))
        >>> best.add_scores(torch.tensor([[2.0]]), first=3)
        >>> [one.tolist() for one in best.result()]
        [[[9.0, 2.0]], [[1, 3]]]
    """

    def __init__(
        self,
        count: int,
        k: int,
        *,
        largest: bool = True,
        device: torch.device | str = "cpu",
        backend: ScoringBackend | None = None,
    ) -> None:
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.count = count
        self._backend = scoring_backend(backend, torch.device(device).type)
        self._kept: StrongestNative | StrongestTorch
        if self._backend == "native":
            self._kept = StrongestNative(count, k, largest)
        elif self._backend == "triton":
            from .triton_scoring import StrongestTriton

            self._kept = StrongestTriton(count, k, largest, torch.device(device))
        else:
            self._kept = StrongestTorch(count, k, largest, torch.device(device))

    def add(self, queries: Tensor, rows: Rows, scale: Tensor | None = None, *, first: int = 0) -> None:
        """Offer rows ``first``, ``first`` + 1, … with the scores that `score` would give them.

        Raises:
            ValueError: a score is NaN; or, as TypeError, as for `score`.
        """
        check_operands(queries, rows, scale)
        self._check_count(queries)
        if len(rows) and len(queries):
            self._kept.add(queries, rows, scale, first)

    def add_scores(self, scores: Tensor, *, first: int = 0) -> None:
        """Offer rows ``first``, ``first`` + 1, … with given scores ``(Q, n)`` float32.

        Raises:
            ValueError: a score is NaN, or the shape does not fit.
        """
        if scores.ndim != 2:
            raise ValueError(f"scores must have shape (queries, rows), got {tuple(scores.shape)}")
        if scores.dtype != torch.float32:
            raise TypeError(f"scores must be float32, got {scores.dtype}; convert them")
        self._check_count(scores)
        if scores.numel():
            self._kept.add_scores(scores, None, first)

    def result(self) -> tuple[Tensor, Tensor]:
        """Scores and rows of what is kept, strongest first: ``(Q, m)`` float32 and int64; m = k, or all rows."""
        return self._kept.result()

    def _check_count(self, given: Tensor) -> None:
        if len(given) != self.count:
            raise ValueError(f"got {len(given)} queries for a search that was begun with {self.count}")


def top_k(
    queries: Tensor, rows: Rows, k: int, scale: Tensor | None = None, *, backend: ScoringBackend | None = None
) -> tuple[Tensor, Tensor]:
    """The k highest scores of each query, highest first, and their rows: ``(Q, k)`` float32 and int64.

    Arguments and errors are those of `score`; also ValueError unless k lies in 1..n, and for a score of NaN.

    Example:
        >>> values, found = top_k(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0], [3.0, 0.0], [3.0, 1.0]]), 2)
        >>> values.tolist(), found.tolist()
        ([[3.0, 3.0]], [[1, 2]])
    """
    return _strongest(queries, rows, k, scale, backend, largest=True)


def bottom_k(
    queries: Tensor, rows: Rows, k: int, scale: Tensor | None = None, *, backend: ScoringBackend | None = None
) -> tuple[Tensor, Tensor]:
    """The k lowest scores of each query, lowest first, and their rows; as `top_k` otherwise."""
    return _strongest(queries, rows, k, scale, backend, largest=False)


def _strongest(
    queries: Tensor, rows: Rows, k: int, scale: Tensor | None, backend: ScoringBackend | None, *, largest: bool
) -> tuple[Tensor, Tensor]:
    if not 1 <= k <= len(rows):
        raise ValueError(f"k must lie in 1..{len(rows)} (the number of rows), got {k}")
    best = Strongest(len(queries), k, largest=largest, device=rows.device, backend=backend)
    best.add(queries, rows, scale)
    return best.result()
