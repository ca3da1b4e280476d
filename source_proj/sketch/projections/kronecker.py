"""Two-sided projection of matrix parameters, as LoGra does (`kernels/kronecker.py` has the definition)."""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from source_proj import kernels
from source_proj.sketch.projections.base import HeldSketches, Projection
from source_proj.sketch.projections.sparse import Sparse

__all__ = ["Kronecker"]

_TILE = 1 << 18  # numbers of the scaled gradients that are held at once


class Kronecker(Sparse, kind="kronecker"):
    """P G Qᵀ for the gradient G of a matrix; what is no whole parameter of two axes goes through the sparse map."""

    fusing_backends = ()
    half_backends = ()

    def hold(self, out: Tensor) -> HeldSketches | None:
        """Nothing: what the sparse map holds are products of its own."""
        return Projection.hold(self, out)

    def add_(self, out: Tensor, rows: Tensor, offset: int, shape: tuple[int, ...] | None) -> None:
        """Parameters of two axes or more as matrices, (first axis, all others)."""
        if shape is None or len(shape) < 2:
            super().add_(out, rows, offset, shape)
            return
        matrix = (shape[0], prod(shape[1:]))
        backend = self.serving(out.device.type)
        kernels.kronecker_add_(out, rows.float(), offset, matrix, seed=self.seed, backend=backend)

    def add_outer_(self, out: Tensor, left: Tensor, right: Tensor, offset: int, scale: Tensor | None) -> None:
        """Each side on its own; with a scale whole matrices, of few examples at a time."""
        if scale is None:
            backend = self.serving(out.device.type)
            kernels.kronecker_add_outer_(out, left.float(), right.float(), offset, seed=self.seed, backend=backend)
            return
        shape = (left.shape[2], right.shape[2])
        step = max(1, _TILE // prod(shape))
        for start in range(0, len(left), step):
            some = slice(start, start + step)
            gradient = (left[some].float().transpose(1, 2) @ right[some].float()).flatten(1)
            self.add_(out[some], kernels.scaled(gradient, 0, scale), offset, shape)

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
        """From the convolution's columns."""
        Projection.add_windows_(self, out, left, right, taps, windows, offset, scale)

    def add_at_(
        self, out: Tensor, values: Tensor, examples: Tensor, index: Tensor, offset: int, shape: tuple[int, int]
    ) -> None:
        """The two sides want the matrix whole: one-hot rows times values, an example at a time."""
        for example in torch.unique(examples).tolist():
            here = examples == example
            one_hot = F.one_hot(index[here], shape[0]).to(values.dtype)
            self.add_outer_(out[example : example + 1], one_hot[None], values[here][None], offset, None)
