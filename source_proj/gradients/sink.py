"""Where the layers' pieces of the gradient go: each one straight into the sketch, none of them kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from source_proj.gradients.space import ParameterSpace
from source_proj.sketch import Sketch, without_autocast
from source_proj.sketch.projections import HeldSketches
from source_proj.trajectory import Scale

__all__ = [
    "GradientSink",
    "HandingSink",
    "ScaledSink",
    "SinkByParameter",
    "SinkOfMetrics",
    "WeightedSink",
    "weighted_sum",
]

_PART = 1 << 16  # numbers that are weighted at a time


class GradientSink:
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
        self._accepts_half = sketch.accepts_half(out.device.type)
        self._held: HeldSketches | None = None

    def hold(self) -> None:
        """Hold back pieces that are cheaper together, until `release`."""
        self._held = self._sketch.hold(self._out)

    def release(self, *, add: bool = True) -> None:
        """Add all that is held back, or let it go, and hold nothing back any more."""
        held, self._held = self._held, None
        if held is not None and add:
            with torch.no_grad(), without_autocast():
                held.finish_()

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Within, pieces that are cheaper together may be held back; at the end all are added, after an error none."""
        self.hold()
        done = False
        try:
            with without_autocast():
                yield
            done = True
        finally:
            self.release(add=done)

    def gather(self) -> None:
        """Bring together what several devices hold."""

    def _held_for(self, piece: Tensor) -> HeldSketches | None:
        """What may hold back a piece of the whole batch."""
        return self._held if piece.shape[0] == self._out.shape[0] and piece.numel() else None

    def _rows(self, _name: str, start: int, count: int) -> Tensor:
        """Where the named parameter's piece for some examples is added to."""
        return self._out[start : start + count]

    @property
    def fuses_windows(self) -> bool:
        """Whether `windows` costs no more than the arithmetic, however many windows there are."""
        return self._sketch.fuses_windows(self._out.device.type)

    @property
    def accepts_half(self) -> bool:
        """Whether factors of half precision are best left as they are: tensor cores sum their products in float32."""
        return self._accepts_half

    def add(self, name: str, rows: Tensor, start: int = 0) -> None:
        """The gradients (n, …) of the whole parameter for the examples start … start + n."""
        flat, held = rows if rows.dim() == 2 else rows.reshape(rows.shape[0], -1), self._held_for(rows)
        offset, shape = self._offsets[name], self._shapes[name]
        if held is None or not held.takes_rows(flat, offset, shape):
            self._sketch.add_(self._rows(name, start, rows.shape[0]), flat, offset, shape)

    def outer(self, name: str, left: Tensor, right: Tensor, start: int = 0) -> None:
        """The gradient Σ_t left_t ⊗ right_t of a whole matrix (o, i), from left (n, T, o) and right (n, T, i)."""
        offset, held = self._offsets[name], self._held_for(left)
        if held is None or not held.takes_outer(left, right, offset):
            self._sketch.add_outer_(self._rows(name, start, left.shape[0]), left, right, offset)

    def windows(self, name: str, left: Tensor, right: Tensor, taps: Tensor, windows: Tensor) -> None:
        """The gradient of a convolution's weight (o, c, J); arguments as in `Sketch.add_windows_`."""
        offset, held = self._offsets[name], self._held_for(left)
        if held is None or not held.takes_windows(left, right, taps, windows, offset):
            self._sketch.add_windows_(self._rows(name, 0, left.shape[0]), left, right, taps, windows, offset)

    def scatter(self, name: str, index: Tensor, values: Tensor) -> None:
        """The gradient of a table (V, D) whose row index[b, t] receives values[b, t]: (B, T) and (B, T, D)."""
        rows, width = self._shapes[name]
        size, length = index.shape
        examples = torch.arange(size, device=index.device).repeat_interleave(length)
        out, offset = self._rows(name, 0, size), self._offsets[name]
        self._sketch.add_at_(out, values.flatten(0, 1), examples, index.flatten().long(), offset, (rows, width))


