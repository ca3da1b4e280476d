"""Where the layers' pieces of the gradient go: each one straight into the sketch, none of them kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from source_proj.gradients.space import ParameterSpace
from source_proj.kernels import outer_tiles, window_columns
from source_proj.sketch import Sketch

__all__ = ["Pieces", "PiecesByParameter", "ScaledPieces"]

_TILE = 1 << 18  # numbers of a tile of gradients: a megabyte, so that it stays in the second-level cache


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

    def _rows(self, _name: str, start: int, count: int) -> Tensor:
        """Where the named parameter's piece for some examples is added to."""
        return self._out[start : start + count]

    @property
    def fuses_windows(self) -> bool:
        """Whether `windows` costs no more than the arithmetic, however many windows there are."""
        return self._sketch.kind == "sparse" and self._sketch.chosen_backend == "native" and self._out.is_cpu

    def add(self, name: str, rows: Tensor, start: int = 0) -> None:
        """The gradients (n, …) of the whole parameter for the examples start … start + n."""
        flat = rows.reshape(len(rows), -1)
        self._sketch.add_(self._rows(name, start, len(rows)), flat, self._offsets[name], self._shapes[name])

    def outer(self, name: str, left: Tensor, right: Tensor, start: int = 0) -> None:
        """The gradient Σ_t left_t ⊗ right_t of a whole matrix (o, i), from left (n, T, o) and right (n, T, i)."""
        self._sketch.add_outer_(self._rows(name, start, len(left)), left, right, self._offsets[name])

    def windows(self, name: str, left: Tensor, right: Tensor, taps: Tensor, windows: Tensor) -> None:
        """The gradient of a convolution's weight (o, c, J); arguments as in `Sketch.add_windows_`."""
        self._sketch.add_windows_(self._rows(name, 0, len(left)), left, right, taps, windows, self._offsets[name])

    def scatter(self, name: str, index: Tensor, values: Tensor) -> None:
        """The gradient of a table (V, D) whose row index[b, t] receives values[b, t]: (B, T) and (B, T, D)."""
        rows, width = self._shapes[name]
        size, length = index.shape
        if self._sketch.kind == "kronecker":  # its two sides want the matrix whole
            for b in range(size):
                one_hot = F.one_hot(index[b : b + 1], rows).to(values.dtype)
                self.outer(name, one_hot, values[b : b + 1], b)
            return
        examples = torch.arange(size, device=index.device).repeat_interleave(length)
        offsets = self._offsets[name] + width * index.flatten().long()
        self._sketch.add_at_(self._rows(name, 0, size), values.flatten(0, 1), examples, offsets)


class ScaledPieces(Pieces):
    """Adds R D g to the sketched rows, for one or several diagonal matrices D: gradients in other metrics.

    A tile of a matrix's gradient is made once, and goes into the sketch after a product with each D's entries there.

    Args:
        outs: for each D, (B, dim) float32 rows, added to.
        sketch: the projection R.
        space: where each parameter lies.
        scales: for each D, its diagonal (d,) float32 on the rows' device; None for the identity.
    """

    def __init__(
        self, outs: Sequence[Tensor], sketch: Sketch, space: ParameterSpace, scales: Sequence[Tensor | None]
    ) -> None:
        super().__init__(outs[0], sketch, space)
        self._pairs = list(zip(outs, scales, strict=True))

    @property
    def fuses_windows(self) -> bool:
        """Never: a window's gradient is scaled coordinate by coordinate, so it must be made."""
        return False

    def add(self, name: str, rows: Tensor, start: int = 0) -> None:
        """The gradients (n, …) of the whole parameter for the examples start … start + n."""
        flat = rows.reshape(len(rows), -1)
        self._add(start, self._offsets[name], flat, self._shapes[name])

    def outer(self, name: str, left: Tensor, right: Tensor, start: int = 0) -> None:
        """The gradient Σ_t left_t ⊗ right_t of a whole matrix (o, i), from left (n, T, o) and right (n, T, i)."""
        left, right = left.float(), right.float()
        if self._sketch.kind == "kronecker":  # its two sides want the matrix whole
            step = max(1, _TILE // (left.shape[2] * right.shape[2]))
            for b in range(0, len(left), step):
                self.add(name, left[b : b + step].transpose(1, 2) @ right[b : b + step], start + b)
            return
        for some, first, tile in outer_tiles(left, right, _TILE):
            self._add(start + some.start, self._offsets[name] + first, tile)

    def windows(self, name: str, left: Tensor, right: Tensor, taps: Tensor, windows: Tensor) -> None:
        """The gradient of a convolution's weight (o, c, J); arguments as in `Sketch.add_windows_`."""
        for some, columns in window_columns(right.float(), taps, windows):
            self.outer(name, left[some].transpose(1, 2), columns, some.start)

    def scatter(self, name: str, index: Tensor, values: Tensor) -> None:
        """The gradient of a table (V, D) whose row index[b, t] receives values[b, t]: (B, T) and (B, T, D)."""
        table = self._shapes[name]
        begin = self._offsets[name]
        for out, scale in self._pairs:
            scaled = values
            if scale is not None:
                scaled = values * scale[begin : begin + table[0] * table[1]].view(table)[index.long()]
            pieces = _Unscaled(out, self._sketch, self)
            pieces.scatter(name, index, scaled)

    def _add(self, start: int, offset: int, rows: Tensor, shape: tuple[int, ...] | None = None) -> None:
        """Add rows (n, m) at coordinates offset … offset + m of the examples start … start + n, in each metric."""
        for out, scale in self._pairs:
            scaled = rows if scale is None else rows * scale[offset : offset + rows.shape[1]]
            self._sketch.add_(out[start : start + len(rows)], scaled, offset, shape)


class _Unscaled(Pieces):
    """The plain pieces of one of the outs."""

    def __init__(self, out: Tensor, sketch: Sketch, like: Pieces) -> None:
        self._out, self._sketch = out, sketch
        self._offsets, self._shapes = like._offsets, like._shapes


class PiecesByParameter(Pieces):
    """Keeps the sketches of the parameters apart, to tell which of them differ.

    Args:
        size: number of examples.
        sketch: the projection R.
        space: where each parameter lies.
        device: of the rows.
    """

    def __init__(self, size: int, sketch: Sketch, space: ParameterSpace, device: torch.device) -> None:
        super().__init__(torch.zeros(len(space.names), size, sketch.dim, device=device), sketch, space)
        self._at = {name: n for n, name in enumerate(space.names)}

    def _rows(self, name: str, start: int, count: int) -> Tensor:
        return self._out[self._at[name], start : start + count]

    def differing(self, other: PiecesByParameter, relative: float, floor: float) -> list[str]:
        """Names of the parameters whose pieces differ by more than rounding can; NaN and infinities aside.

        Args:
            other: the expected pieces.
            relative: to the norm of the parameter's expected piece.
            floor: to the norm of the expected rows, all parameters together.
        """
        error, norms = (self._out - other._out).norm(dim=2), other._out.norm(dim=2)  # (parameters, examples)
        wrong = (error > relative * norms + floor * norms.norm(dim=0)).any(dim=1)
        return [name for name, n in self._at.items() if wrong[n]]
