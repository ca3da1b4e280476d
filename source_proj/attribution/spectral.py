"""Functions of a Hessian by its spectrum: what a segment adds, forgets and carries into another metric."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Spectrum", "cross_operator", "decay_operator", "response", "ridge_inverse"]


@dataclass(frozen=True)
class Spectrum:
    """Eigendecomposition of a positive semi-definite Ĥ: eigenvalue 0 outside the span of ``vectors``.

    Attributes:
        values: eigenvalues ``(r,)`` float64, not negative.
        vectors: orthonormal eigenvectors ``(k, r)`` float64.
    """

    values: Tensor
    vectors: Tensor

    @property
    def dim(self) -> int:
        """The size k of the space."""
        return self.vectors.shape[0]

    @property
    def trace(self) -> float:
        """tr(Ĥ)."""
        return float(self.values.sum())

    def apply(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the matrix f(Ĥ), ``(k, k)`` float64, for an elementwise f of the eigenvalues."""
        if self.values.numel() == self.dim:
            return (self.vectors * function(self.values)) @ self.vectors.T
        rest = function(self.values.new_zeros(1))
        matrix = (self.vectors * (function(self.values) - rest)) @ self.vectors.T
        matrix.diagonal().add_(rest)
        return matrix

    def multiply(self, rows: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``rows @ f(Ĥ)``, ``(n, k)`` float64, without forming f(Ĥ): the cheaper way for n < k rows."""
        rows = rows.to(self.vectors)
        inside = rows @ self.vectors
        if self.values.numel() == self.dim:
            return (inside * function(self.values)) @ self.vectors.T
        rest = function(self.values.new_zeros(1))
        return rest * rows + (inside * (function(self.values) - rest)) @ self.vectors.T


def response(time: float, decay: float, damping: float) -> Callable[[Tensor], Tensor]:
    """c(σ) = (1 - exp(-s x)) / x with x = σ + λ + ρ, and its limit s at x = 0 (eq. 20 and 21 of arXiv 2405.12186).

    Args:
        time: the segment's time scale s.
        decay: weight decay λ.
        damping: ρ, such as the noise floor of `curvature`.
    """

    def function(eigenvalues: Tensor) -> Tensor:
        x = eigenvalues + decay + damping
        flat = time * x < 1e-15  # there c = s (1 - s x / 2 + …) is s to the last bit, and expm1 could underflow
        safe = torch.where(flat, torch.ones_like(x), x)
        return torch.where(flat, torch.full_like(x, time), -torch.expm1(-time * safe) / safe)

    return function


def decay_operator(time: float, decay: float) -> Callable[[Tensor], Tensor]:
    """exp(-s (σ + λ)): what a segment forgets of what came before it (eq. 16 of arXiv 2405.12186)."""
    return lambda eigenvalues: torch.exp(-time * (eigenvalues + decay))


def cross_operator(time: float, decay: float) -> Callable[[Tensor], Tensor]:
    """exp(-s λ) (exp(-s σ) - 1)/σ, and its limit -s exp(-s λ) at σ = 0.

    With P_l^½ H_l P_l^½ = H̃, a segment takes P_m^½ v to
    exp(-s λ) P_m^½ v + P_m^½ H_l P_l^½ cross_operator(H̃) P_l^½ v, for any other metric P_m.
    """
    inner = response(time, 0.0, 0.0)
    return lambda eigenvalues: -math.exp(-time * decay) * inner(eigenvalues)


def ridge_inverse(ridge: float, of: Spectrum) -> Callable[[Tensor], Tensor]:
    """1 / (σ + ridge); without a ridge, the inverse on the range of Ĥ and 0 on its null space.

    Eigenvalues below float32 rounding of the largest count as zero: the rows they came from know no better.
    """
    floor = float(of.values.max()) * of.dim * torch.finfo(torch.float32).eps if of.values.numel() else 0.0

    def function(eigenvalues: Tensor) -> Tensor:
        if ridge > 0:
            return 1 / (eigenvalues + ridge)
        return torch.where(
            eigenvalues > floor, 1 / eigenvalues.clamp(min=max(floor, torch.finfo(torch.float64).tiny)), 0
        )

    return function
