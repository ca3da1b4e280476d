"""Where the layers' pieces of the gradient go: each one straight into the sketch, none of them kept."""

from __future__ import annotations

import torch
from torch import Tensor

from source_proj.gradients.space import ParameterSpace
from source_proj.sketch import Sketch

__all__ = ["Pieces"]

_TILE_BYTES = 32 * 2**20  # of scattered embedding rows; one such buffer lives during a call


class Pieces:
    """Adds per-example gradients of named parameters to the sketched rows.

    Args:
        out: (B, dim) float32 rows, added to.
        sketch: the projection R.
        space: where each parameter lies.
    """

    def __init__(self, out: Tensor, sketch: Sketch, space: ParameterSpace) -> None:
        self._out = out
        self._sketch = sketch
        self._offsets = space.offsets
        self._shapes = dict(zip(space.names, space.shapes, strict=True))

    def add(self, name: str, rows: Tensor, start: int = 0) -> None:
        """The gradients (n, …) of the whole parameter for the examples start … start + n."""
        out = self._out[start : start + rows.shape[0]]
        self._sketch.add_(out, rows.flatten(1), self._offsets[name], self._shapes[name])

    def outer(self, name: str, left: Tensor, right: Tensor) -> None:
        """The gradient Σ_t left_t ⊗ right_t of a whole matrix (o, i), from left (B, T, o) and right (B, T, i)."""
        self._sketch.add_outer_(self._out, left, right, self._offsets[name])

    def scatter(self, name: str, index: Tensor, values: Tensor) -> None:
        """The gradient of a table (V, D) whose row index[b, t] receives values[b, t]: (B, T) and (B, T, D)."""
        rows, width = self._shapes[name]
        if self._sketch.kind == "kronecker":  # needs the parameter whole
            for b in range(index.shape[0]):
                one_hot = torch.nn.functional.one_hot(index[b : b + 1], rows).to(values.dtype)
                self._sketch.add_outer_(self._out[b : b + 1], one_hot, values[b : b + 1], self._offsets[name])
            return
        size = index.shape[0]
        height = max(1, min(rows, _TILE_BYTES // (4 * width * size)))
        example = torch.arange(size, device=index.device).unsqueeze(1).expand_as(index)
        for first in torch.unique(index // height).tolist():
            first = int(first) * height
            last = min(rows, first + height)
            here = (index >= first) & (index < last)
            tile = values.new_zeros((size, last - first, width))
            tile.index_put_((example[here], index[here] - first), values[here], accumulate=True)
            self._sketch.add_(self._out, tile.flatten(1), self._offsets[name] + first * width)
