"""What every kind of random matrix must know, and how it sketches products and windows where it knows no better."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from source_proj import kernels

__all__ = ["HeldSketches", "Projection", "kinds", "projection_class"]

_CONVERTED = 1 << 16  # coordinates that are converted to float32 at once
_TILE = 1 << 18  # numbers of a tile of gradients

_REGISTRY: dict[tuple[str, str | None], type[Projection]] = {}


class HeldSketches(ABC):
    """Takes sketches of all layers of a batch that are cheaper together; `finish_` adds them to their rows.

    Each method says whether it took what it was given; what it did not take is added by the projection at once.
    """

    @abstractmethod
    def takes_rows(self, rows: Tensor, offset: int, shape: tuple[int, ...] | None) -> bool:
        """Gradients as of `Projection.add_`."""

    @abstractmethod
    def takes_outer(self, left: Tensor, right: Tensor, offset: int) -> bool:
        """An outer product as of `Projection.add_outer_`."""

    @abstractmethod
    def takes_windows(
        self,
        left: Tensor,
        right: Tensor,
        taps: Tensor,
        windows: Tensor,
        offset: int,
        scale: Tensor | None = None,
    ) -> bool:
        """A convolution's gradient as of `Projection.add_windows_`, its columns (c, j) times a scale (c J,)."""

    @abstractmethod
    def finish_(self) -> None:
        """Add what was taken."""


