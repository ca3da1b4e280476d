"""Functions of a Hessian: what a segment adds, forgets and carries into another metric.

Every verb needs f(Ĥ) on a few rows only, so that Ĥ's k eigenvectors are seldom worth their price (some 25 k³
operations). Ways to the same numbers, of which `gram_hessian` has a third, for few rows:

* :class:`Spectrum`: eigenvalues and eigenvectors in float64, for a small k, few rows, or an f that has a jump.
* :class:`DenseHessian`: one Cholesky factor (k³/3 operations) of Ĥ + μ, and polynomials in its inverse (`series`): a
  solution a degree for some rows, the matrix f(Ĥ) for many.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from source_proj.attribution.series import Series, SpectralFunction, shortest_series

__all__ = [
    "ROWS_AT_ONCE",
    "SINGLE_CONDITION",
    "DenseHessian",
    "Hessian",
    "Spectrum",
    "cross_operator",
    "decay_operator",
    "effective_dimension",
    "factored_dimension",
    "response",
    "ridge_inverse",
    "shifted_factor",
]

ROWS_AT_ONCE = 4096
"""Rows that are solved for at once."""
SINGLE_CONDITION = 1e4
"""Of Ĥ + μ, up to which single precision is exact enough."""

_KEPT = 256  # functions: some for each segment of a few banks


class Hessian(Protocol):
    """A positive semi-definite Ĥ ``(k, k)``, as far as its functions go."""

    @property
    def dim(self) -> int:
        """The size k of the space."""

    @property
    def trace(self) -> float:
        """tr(Ĥ)."""

    def multiply(self, rows: Tensor, function: SpectralFunction) -> Tensor:
        """Return ``rows @ f(Ĥ)``, ``(n, k)``."""

    def apply(self, function: SpectralFunction) -> Tensor:
        """Return the matrix f(Ĥ), ``(k, k)``: for more than k rows the cheaper way."""

    def effective_dimension(self, ridge: float) -> float:
        """Tr Ĥ(Ĥ + λ)⁻¹, for λ > 0."""


@dataclass(frozen=True)
class Spectrum:
    """Eigendecomposition of Ĥ: eigenvalue 0 outside the span of ``vectors``.

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

    def effective_dimension(self, ridge: float) -> float:
        """Tr Ĥ(Ĥ + λ)⁻¹, for λ > 0."""
        return float((self.values / (self.values + ridge)).sum())


@dataclass(frozen=True)
class DenseHessian:
    """Ĥ by Cholesky factors of Ĥ + μ, each made when a function first asks for it.

    Attributes:
        dim: k.
        trace: tr(Ĥ).
        norm: an upper bound of Ĥ's largest eigenvalue, such as its Frobenius norm.
        factor: gives the lower Cholesky factor ``(k, k)`` of Ĥ + μ in the type asked for.
        spectrum: gives Ĥ's eigendecomposition, for functions with a jump.

    Example:
        >>> identity = torch.eye(3)
        >>> def factor(shift, dtype):
        ...     return torch.linalg.cholesky((identity + shift * identity).to(dtype))
        >>> hessian = DenseHessian(3, 3.0, 3**0.5, factor, lambda: Spectrum(torch.ones(3), identity))
        >>> hessian.multiply(torch.ones(1, 3), decay_operator(1.0, 0.0))
        tensor([[0.3679, 0.3679, 0.3679]])
    """

    dim: int
    trace: float
    norm: float
    factor: Callable[[float, torch.dtype], Tensor]
    spectrum: Callable[[], Spectrum]

    def multiply(self, rows: Tensor, function: SpectralFunction) -> Tensor:
        """Return ``rows @ f(Ĥ)``, ``(n, k)``: 2 k² operations a row and degree of the polynomial."""
        if (polynomial := self._polynomial(function)) is None:
            return self.spectrum().multiply(rows, function)
        series, factor = polynomial
        moved = [series.apply(factor, chunk.to(factor)) for chunk in rows.split(ROWS_AT_ONCE) if len(chunk)]
        return torch.cat(moved) if moved else rows.to(factor)

    def apply(self, function: SpectralFunction) -> Tensor:
        """Return the matrix f(Ĥ), ``(k, k)``: k³ operations a product, some 2 √degree of them."""
        if (polynomial := self._polynomial(function)) is None:
            return self.spectrum().apply(function)
        series, factor = polynomial
        return series.matrix(factor)

    def _polynomial(self, function: SpectralFunction) -> tuple[Series, Tensor] | None:
        """The series of a function and the factor that it is of; None where eigenvectors are needed."""
        series = shortest_series(function, self.norm)
        if series is None:
            return None
        condition = self.norm / series.shift + 1
        try:
            return series, self.factor(series.shift, torch.float32 if condition <= SINGLE_CONDITION else torch.float64)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # the shift is lost in the rounding of Ĥ's own sums
            return None

    def effective_dimension(self, ridge: float) -> float:
        """Tr Ĥ(Ĥ + λ)⁻¹, for λ > 0."""
        return factored_dimension(self, ridge, torch.float32)


