"""Block-permutation CountSketch, O(d) per gradient (`kernels/sparse_map.py` has the definition)."""

from typing import Any, ClassVar

from torch import Tensor

from source_proj import kernels
from source_proj.sketch.projections.base import Projection

__all__ = ["Sparse"]


class Sparse(Projection, kind="sparse"):
    """Every coordinate goes with a random sign to nnz columns; within a block of k coordinates no two meet."""

    has_nnz = True
    fusing_backends: ClassVar[tuple[str, ...]] = ("native", "triton")
    half_backends: ClassVar[tuple[str, ...]] = ("triton",)

    def _options(self, out: Tensor) -> dict[str, Any]:
        return {"seed": self.seed, "nnz": self.nnz, "backend": self.serving(out.device.type)}

    def _add_rows_(self, out: Tensor, rows: Tensor, offset: int) -> None:
        kernels.sparse_add_(out, rows, offset, **self._options(out))

    def add_outer_(self, out: Tensor, left: Tensor, right: Tensor, offset: int, scale: Tensor | None) -> None:
        """Without a gradient in memory, or in tiles of it."""
        kernels.sparse_add_outer_(out, *self.operands(out, left, right), offset, scale=scale, **self._options(out))

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
        """Without the convolution's columns in memory, where the backend can."""
        left, right = self.operands(out, left, right)
        kernels.sparse_add_windows_(out, left, right, taps, windows, offset, scale=scale, **self._options(out))

    def add_at_(
        self, out: Tensor, values: Tensor, examples: Tensor, index: Tensor, offset: int, shape: tuple[int, int]
    ) -> None:
        """Each row on its own."""
        offsets = offset + shape[1] * index
        kernels.sparse_add_at_(out, values.float(), examples, offsets, **self._options(out))

    def operands(self, out: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Factors in float32, or as they are where the backend multiplies halves."""
        if self.serving(out.device.type) in self.half_backends:
            return left, right
        return left.float(), right.float()
