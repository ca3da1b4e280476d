"""Functions of a Hessian: what a segment adds, forgets and carries into another metric.

Every verb needs f(Ĥ) on a few rows only, so that Ĥ's k eigenvectors are seldom worth their price (some 25 k³
operations). Ways to the same numbers, of which `gram_hessian` has a third, for few rows:

* :class:`Spectrum`: eigenvalues and eigenvectors in float64, for a small k, few rows, or an f that has a jump.
* :class:`DenseHessian`: one Cholesky factor (k³/3 operations) of Ĥ + μ. With T = μ (Ĥ + μ)⁻¹, whose eigenvalues
  t = μ/(σ + μ) lie in (0, 1], f(Ĥ) = T g(T), and g is a polynomial: of degree 0 where f is an inverse (time is
  infinite), of degree 10 or so for what forgets exponentially, at any σ ("restricted denominators": Nørsett,
  "Restricted Padé approximations to the exponential function", SIAM J. Numer. Anal. 15, 1978). It is the Chebyshev
  interpolant of the lowest degree that errs by less than float32's rounding is worth.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.polynomial import chebyshev
from torch import Tensor

__all__ = [
    "ROWS_AT_ONCE",
    "SINGLE_CONDITION",
    "DenseHessian",
    "Hessian",
    "Series",
    "SpectralFunction",
    "Spectrum",
    "cross_operator",
    "decay_operator",
    "effective_dimension",
    "factored_dimension",
    "response",
    "ridge_inverse",
    "shifted_factor",
    "shortest_series",
]

ROWS_AT_ONCE = 4096
"""Rows that are solved for at once."""
SINGLE_CONDITION = 1e4
"""Of Ĥ + μ, up to which single precision is exact enough."""

_TOLERANCE = 1e-6  # of max g: what a polynomial may err by, of the order of a float32 solution's rounding
_DEGREES = range(33)
_KEPT = 256  # functions: some for each segment of a few banks
_KEPT_SERIES = 4096  # of some functions each, for every block of a sketch's columns


@dataclass(frozen=True)
class SpectralFunction:
    """A function f of eigenvalues.

    Attributes:
        values: f, elementwise on eigenvalues ``(r,)`` float64.
        shifts: numbers μ > 0 such that f is near a polynomial in 1/(σ + μ), times 1/(σ + μ); none for an f with a jump.
    """

    values: Callable[[Tensor], Tensor]
    shifts: tuple[float, ...]

    def __call__(self, eigenvalues: Tensor) -> Tensor:
        """f(σ)."""
        return self.values(eigenvalues)


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
        series = shortest_series(function, self.norm)
        if series is None:
            return self.spectrum().multiply(rows, function)
        condition = self.norm / series.shift + 1
        try:
            factor = self.factor(series.shift, torch.float32 if condition <= SINGLE_CONDITION else torch.float64)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # the shift is lost in the rounding of Ĥ's own sums
            return self.spectrum().multiply(rows, function)
        moved = [series.apply(factor, chunk.to(factor)) for chunk in rows.split(ROWS_AT_ONCE) if len(chunk)]
        return torch.cat(moved) if moved else rows.to(factor)

    def apply(self, function: SpectralFunction) -> Tensor:
        """Return the matrix f(Ĥ), ``(k, k)``."""
        return self.multiply(torch.eye(self.dim, dtype=torch.float32, device="cpu"), function)

    def effective_dimension(self, ridge: float) -> float:
        """Tr Ĥ(Ĥ + λ)⁻¹, for λ > 0."""
        return factored_dimension(self, ridge, torch.float32)


@dataclass(frozen=True, eq=False)
class Series:
    """f(σ) = t g(t), t = μ/(σ + μ), with g a Chebyshev series on the interval that t is in.

    Attributes:
        shift: μ.
        lowest: the lower end of the interval; the upper one is 1.
        coefficients: g's, ``(degree + 1,)`` float64.
    """

    shift: float
    lowest: float
    coefficients: np.ndarray

    @cached_property
    def _map(self) -> tuple[float, float]:
        """A and b of a·t + b, which lies in [-1, 1]; an interval of no width is its own centre."""
        width = max(1 - self.lowest, 1e-12)
        return 2 / width, -(1 + self.lowest) / width

    def error(self, function: Callable[[Tensor], Tensor]) -> float:
        """Largest error of g on a fine grid, over its largest value there."""
        grid = np.concatenate([np.geomspace(self.lowest, 1, 512), np.linspace(self.lowest, 1, 512)])
        wanted = _quotient(function, self.shift, grid)
        slope, offset = self._map
        errors = np.abs(chebyshev.chebval(slope * grid + offset, self.coefficients) - wanted)
        return float(errors.max() / max(np.abs(wanted).max(), np.finfo(np.float64).tiny))

    def at_zero(self) -> "tuple[float, Series]":
        """f(0), and the series of (f(σ) - f(0))/σ, which is -t q(t)/μ with q(t) = (t g(t) - g(1))/(t - 1)."""
        slope, offset = self._map
        whole = chebyshev.chebmul(self.coefficients, [-offset / slope, 1 / slope])  # t g(t), of a·t + b
        value = float(chebyshev.chebval(1.0, whole))
        whole[0] -= value
        quotient = slope * chebyshev.chebdiv(whole, [-1.0, 1.0])[0]
        return value, Series(self.shift, self.lowest, -quotient / self.shift)

    def apply(self, factor: Tensor, rows: Tensor) -> Tensor:
        """``rows @ f(Ĥ)`` by Clenshaw's recurrence, one solution with the factor of Ĥ + μ a degree."""
        slope, offset = self._map
        columns = rows.T

        def inverse(x: Tensor) -> Tensor:  # T x
            return torch.cholesky_solve(x, factor).mul_(self.shift)

        def mapped(x: Tensor) -> Tensor:
            return inverse(x).mul_(slope).add_(x, alpha=offset)

        first, *later = (float(c) for c in self.coefficients)
        after, after_next = torch.zeros_like(columns), torch.zeros_like(columns)
        for coefficient in reversed(later):
            before = mapped(after).mul_(2) if after.any() else torch.zeros_like(columns)
            after, after_next = before.sub_(after_next).add_(columns, alpha=coefficient), after
        total = mapped(after).sub_(after_next).add_(columns, alpha=first) if later else columns * first
        return inverse(total).T


@lru_cache(_KEPT_SERIES)
def shortest_series(function: SpectralFunction, norm: float) -> Series | None:
    """The series of the lowest degree that is f on [0, norm] to rounding, over f's shifts; None where none is.

    The search takes longer than a query, so that it is remembered, and the functions are the same objects each time.
    """
    for degree in _DEGREES:
        for shift in function.shifts:
            lowest = shift / (norm + shift)
            nodes = np.cos((np.arange(degree + 1) + 0.5) * np.pi / (degree + 1))
            places = (1 + lowest) / 2 + (1 - lowest) / 2 * nodes
            values = _quotient(function, shift, places)
            series = Series(shift, lowest, chebyshev.chebfit(nodes, values, degree) if degree else values)
            if series.error(function) <= _TOLERANCE:
                return series
    return None


def _quotient(function: Callable[[Tensor], Tensor], shift: float, places: np.ndarray) -> np.ndarray:
    """g(t) = f(μ/t - μ)/t."""
    eigenvalues = torch.from_numpy(np.maximum(shift / places - shift, 0))
    values: np.ndarray = function(eigenvalues).numpy() / places
    return values


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
