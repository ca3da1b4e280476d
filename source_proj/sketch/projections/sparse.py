"""Block-permutation CountSketch, O(d) per gradient (`kernels/sparse_map.py` has the definition)."""

from typing import Any, ClassVar

from torch import Tensor

from source_proj import kernels
from source_proj.sketch.projections.base import HeldSketches, Projection

__all__ = ["Sparse"]


class Sparse(Projection, kind="sparse"):
    """Every coordinate goes with a random sign to nnz columns; within a block of k coordinates no two meet."""

    has_nnz = True
    fusing_backends: ClassVar[tuple[str, ...]] = ("native", "triton")
    half_backends: ClassVar[tuple[str, ...]] = ("triton",)

    def hold(self, out: Tensor) -> HeldSketches | None:
        """For small parameters and products of one step: one call for all layers."""
        if self.nnz > 1 or self.serving(out.device.type) != "native":
            return None
        return _Held(self, out)

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


class _Held(HeldSketches):
    """What is held for out (B, dim)."""

    def __init__(self, projection: Sparse, out: Tensor) -> None:
        self._projection = projection
        self._products = kernels.HeldProducts(out)

    def takes_rows(self, rows: Tensor, offset: int, shape: tuple[int, ...] | None) -> bool:  # noqa: ARG002
        """Those of small parameters."""
        return self._products.takes_rows(rows, self._piece(offset, rows.shape[1]))

    def takes_outer(self, left: Tensor, right: Tensor, offset: int) -> bool:
        """Of one step."""
        if left.shape[1] > 1:
            return False
        piece = self._piece(offset, left.shape[2] * right.shape[2])
        return self._products.takes_product(left[:, 0].float(), right[:, 0].float(), piece)

    def takes_windows(
        self,
        left: Tensor,  # noqa: ARG002
        right: Tensor,  # noqa: ARG002
        taps: Tensor,  # noqa: ARG002
        windows: Tensor,  # noqa: ARG002
        offset: int,  # noqa: ARG002
        scale: Tensor | None = None,  # noqa: ARG002
    ) -> bool:
        """None: a convolution has many steps."""
        return False

    def finish_(self) -> None:
        """All at once."""
        self._products.finish_()

    def _piece(self, offset: int, count: int) -> kernels.Piece:
        return kernels.Piece(offset, count, self._projection.dim, self._projection.seed)