@dataclass(frozen=True)
class Projection(ABC):
    """One random matrix R (dim, d) with E[RᵀR] = I, whose entries are functions of (seed, absolute coordinate, column).

    A subclass registers itself: ``class Sparse(Projection, kind="sparse")``; with ``backend=`` it serves that kind only
    where this backend is asked for by name, with a matrix of its own. It must know how to add given rows; products,
    windows and scattered rows are made of these unless it knows something faster. Operands reach it checked by
    `Sketch`: shapes, types and devices fit, nothing is empty, and autograd and autocast are off.

    Args:
        dim: numbers per sketch, k.
        seed: which matrix.
        nnz: nonzeros per column.
        backend: the one that was asked for; None for the fastest on each device.
        multiprocessors: of the device that the matrix depends on, where it does.

    Raises:
        ValueError: the backend is not present, or an option is none of this kind's.
    """

    kind: ClassVar[str]
    backends: ClassVar[tuple[str, ...]] = kernels.BACKENDS  # that can make the matrix
    is_exact: ClassVar[bool] = False  # inner products are kept exactly
    is_portable: ClassVar[bool] = True  # any machine can make the matrix
    has_nnz: ClassVar[bool] = False  # the number of nonzeros can be chosen
    fusing_backends: ClassVar[tuple[str, ...]] = ()  # on which a convolution's windows cost no more than arithmetic
    half_backends: ClassVar[tuple[str, ...]] = ()  # that multiply factors of half precision as they are

    dim: int
    seed: int = 0
    nnz: int = 1
    backend: str | None = None
    multiprocessors: int | None = None

    def __init_subclass__(cls, kind: str, backend: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.kind = kind
        _REGISTRY[kind, backend] = cls

    def __post_init__(self) -> None:
        if self.nnz > 1 and not self.has_nnz:
            raise ValueError(
                f"nnz is {self.nnz}, but kind {self.kind!r} has no choice of nonzeros: give kind='sparse', "
                "or leave nnz at 1"
            )
        self._check_backend()

    def _check_backend(self) -> None:
        """Refuse a backend that no device of this machine could be served by."""
        self.serving("cuda" if self.backend == "triton" and torch.cuda.is_available() else "cpu")
        if self.multiprocessors is not None:
            raise ValueError(
                f"multiprocessors is {self.multiprocessors}, but only the matrix of backend 'fast-jl' depends on them; "
                "leave it out"
            )

    def serving(self, device: str) -> str:
        """The backend that serves tensors on this type of device."""
        return kernels.choose_backend(self.backend, device, self.backends, f"kind {self.kind!r}")

    def device(self) -> torch.device | None:
        """The only device that can serve, where there is but one."""
        return None

    def hold(self, out: Tensor) -> HeldSketches | None:  # noqa: ARG002
        """What takes sketches for the rows out (B, dim) until it is finished; None where nothing is gained by that."""
        return None

    def add_(self, out: Tensor, rows: Tensor, offset: int, shape: tuple[int, ...] | None) -> None:  # noqa: ARG002
        """Add R[:, offset : offset + n] rows to out (B, dim), for rows (B, n) of any floating-point type.

        Args:
            out: where to add.
            rows: the coordinates from `offset` on.
            offset: absolute coordinate of the first of them.
            shape: of the one parameter whose whole gradients the rows are, if they are.
        """
        for start, piece in self._pieces(out, rows):
            self._add_rows_(out, piece, offset + start)

    def _pieces(self, out: Tensor, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Rows in float32, converted a piece at a time with its first coordinate; "triton" takes them as they are."""
        if rows.dtype == torch.float32 or self.serving(out.device.type) == "triton":
            yield 0, rows
            return
        for start in range(0, rows.shape[1], _CONVERTED):
            yield start, rows[:, start : start + _CONVERTED].float()

    @abstractmethod
    def _add_rows_(self, out: Tensor, rows: Tensor, offset: int) -> None:
        """Add R[:, offset : offset + n] rows, float32 or, on backend "triton", of any floating-point type."""

    def add_outer_(self, out: Tensor, left: Tensor, right: Tensor, offset: int, scale: Tensor | None) -> None:
        """Add R D vec(Σ_t left_t ⊗ right_t), for left (B, T, o), right (B, T, i) and the diagonal scale (o i,) of D."""
        for some, start, tile in kernels.outer_tiles(left.float(), right.float(), _TILE):
            self._add_rows_(out[some], kernels.scaled(tile, start, scale), offset + start)

    def add_windows_(
        self,
        out: Tensor,
        left: Tensor,
        right: Tensor,
        taps: Tensor,
        windows: Tensor,
        offset: int,
        scale: Tensor | None,
    ) -> None:
        """Add R D vec(G), G[o, c, j] = Σ_l left[o, l] right[c, taps[j] + windows[l]], for the diagonal scale of D."""
        for some, columns in kernels.window_columns(right.float(), taps, windows):
            self.add_outer_(out[some], left[some].transpose(1, 2), columns, offset, scale)

    def add_at_(
        self, out: Tensor, values: Tensor, examples: Tensor, index: Tensor, offset: int, shape: tuple[int, int]
    ) -> None:
        """Add the sketch of a table of this shape at `offset` whose row index[r] holds values[r] to out[examples[r]].

        Args:
            out: (B, dim), where to add.
            values: (M, n) of any floating-point type.
            examples: (M,) int64.
            index: (M,) int64, rows of the table.
            offset: absolute coordinate of the table's first entry.
            shape: (rows, n) of the table.
        """
        for row in torch.unique(index).tolist():
            here = index == row
            sums = torch.zeros(int(here.sum()), self.dim, device=out.device, dtype=torch.float32)
            self.add_(sums, values[here], offset + row * shape[1], None)
            out.index_add_(0, examples[here], sums)


def kinds() -> tuple[str, ...]:
    """Names of the kinds."""
    return tuple(sorted({kind for kind, _ in _REGISTRY}))


def projection_class(kind: str, backend: str | None) -> type[Projection]:
    """The class of a kind, or the one that this backend serves with a matrix of its own.

    Raises:
        ValueError: there is no such kind; the message lists those that are.
    """
    if kind not in kinds():
        raise ValueError(f"kind is {kind!r}; known kinds are {', '.join(kinds())}")
    return _REGISTRY.get((kind, backend)) or _REGISTRY[kind, None]
