"""TRAK's dense signs by its own CUDA kernels (`kernels/fast_jl.py` says what they are)."""

import torch
from torch import Tensor

from source_proj import kernels
from source_proj.sketch.projections.base import Projection

__all__ = ["FastJLProjection"]


class FastJLProjection(Projection, kind="rademacher", backend="fast-jl"):
    """Another matrix than `Rademacher`'s, which depends on the device's number of multiprocessors."""

    is_portable = False

    def _check_backend(self) -> None:
        library = kernels.require_fast_jl(self.dim, self.multiprocessors)
        object.__setattr__(self, "multiprocessors", library.multiprocessors)

    def serving(self, device: str) -> str:  # noqa: ARG002
        """Always its own; tensors on other devices are refused when they come."""
        return "fast-jl"

    def device(self) -> torch.device:
        """The one that it was made for."""
        return kernels.require_fast_jl(self.dim, self.multiprocessors).device

    def add_(self, out: Tensor, rows: Tensor, offset: int, shape: tuple[int, ...] | None) -> None:  # noqa: ARG002
        """All at once: a piece costs as much as the whole blocks that it touches."""
        self._add_rows_(out, rows.float(), offset)

    def _add_rows_(self, out: Tensor, rows: Tensor, offset: int) -> None:
        kernels.fast_jl_add_(out, rows, offset, seed=self.seed, multiprocessors=self.multiprocessors)

    def add_outer_(self, out: Tensor, left: Tensor, right: Tensor, offset: int, scale: Tensor | None) -> None:
        """Block by block; with a scale in tiles."""
        if scale is not None:
            super().add_outer_(out, left, right, offset, scale)
            return
        kernels.fast_jl_add_outer_(
            out, left.float(), right.float(), offset, seed=self.seed, multiprocessors=self.multiprocessors
        )

    def add_at_(
        self, out: Tensor, values: Tensor, examples: Tensor, index: Tensor, offset: int, shape: tuple[int, int]
    ) -> None:
        """All rows of a block together."""
        kernels.fast_jl_add_at_(
            out,
            values.float(),
            examples,
            offset + shape[1] * index,
            seed=self.seed,
            multiprocessors=self.multiprocessors,
        )
