"""The tensor sketch of outer products in the frequency domain, by torch's transforms: for GPUs, and the reference.

With x and y the sketches of the two factors and z = x + iy, the circular convolution x * y is half the imaginary part
of z * z: one complex transform a step, squares summed over the steps, one transform back for all layers.
"""

from collections.abc import Iterator
from math import ceil, log2
from typing import NamedTuple

import torch
from torch import Tensor

from .tensor_balance import balanced
from .tensor_map import SPLITS, TensorMap
from .tiles import window_columns

__all__ = ["TorchSpectra", "columns_of", "spectral_pays"]

_HELD = 1 << 24  # complex numbers that are held at once


class _Costs(NamedTuple):
    """Of both routes, in products of an outer product, two operations each, at the rate of the backend.

    Attributes:
        transform: of a step's transform, for each of its k log2 k.
        block: of a step's factor, for each k entries of it, over those of the transform.
        made: what making and reading a coordinate of an outer product costs.
        mapped: what mapping one costs where the rows of the product fill their blocks of k.
        launches: of a batch's transforms, beyond those of its outer products.
    """

    transform: float
    block: float
    made: float
    mapped: float
    launches: float


_COSTS = {
    ("triton", False): _Costs(40.0, 0.0, 150.0, 0.0, 3e9),
    ("triton", True): _Costs(115.0, 0.2, 400.0, 370.0, 2e9),
    ("torch", False): _Costs(6.0, 0.0, 20.0, 0.0, 0.0),
    ("torch", True): _Costs(6.0, 0.0, 20.0, 0.0, 0.0),
}
_WITHOUT_KERNEL = _Costs(800.0, 0.0, 5000.0, 0.0, 6e10)  # halves on a GPU by the library's transforms


def spectral_pays(backend: str, batch: int, steps: int, o: int, i: int, dim: int, *, half: bool) -> bool:
    """Whether the transforms of so many steps cost less than the outer products of (o, i) coordinates.

    Args:
        backend: "triton" or "torch".
        batch: examples B.
        steps: of an example, T.
        o: length of the left factor.
        i: length of the right factor.
        dim: k.
        half: whether the factors are of half precision.
    """
    costs = _WITHOUT_KERNEL if backend == "triton" and half and dim not in SPLITS else _COSTS[backend, half]
    blocks = ceil(o / dim) + ceil(i / dim)
    step = costs.transform * dim * log2(max(dim, 2)) * (1 + costs.block * (blocks - 2))
    filled = max(o / (ceil(o / dim) * dim), i / (ceil(i / dim) * dim))
    coordinate = steps + costs.made + costs.mapped / filled
    return batch * steps * step + costs.launches < batch * o * i * coordinate


class TorchSpectra:
    """Sums of products in the frequency domain, for all layers of a batch, until `finish_` adds them to out.

    Args:
        out: (B, k) float32.
        backend: "triton" or "torch".
    """

    def __init__(self, out: Tensor, backend: str) -> None:
        self._out, self._backend = out, backend
        self._spectrum: Tensor | None = None

    def add_windows(
        self,
        left: Tensor,
        right: Tensor,
        taps: Tensor,
        windows: Tensor,
        matrix: TensorMap,
        scale: Tensor | None = None,
    ) -> None:
        """Add a convolution's gradient, as `tensor_add_windows_` does; with a scale (c J,), its columns times that."""
        for some, columns in columns_of(right, taps, windows, self._backend):
            scaled = columns if scale is None else columns * scale.to(columns.dtype)
            self.add_outer(left[some].transpose(1, 2), scaled, matrix, some)

    def add_outer(self, left: Tensor, right: Tensor, matrix: TensorMap, some: slice = slice(None)) -> None:
        """Add R vec(sum_t left_t (x) right_t), for left (b, T, o) and right (b, T, i) of some examples."""
        if self._spectrum is None:
            self._spectrum = torch.zeros(self._out.shape, dtype=torch.complex64, device=self._out.device)
        spectrum = self._spectrum[some]
        if self._backend == "triton" and left.dtype == right.dtype != torch.float32 and matrix.dim in SPLITS:
            from .triton_spectral import add_spectra_triton_

            add_spectra_triton_(spectrum, left, right, matrix)
            return
        (batch, steps, _), dim = left.shape, matrix.dim
        examples, run = max(1, _HELD // (steps * dim)), max(1, min(steps, _HELD // dim))
        for b in range(0, batch, examples):
            for t in range(0, steps, run):
                own, part = slice(b, b + examples), slice(t, t + run)
                z = _factors(left[own, part], right[own, part], matrix, self._backend)
                spectrum[own] += _sum_of_squares(torch.fft.fft(z), self._backend)

    def finish_(self) -> None:
        """Transform back, all layers at once."""
        if self._spectrum is not None:
            self._out.add_(torch.fft.ifft(self._spectrum).imag, alpha=0.5)
            self._spectrum = None


def columns_of(right: Tensor, taps: Tensor, windows: Tensor, backend: str) -> Iterator[tuple[slice, Tensor]]:
    """Some examples, and their columns right[b, c, taps[j] + windows[l]] as (b, L, C J)."""
    if backend != "triton":
        return window_columns(right, taps, windows)
    from .triton_outer import window_columns_triton

    return window_columns_triton(right, taps, windows)


def _factors(left: Tensor, right: Tensor, matrix: TensorMap, backend: str) -> Tensor:
    """Z (B, T, k) complex: the sketches of left and right, brought to one size."""
    if backend == "triton":
        from .triton_tensor import factors_triton

        return factors_triton(left, right, matrix)
    tables = matrix.tables(left.device)
    sketches = [
        _side(x.float() * scale, table, matrix.dim)
        for x, scale, table in zip((left, right), balanced(left, right), tables, strict=True)
    ]
    return torch.complex(*sketches)


def _side(x: Tensor, table: Tensor, dim: int) -> Tensor:
    """Sketch of one side (B, T, n): a block at a time, within which no two entries meet."""
    sketch = x.new_zeros(*x.shape[:2], dim)
    signs, columns = 1 - 2 * (table < 0).float(), (table & 0x7FFFFFFF).long()
    for start in range(0, x.shape[2], dim):
        block = slice(start, start + dim)
        sketch[:, :, columns[block]] += x[:, :, block] * signs[block]
    return sketch


def _sum_of_squares(z: Tensor, backend: str) -> Tensor:
    """sum_t z_t^2 of z (B, T, k) complex."""
    if backend == "triton":
        from .triton_tensor import sum_of_squares_triton

        return sum_of_squares_triton(z)
    return z.square_().sum(1)