@lru_cache(_KEPT)
def response(time: float, decay: float, damping: float) -> SpectralFunction:
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

    return SpectralFunction(function, tuple(shift for shift in (decay + damping, *_forgetting(time)) if shift > 0))


@lru_cache(_KEPT)
def decay_operator(time: float, decay: float) -> SpectralFunction:
    """exp(-s (σ + λ)): what a segment forgets of what came before it (eq. 16 of arXiv 2405.12186)."""
    return SpectralFunction(lambda eigenvalues: torch.exp(-time * (eigenvalues + decay)), _forgetting(time))


@lru_cache(_KEPT)
def cross_operator(time: float, decay: float, coupled: bool = False) -> SpectralFunction:
    """exp(-s λ) (exp(-s σ) - 1)/σ, and its limit -s exp(-s λ) at σ = 0.

    With P_l^½ H_l P_l^½ = H̃, a segment takes P_m^½ v to
    exp(-s λ) P_m^½ v + P_m^½ H_l P_l^½ cross_operator(H̃) P_l^½ v, for any other metric P_m.

    Args:
        time: the segment's time scale s.
        decay: weight decay λ.
        coupled: (exp(-s (σ + λ)) - 1)/(σ + λ) instead: where P_l only leaves out parameters, which do not decay,
            P_m^½ v becomes P_m^½ v + P_m^½ (H_l + λ) P_l^½ cross_operator(H̃) P_l^½ v.
    """
    inner = response(time, decay if coupled else 0.0, 0.0)
    factor = 1.0 if coupled else math.exp(-time * decay)
    return SpectralFunction(lambda eigenvalues: -factor * inner(eigenvalues), inner.shifts)


def _forgetting(time: float) -> tuple[float, ...]:
    """Shifts for exp(-s σ): the lowest degrees are found between 2/s and 8/s, whatever σ there are."""
    return (8 / time, 4 / time, 2 / time) if time > 0 else ()


class Factored(Protocol):
    """What has Cholesky factors of a matrix with the eigenvalues of Ĥ but for zeros, and eigenvectors beside them."""

    @property
    def factor(self) -> Callable[[float, torch.dtype], Tensor]:
        """Gives the lower Cholesky factor ``(n, n)`` of the matrix + μ, from sums in the type asked for."""

    @property
    def spectrum(self) -> Callable[[], Spectrum]:
        """Gives Ĥ's eigendecomposition."""


def factored_dimension(hessian: Factored, ridge: float, dtype: torch.dtype) -> float:
    """Tr Ĥ(Ĥ + λ)⁻¹ by a Cholesky factor L: n - λ tr (L Lᵀ)⁻¹; zeros of the matrix add nothing."""
    try:
        lower = hessian.factor(ridge, dtype)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # the ridge is lost in the rounding of the sums
        return hessian.spectrum().effective_dimension(ridge)
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    return max(0.0, len(lower) - ridge * float(inverse.square().sum(dtype=torch.float64)))


def shifted_factor(matrix: Tensor, shift: float, dtype: torch.dtype) -> Tensor:
    """The lower Cholesky factor ``(k, k)`` of Ĥ + μ."""
    shifted = matrix.to(dtype, copy=True)
    shifted.diagonal().add_(shift)
    lower: Tensor = torch.linalg.cholesky(shifted)
    return lower


@lru_cache(_KEPT)
def ridge_inverse(ridge: float, dim: int) -> SpectralFunction:
    """1 / (σ + ridge); without a ridge, the inverse on the range of Ĥ and 0 on its null space.

    Eigenvalues below float32 rounding of the largest, times k, count as zero: the rows they came from know no better.
    """

    def function(eigenvalues: Tensor) -> Tensor:
        if ridge > 0:
            return 1 / (eigenvalues + ridge)
        floor = float(eigenvalues.max()) * dim * torch.finfo(torch.float32).eps if eigenvalues.numel() else 0.0
        return torch.where(
            eigenvalues > floor, 1 / eigenvalues.clamp(min=max(floor, torch.finfo(torch.float64).tiny)), 0
        )

    return SpectralFunction(function, (ridge,) if ridge > 0 else ())


def effective_dimension(hessian: Hessian, ridge: float) -> float:
    """Tr Ĥ(Ĥ + λ)⁻¹, how many directions the rows tell from noise; the rank where λ is 0."""
    ridge = max(ridge, hessian.trace / hessian.dim * torch.finfo(torch.float32).eps)
    return hessian.effective_dimension(ridge) if ridge > 0 else 0.0
