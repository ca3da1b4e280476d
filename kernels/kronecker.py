"""Two-sided projection of one matrix parameter, P G Q^T, as LoGra does (https://arxiv.org/abs/2405.13954).

For a parameter of shape (o, i) at an absolute offset, G its gradient and k = k_o k_i columns:

    y += vec(P G Q^T),  P (k_o, o) with entries +-1/sqrt(k_o),  Q (k_i, i) with entries +-1/sqrt(k_i).

The sign of P at (r, c) is that of the Rademacher matrix with ``TAG_LEFT`` at column r and coordinate offset + c; of Q
the same with ``TAG_RIGHT``. Coordinates of other parameters are other counters, so parameters get independent P and Q.
"""

import math

from torch import Tensor

from .rademacher import sign_tile

__all__ = ["TAG_LEFT", "TAG_RIGHT", "kronecker_add_", "kronecker_add_outer_", "kronecker_split"]

TAG_LEFT = 0x4C454654
TAG_RIGHT = 0x52474854


def kronecker_split(dim: int) -> tuple[int, int]:
    """(k_o, k_i): k_o is the largest divisor of dim up to its square root; squares serve best, primes give rank one.

    >>> kronecker_split(4096), kronecker_split(2048)
    ((64, 64), (32, 64))
    """
    left = next(d for d in range(math.isqrt(dim), 0, -1) if dim % d == 0)
    return left, dim // left


def _factors(out: Tensor, offset: int, shape: tuple[int, int], seed: int, backend: str) -> tuple[Tensor, Tensor]:
    """Signs of P^T (o, k_o) and Q^T (i, k_i)."""
    k_o, k_i = kronecker_split(out.shape[1])
    left = sign_tile(offset, offset + shape[0], k_o, seed=seed, tag=TAG_LEFT, backend=backend, device=out.device)
    right = sign_tile(offset, offset + shape[1], k_i, seed=seed, tag=TAG_RIGHT, backend=backend, device=out.device)
    return left, right


def kronecker_add_(
    out: Tensor, rows: Tensor, offset: int, shape: tuple[int, int], *, seed: int, backend: str = "torch"
) -> None:
    """Add vec(P G_b Q^T) to out (B, k), for the gradients rows (B, o i) of one parameter of shape (o, i)."""
    left, right = _factors(out, offset, shape, seed, backend)
    gradient = rows.reshape(-1, *shape)  # (B, o, i)
    # The shorter chain of the two products; which one it is depends on shapes alone.
    (o, i), (k_o, k_i) = shape, (left.shape[1], right.shape[1])
    if o * i * k_i + o * k_i * k_o <= k_o * o * i + k_o * i * k_i:
        projected = left.T @ (gradient @ right)
    else:
        projected = (left.T @ gradient) @ right
    out.add_(projected.flatten(1), alpha=out.shape[1] ** -0.5)


def kronecker_add_outer_(
    out: Tensor, left: Tensor, right: Tensor, offset: int, *, seed: int, backend: str = "torch"
) -> None:
    """Add vec(sum_t (P left_t)(Q right_t)^T) to out (B, k), for left (B, T, o) and right (B, T, i)."""
    signs_left, signs_right = _factors(out, offset, (left.shape[2], right.shape[2]), seed, backend)
    a = left.float() @ signs_left  # (B, T, k_o)
    b = right.float() @ signs_right  # (B, T, k_i)
    out.add_((a.transpose(1, 2) @ b).flatten(1), alpha=out.shape[1] ** -0.5)
