"""Functions of a Hessian as polynomials in μ (Ĥ + μ)⁻¹, which one Cholesky factor gives.

With T = μ (Ĥ + μ)⁻¹, whose eigenvalues t = μ/(σ + μ) lie in (0, 1], f(Ĥ) = T g(T), and g is a polynomial: of degree 0
where f is an inverse (time is infinite), of degree 10 or so for what forgets exponentially, at any σ ("restricted
denominators": Nørsett, "Restricted Padé approximations to the exponential function", SIAM J. Numer. Anal. 15, 1978).
It is the Chebyshev interpolant of the lowest degree that errs by less than float32's rounding is worth.

On rows it takes a solution a degree. The matrix f(Ĥ) itself takes T, and some 2 √degree products of matrices
(Paterson and Stockmeyer, "On the number of nonscalar multiplications necessary to evaluate polynomials", SIAM J.
Comput. 2, 1973, https://doi.org/10.1137/0202007).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.polynomial import chebyshev
from torch import Tensor

from source_proj.kernels.gram import HEIGHT, mirrored

__all__ = ["Series", "SpectralFunction", "shortest_series"]

_TOLERANCE = 1e-6  # of max g: what a polynomial may err by, of the order of a float32 solution's rounding
_DEGREES = range(33)
_KEPT = 4096  # of some functions each, for every block of a sketch's columns


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

    @property
    def _whole(self) -> np.ndarray:
        """The coefficients of t g(t), of a·t + b."""
        slope, offset = self._map
        return chebyshev.chebmul(self.coefficients, [-offset / slope, 1 / slope])

    def error(self, function: Callable[[Tensor], Tensor]) -> float:
        """Largest error of g on a fine grid, over its largest value there."""
        grid = np.concatenate([np.geomspace(self.lowest, 1, 512), np.linspace(self.lowest, 1, 512)])
        wanted = _quotient(function, self.shift, grid)
        slope, offset = self._map
        errors = np.abs(chebyshev.chebval(slope * grid + offset, self.coefficients) - wanted)
        return float(errors.max() / max(np.abs(wanted).max(), np.finfo(np.float64).tiny))

    def at_zero(self) -> "tuple[float, Series]":
        """f(0), and the series of (f(σ) - f(0))/σ, which is -t q(t)/μ with q(t) = (t g(t) - g(1))/(t - 1)."""
        whole = self._whole
        value = float(chebyshev.chebval(1.0, whole))
        whole[0] -= value
        quotient = self._map[0] * chebyshev.chebdiv(whole, [-1.0, 1.0])[0]
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

    def matrix(self, factor: Tensor) -> Tensor:
        """f(Ĥ) itself, of the Cholesky factor of Ĥ + μ: for many rows the cheaper way.

        With s = √degree, of T_2, …, T_s of the mapped matrix X, and of p = q T_s + r, where r has a lower degree than
        T_s, again and again: each takes one product.
        """
        slope, offset = self._map
        mapped = torch.cholesky_inverse(factor).mul_(self.shift * slope)
        mapped.diagonal().add_(offset)
        rest, span = self._whole, max(1, math.isqrt(len(self._whole) - 1))
        powers = _chebyshev_matrices(mapped, span)
        below = []
        while len(rest) > span + 1:
            rest, remainder = chebyshev.chebdiv(rest, [0.0] * span + [1.0])
            below.append(remainder)
        total = _combined(rest, powers)
        for remainder in reversed(below):
            total = _product(total, powers[-1]).add_(_combined(remainder, powers))
        return total


def _chebyshev_matrices(x: Tensor, degree: int) -> list[Tensor]:
    """T_1(X) to T_degree(X) of a symmetric X."""
    found = [x]
    for number in range(2, degree + 1):
        next_one = _product(found[-1], x).mul_(2)
        if number == 2:  # T_0 is the identity
            next_one.diagonal().sub_(1)
        else:
            next_one.sub_(found[-2])
        found.append(next_one)
    return found


def _combined(coefficients: np.ndarray, powers: Sequence[Tensor]) -> Tensor:
    """Σ_j c_j T_j(X)."""
    constant, *later = (float(c) for c in coefficients)
    total = torch.zeros_like(powers[0])
    for coefficient, power in zip(later, powers, strict=False):
        total.add_(power, alpha=coefficient)
    total.diagonal().add_(constant)
    return total


def _product(left: Tensor, right: Tensor) -> Tensor:
    """The product of symmetric matrices that commute, which is symmetric: half of it is computed."""
    return mirrored([left[start : start + HEIGHT] @ right[:, start:] for start in range(0, len(left), HEIGHT)])


@lru_cache(_KEPT)
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
