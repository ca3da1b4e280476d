"""Functions of a Hessian of few rows, by their Gram matrix.

With Ĥ = AᵀA of n rows A ``(n, k)``, whose Gram matrix is G = AAᵀ,

    f(Ĥ) = f(0) I + Aᵀ h(G) A,    h(σ) = (f(σ) - f(0))/σ,

as both sides are f(0) on what A maps to 0, and f(σ) on Aᵀv for an eigenvector v of G. So n x n matrices do where k x k
ones would be larger: k n² operations instead of k² n for the products, n³/3 instead of k³/3 for a Cholesky factor.

f is the series of `spectral`, a polynomial p in t = μ/(σ + μ), so that h is one as well: h = -t q(t)/μ with
q(t) = (p(t) - p(1))/(t - 1), which division of polynomials gives without the cancellation that small σ would have.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from source_proj.attribution.series import Series, SpectralFunction, shortest_series
from source_proj.attribution.spectral import (
    ROWS_AT_ONCE,
    SINGLE_CONDITION,
    Spectrum,
    factored_dimension,
    shifted_factor,
)
from source_proj.kernels.gram import HEIGHT, mirrored

__all__ = ["GramHessian", "gram_hessian", "gram_matrix", "gram_spectrum"]


@dataclass(frozen=True)
class GramHessian:
    """Ĥ = AᵀA by Cholesky factors of AAᵀ + μ, each made when a function first asks for it.

    Attributes:
        dim: k.
        trace: tr(Ĥ).
        norm: an upper bound of Ĥ's largest eigenvalue, such as its Frobenius norm.
        rows: gives A ``(n, k)`` float32.
        factor: gives the lower Cholesky factor ``(n, n)`` float64 of AAᵀ + μ, of products in the type asked for.
        spectrum: gives Ĥ's eigendecomposition, for functions with a jump.

    Example:
        >>> from source_proj.attribution.spectral import decay_operator
        >>> hessian = gram_hessian(torch.tensor([[1.0, 0.0, 0.0]]))
        >>> hessian.multiply(torch.ones(1, 3), decay_operator(1.0, 0.0))
        tensor([[0.3679, 1.0000, 1.0000]])
    """

    dim: int
    trace: float
    norm: float
    rows: Callable[[], Tensor]
    factor: Callable[[float, torch.dtype], Tensor]
    spectrum: Callable[[], Spectrum]

    def multiply(self, rows: Tensor, function: SpectralFunction) -> Tensor:
        """Return ``rows @ f(Ĥ)``, ``(n, k)``: 4 n k operations a row, and 2 n² a degree of the polynomial."""
        if (polynomial := self._polynomial(function)) is None:
            return self.spectrum().multiply(rows, function)
        own, factor, rest, inner = polynomial
        moved = []
        for chunk in rows.to(own).split(ROWS_AT_ONCE):
            inside = inner.apply(factor, (chunk @ own.T).double())
            moved.append(torch.addmm(chunk, inside.to(own), own, beta=rest))
        return torch.cat(moved)

    def apply(self, function: SpectralFunction) -> Tensor:
        """Return the matrix f(Ĥ), ``(k, k)``: 2 k n² + k² n operations, and n³ a product of `Series.matrix`."""
        if (polynomial := self._polynomial(function)) is None:
            return self.spectrum().apply(function)
        own, factor, rest, inner = polynomial
        right = inner.matrix(factor).to(own) @ own  # (n, k)
        starts = range(0, self.dim, HEIGHT)
        matrix = mirrored([own[:, start : start + HEIGHT].T @ right[:, start:] for start in starts])
        matrix.diagonal().add_(rest)
        return matrix

    def _polynomial(self, function: SpectralFunction) -> tuple[Tensor, Tensor, float, Series] | None:
        """A, the factor of AAᵀ + μ, f(0) and the series of h; None where eigenvectors are needed."""
        series = shortest_series(function, self.norm)
        if series is None:
            return None
        # What large eigenvalues add is a difference of numbers that are f(0)/f(σ) times as large.
        dtype = torch.float32 if self.norm / series.shift + 1 <= SINGLE_CONDITION else torch.float64
        try:
            factor = self.factor(series.shift, dtype)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # the shift is lost in the rounding of the sums
            return None
        return self.rows().to(dtype), factor, *series.at_zero()

    def effective_dimension(self, ridge: float) -> float:
        """Tr Ĥ(Ĥ + λ)⁻¹, for λ > 0."""
        return factored_dimension(self, ridge, torch.float64)


def gram_hessian(rows: Tensor) -> GramHessian:
    """Ĥ = AᵀA of rows A ``(n, k)`` that are in memory."""
    gram = gram_matrix(rows, torch.float64)

    @cache
    def factor(shift: float, _dtype: torch.dtype) -> Tensor:
        return shifted_factor(gram, shift, torch.float64)

    @cache
    def spectrum() -> Spectrum:
        return gram_spectrum(rows.double())

    norm = float(torch.linalg.matrix_norm(gram))
    return GramHessian(rows.shape[1], float(gram.trace()), norm, lambda: rows, factor, spectrum)


def gram_matrix(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """AAᵀ of rows A ``(n, k)``, ``(n, n)`` float64, of products in a type, half of which are computed."""
    rows, starts = rows.to(dtype), range(0, len(rows), HEIGHT)
    return mirrored([rows[start : start + HEIGHT] @ rows[start:].T for start in starts]).double()


def gram_spectrum(rows: Tensor) -> Spectrum:
    """The spectrum of AᵀA, of rows A ``(n, k)`` float64."""
    values, vectors = torch.linalg.eigh(gram_matrix(rows, torch.float64))
    # Eigenvalues at rounding level belong to the null space; dividing by their roots would blow up noise.
    kept = values > values[-1].clamp(min=0) * len(values) * torch.finfo(torch.float64).eps
    values, vectors = values[kept], vectors[:, kept]
    return Spectrum(values, rows.T @ (vectors / values.sqrt()))
