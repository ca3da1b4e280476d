"""The tensor sketch of outer products in the frequency domain, by torch's transforms: for GPUs, and the reference.

With x and y the sketches of the two factors and z = x + iy, the circular convolution x * y is half the imaginary part
of z * z: one complex transform a step, squares summed over the steps, one transform back for all layers.
"""

from math import log2
from typing import NamedTuple

import torch
from torch import Tensor

from .tensor_balance import balanced
from .tensor_map import TensorMap

__all__ = ["TorchSpectra", "spectral_pays"]

_HELD = 1 << 24  # complex numbers that are held at once


class _Costs(NamedTuple):
    """Of both routes, in products of an outer product, two operations each, at the rate of the backend.

    Attributes:
        transform: of a step's transform, for each of its k log2 k.
        transform_begin: in steps, what an example's transforms cost besides.
        outer_begin: in steps, what making, reading and mapping every coordinate of an outer product costs.
    """

    transform: float
    transform_begin: int
    outer_begin: int


# Measured on one H200, k = 4,096, microseconds per example by the outer product / by transforms: float32, 128 steps,
# width 768: 39 / 138, 2,048: 66 / 130, 4,096: 183 / 136; 512 steps: 39 / 139, 128 / 155, 434 / 169 (eight examples,
# whose launches are most of what transforms cost). Tensor cores multiply half precision so fast that an outer product
# costs what its coordinates cost: GPT-2's layers of 512 steps took 26 by it, and 83 by transforms.
_COSTS = {
    ("triton", False): _Costs(40.0, 200, 150),
    ("triton", True): _Costs(800.0, 200, 5000),
    ("torch", False): _Costs(6.0, 1, 20),
    ("torch", True): _Costs(6.0, 1, 20),
}


def spectral_pays(backend: str, steps: int, o: int, i: int, dim: int, *, half: bool) -> bool:
    """Whether the transforms of so many steps cost less than the outer product of (o, i) coordinates.

    Args:
        backend: "triton" or "torch".
        steps: number of steps T.
        o: length of the left factor.
        i: length of the right factor.
        dim: k.
        half: whether the factors are of half precision.
    """
    costs = _COSTS[backend, half]
    by_transforms = (steps + costs.transform_begin) * costs.transform * dim * log2(max(dim, 2))
    return by_transforms < (steps + costs.outer_begin) * o * i


class TorchSpectra:
    """Sums of products in the frequency domain, for all layers of a batch, until `finish_` adds them to out.

    Args:
        out: (B, k) float32.
        backend: "triton" or "torch".
    """

    def __init__(self, out: Tensor, backend: str) -> None:
        self._out, self._backend = out, backend
        self._spectrum: Tensor | None = None

    def add_outer(self, left: Tensor, right: Tensor, matrix: TensorMap) -> None:
        """Add R vec(sum_t left_t (x) right_t), for left (B, T, o) and right (B, T, i)."""
        if self._spectrum is None:
            self._spectrum = torch.zeros(self._out.shape, dtype=torch.complex64, device=self._out.device)
        (batch, steps, _), dim = left.shape, matrix.dim
        examples, run = max(1, _HELD // (steps * dim)), max(1, min(steps, _HELD // dim))
        for b in range(0, batch, examples):
            for t in range(0, steps, run):
                own, part = slice(b, b + examples), slice(t, t + run)
                z = _factors(left[own, part], right[own, part], matrix, self._backend)
                self._spectrum[own] += _sum_of_squares(torch.fft.fft(z), self._backend)

    def finish_(self) -> None:
        """Transform back, all layers at once."""
        if self._spectrum is not None:
            self._out.add_(torch.fft.ifft(self._spectrum).imag, alpha=0.5)
            self._spectrum = None


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
