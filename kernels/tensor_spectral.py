"""The tensor sketch of outer products in the frequency domain, by torch's transforms: for GPUs, and the reference.

With x and y the sketches of the two factors and z = x + iy, the circular convolution x * y is half the imaginary part
of z * z: one complex transform a step, squares summed over the steps, one transform back.
"""

from math import log2

import torch
from torch import Tensor

from .tensor_balance import balanced
from .tensor_map import TensorMap

__all__ = ["add_spectral_", "spectral_pays"]

_HELD = 1 << 24  # complex numbers that are held at once
# Time of a transform for each k log2 k and step over that of an outer product for each coordinate and step. GPUs: eight
# transfers of a number and k log2 k slow operations against two operations of a product.
_TRANSFORM = {"triton": 8.0, "torch": 6.0}


def spectral_pays(backend: str, steps: int, o: int, i: int, dim: int) -> bool:
    """Whether the transforms of so many steps cost less than the outer product of (o, i) coordinates.

    One read and map of every coordinate is counted as some twenty steps' products.
    """
    return (steps + 1) * _TRANSFORM[backend] * dim * log2(max(dim, 2)) < (steps + 20) * o * i


def add_spectral_(out: Tensor, left: Tensor, right: Tensor, matrix: TensorMap, *, backend: str = "torch") -> None:
    """Add R vec(sum_t left_t (x) right_t), left (B, T, o) and right (B, T, i), to out (B, k) float32, in place."""
    (batch, steps, _), dim = left.shape, matrix.dim
    examples, run = max(1, _HELD // (steps * dim)), max(1, min(steps, _HELD // dim))
    for b in range(0, batch, examples):
        some = slice(b, min(b + examples, batch))
        spectrum = torch.zeros(some.stop - b, dim, dtype=torch.complex64, device=out.device)
        for t in range(0, steps, run):
            part = slice(t, t + run)
            z = _factors(left[some, part], right[some, part], matrix, backend)
            spectrum += _sum_of_squares(torch.fft.fft(z), backend)
        out[some] += 0.5 * torch.fft.ifft(spectrum).imag


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