class ScaledSink(GradientSink):
    """Adds R D g to the sketched rows, for a diagonal matrix D: gradients in another metric.

    Where D is p ⊗ q of a matrix, its gradient's factors are scaled by p and q, and go the way of plain ones.

    Args:
        out: (B, dim) float32 rows, added to.
        sketch: the projection R.
        space: where each parameter lies.
        scale: D, on the rows' device.
    """

    def __init__(self, out: Tensor, sketch: Sketch, space: ParameterSpace, scale: Scale) -> None:
        super().__init__(out, sketch, space)
        self._scale = scale

    def add(self, name: str, rows: Tensor, start: int = 0) -> None:
        """The gradients (n, …) of the whole parameter for the examples start … start + n."""
        super().add(name, rows.reshape(len(rows), -1) * self._scale.of(name), start)

    def outer(self, name: str, left: Tensor, right: Tensor, start: int = 0) -> None:
        """The gradient Σ_t left_t ⊗ right_t of a whole matrix (o, i), from left (n, T, o) and right (n, T, i)."""
        factors = self._scale.factors(name)
        if factors is not None:
            super().outer(name, _scaled(left, factors[0]), _scaled(right, factors[1]), start)
            return
        rows = self._rows(name, start, len(left))
        self._sketch.add_outer_(rows, left, right, self._offsets[name], self._scale.of(name))

    def windows(self, name: str, left: Tensor, right: Tensor, taps: Tensor, windows: Tensor) -> None:
        """The gradient of a convolution's weight (o, c, J); arguments as in `Sketch.add_windows_`."""
        factors, offset, held = self._scale.factors(name), self._offsets[name], self._held_for(left)
        rows = self._rows(name, 0, len(left))
        if factors is not None and held is not None:
            by_rows = _scaled(left, factors[0][:, None])
            if held.takes_windows(by_rows, right.to(by_rows.dtype), taps, windows, offset, factors[1]):
                return
        self._sketch.add_windows_(rows, left, right, taps, windows, offset, self._scale.of(name))

    def scatter(self, name: str, index: Tensor, values: Tensor) -> None:
        """The gradient of a table (V, D) whose row index[b, t] receives values[b, t]: (B, T) and (B, T, D)."""
        super().scatter(name, index, values * self._scale.rows(name, index.long()))


class SinkOfMetrics(GradientSink):
    """Hands everything to the sinks of several metrics.

    Args:
        sinks: one for each.
        outs: the rows of each.
        sketch: the projection R.
        space: where each parameter lies.
    """

    def __init__(
        self, sinks: Sequence[GradientSink], outs: Sequence[Tensor], sketch: Sketch, space: ParameterSpace
    ) -> None:
        super().__init__(outs[0], sketch, space)
        self._sinks = sinks

    def hold(self) -> None:
        """As `GradientSink.hold`, in each metric."""
        for sink in self._sinks:
            sink.hold()

    def release(self, *, add: bool = True) -> None:
        """As `GradientSink.release`, in each metric."""
        for sink in self._sinks:
            sink.release(add=add)

    def add(self, name: str, rows: Tensor, start: int = 0) -> None:
        """As `GradientSink.add`."""
        for sink in self._sinks:
            sink.add(name, rows, start)

    def outer(self, name: str, left: Tensor, right: Tensor, start: int = 0) -> None:
        """As `GradientSink.outer`."""
        for sink in self._sinks:
            sink.outer(name, left, right, start)

    def windows(self, name: str, left: Tensor, right: Tensor, taps: Tensor, windows: Tensor) -> None:
        """As `GradientSink.windows`."""
        for sink in self._sinks:
            sink.windows(name, left, right, taps, windows)

    def scatter(self, name: str, index: Tensor, values: Tensor) -> None:
        """As `GradientSink.scatter`."""
        for sink in self._sinks:
            sink.scatter(name, index, values)


class HandingSink(GradientSink):
    """Hands pieces on to a sink, which says what it takes and holds back; what it makes of them first, subclasses say.

    Args:
        sink: what takes them.
    """

    def __init__(self, sink: GradientSink) -> None:
        self._sink = sink

    @property
    def fuses_windows(self) -> bool:
        """As the sink."""
        return self._sink.fuses_windows

    @property
    def accepts_half(self) -> bool:
        """As the sink."""
        return self._sink.accepts_half

    def hold(self) -> None:
        """As of the sink."""
        self._sink.hold()

    def release(self, *, add: bool = True) -> None:
        """As of the sink."""
        self._sink.release(add=add)


