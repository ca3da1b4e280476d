"""TensorSketch of matrix parameters: no weight gradient is ever made (`kernels/tensor_map.py` has the definition)."""

from math import prod

from torch import Tensor

from source_proj import kernels
from source_proj.sketch.projections.base import HeldSketches
from source_proj.sketch.projections.sparse import Sparse

__all__ = ["TensorProjection"]


class TensorProjection(Sparse, kind="tensor"):
    """The column of coordinate (o, i) of a matrix is (h₁(o) + h₂(i)) mod k, its sign s₁(o) s₂(i).

    So the sketch of Σ_t δ_t ⊗ a_t is the sum of circular convolutions of the factors' sketches, by transforms
    O(d_in + d_out + k log k) a step; where the product costs less, that is mapped. What is no whole parameter of two
    axes goes through the sparse map.
    """

    has_nnz = False

    def add_(self, out: Tensor, rows: Tensor, offset: int, shape: tuple[int, ...] | None) -> None:
        """Parameters of two axes or more as matrices, (first axis, all others)."""
        if shape is None or len(shape) < 2:
            super().add_(out, rows, offset, shape)
            return
        matrix, backend = self.map(offset, (shape[0], prod(shape[1:]))), self.serving(out.device.type)
        for start, piece in self._pieces(out, rows):
            kernels.tensor_add_(out, piece, offset + start, matrix, backend=backend)

    def hold(self, out: Tensor) -> "_Held":
        """For small parameters and sums in the frequency domain: one call, and one transform back, for all layers."""
        return _Held(self, out)

    def add_outer_(self, out: Tensor, left: Tensor, right: Tensor, offset: int, scale: Tensor | None) -> None:
        """By the cheaper route; a scale, which does not factor, leaves the product."""
        matrix, backend = self.map(offset, (left.shape[2], right.shape[2])), self.serving(out.device.type)
        kernels.tensor_add_outer_(out, *self.operands(out, left, right), matrix, backend=backend, scale=scale)

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
        """As an outer product of output gradients and patches, a step for each window."""
        matrix = self.map(offset, (left.shape[1], right.shape[1] * len(taps)))
        left, right = self.operands(out, left, right)
        backend = self.serving(out.device.type)
        kernels.tensor_add_windows_(out, left, right, taps, windows, matrix, backend=backend, scale=scale)

    def add_at_(
        self, out: Tensor, values: Tensor, examples: Tensor, index: Tensor, offset: int, shape: tuple[int, int]
    ) -> None:
        """One-hot rows times values: each one its sketch, rolled."""
        matrix, backend = self.map(offset, shape), self.serving(out.device.type)
        kernels.tensor_add_at_(out, values.float(), examples, index, matrix, backend=backend)

    def map(self, offset: int, shape: tuple[int, int]) -> kernels.TensorMap:
        """The part of the matrix of one parameter."""
        return kernels.TensorMap(self.dim, self.seed, offset, shape)


class _Held(HeldSketches):
    """What is held for out (B, dim)."""

    def __init__(self, projection: TensorProjection, out: Tensor) -> None:
        self._projection = projection
        backend = projection.serving(out.device.type)
        self._sums = kernels.HeldSums(out, backend, projection.seed)
        self._takes_half = backend in projection.half_backends

    def takes_rows(self, rows: Tensor, offset: int, shape: tuple[int, ...] | None) -> bool:
        """Those of small parameters."""
        matrix = None if shape is None or len(shape) < 2 else self._projection.map(offset, (shape[0], prod(shape[1:])))
        return self._sums.takes_rows(rows, offset, matrix)

    def takes_outer(self, left: Tensor, right: Tensor, offset: int) -> bool:
        """Where it is small, or transforms cost less, as all layers share the way back."""
        matrix = self._projection.map(offset, (left.shape[2], right.shape[2]))
        return self._sums.takes_outer(*self._operands(left, right), matrix)

    def takes_windows(
        self,
        left: Tensor,
        right: Tensor,
        taps: Tensor,
        windows: Tensor,
        offset: int,
        scale: Tensor | None = None,
    ) -> bool:
        """Where transforms cost less."""
        matrix = self._projection.map(offset, (left.shape[1], right.shape[1] * len(taps)))
        return self._sums.takes_windows(*self._operands(left, right), taps, windows, matrix, scale)

    def finish_(self) -> None:
        """All layers at once."""
        self._sums.finish_()

    def _operands(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return (left, right) if self._takes_half else (left.float(), right.float())