class WeightedSink(HandingSink):
    """Hands everything to a sink, each parameter's pieces multiplied by its weight.

    Args:
        sink: what takes them.
        space: says the weights.
    """

    def __init__(self, sink: GradientSink, space: ParameterSpace) -> None:
        super().__init__(sink)
        self._weights = dict(zip(space.names, space.weights or (1.0,) * len(space.names), strict=True))

    def add(self, name: str, rows: Tensor, start: int = 0) -> None:
        """As `GradientSink.add`."""
        self._sink.add(name, _roomy(rows) * self._weights[name], start)

    def outer(self, name: str, left: Tensor, right: Tensor, start: int = 0) -> None:
        """As `GradientSink.outer`; the smaller factor is multiplied."""
        left, right = _roomy(left), _roomy(right)
        if left.numel() < right.numel():
            self._sink.outer(name, left * self._weights[name], right, start)
        else:
            self._sink.outer(name, left, right * self._weights[name], start)

    def windows(self, name: str, left: Tensor, right: Tensor, taps: Tensor, windows: Tensor) -> None:
        """As `GradientSink.windows`."""
        self._sink.windows(name, _roomy(left) * self._weights[name], _roomy(right), taps, windows)

    def scatter(self, name: str, index: Tensor, values: Tensor) -> None:
        """As `GradientSink.scatter`."""
        self._sink.scatter(name, index, _roomy(values) * self._weights[name])


def _roomy(factor: Tensor) -> Tensor:
    """A factor in a number format with room for weights; float16 has none."""
    return factor.float() if factor.dtype == torch.float16 else factor


def _scaled(factor: Tensor, by: Tensor) -> Tensor:
    """A factor scaled, in its own precision where that has room: float16 has none for P^½."""
    scaled = factor * by
    return scaled.to(factor.dtype) if factor.dtype == torch.bfloat16 else scaled


def weighted_sum(weights: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_b w_b row_b (..., k) and the root sum of squares (...) of its terms, of weights (B,) and rows (..., B, k).

    Part by part: all terms at once would take as much memory as the rows. Not as a product of matrices, which autocast
    and TF32 round.
    """
    *outer, size, dim = rows.shape
    total, squares = (rows.new_zeros(shape, dtype=rows.dtype, device=rows.device) for shape in ([*outer, dim], outer))
    count = max(1, _PART * size // max(1, rows.numel()))
    for own, part in zip(weights.split(count), rows.split(count, dim=-2), strict=True):
        terms = own[:, None] * part
        total += terms.sum(-2)
        squares += terms.flatten(-2).norm(dim=-1).square()
    return total, squares.sqrt()


class SinkByParameter(GradientSink):
    """Keeps the sketches of the parameters apart, to tell which of them differ.

    Args:
        size: number of examples.
        sketch: the projection R.
        space: where each parameter lies.
        device: of the rows.
    """

    def __init__(self, size: int, sketch: Sketch, space: ParameterSpace, device: torch.device) -> None:
        out = torch.zeros(len(space.names), size, sketch.dim, device=device, dtype=torch.float32)
        super().__init__(out, sketch, space)
        self._at = {name: n for n, name in enumerate(space.names)}

    def hold(self) -> None:
        """Nothing is held back, as rows of different parameters don't add up here."""

    def _rows(self, name: str, start: int, count: int) -> Tensor:
        return self._out[self._at[name], start : start + count]

    @property
    def sums(self) -> Tensor:
        """Of each parameter, its rows (parameters, B, dim)."""
        return self._out

    def totals(self) -> tuple[Tensor, Tensor]:
        """Of each parameter, the sum over examples (parameters, dim), and the sum of the squares (parameters,)."""
        return self._out.sum(1), self._out.square().sum((1, 2))

    def touched(self) -> set[str]:
        """Names of the parameters that received anything but zeros."""
        nonzero = self._out.flatten(1).any(dim=1).tolist()
        return {name for name, n in self._at.items() if nonzero[n]}

    def differing(self, expected: SinkByParameter, weights: Tensor, relative: float, floor: float) -> list[str]:
        """Names of the parameters whose weighted sum over examples differs from what is expected.

        Args:
            expected: one example's, the gradient of the weighted sum.
            weights: (B,).
            relative: to the norm of the parameter's terms.
            floor: to the norm of all parameters' terms.
        """
        totals, norms = weighted_sum(weights, self._out)
        error = (totals - expected._out[:, 0]).norm(dim=1)
        norms = torch.maximum(norms, expected._out[:, 0].norm(dim=1))
        wrong = (error > relative * norms + floor * norms.norm()).tolist()
        return [name for name, n in self._at.items() if wrong[n]]
