"""The scale P^½ of a metric: one number a parameter's entry, or, where P is factored, two vectors for each matrix."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from source_proj._errors import MismatchError
from source_proj._io.hashing import hash_float32

__all__ = ["Coordinates", "Scale", "best_factors"]

_SWEEPS = 5  # of the weighed means: Adam's moments in two transformers were fitted to 5e-4 by then, and to 1e-7 by 10


class Coordinates(Protocol):
    """The attributed parameters laid end to end, as :class:`source_proj.gradients.ParameterSpace` has them."""

    @property
    def names(self) -> tuple[str, ...]:
        """Full parameter names."""

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """One shape per name."""

    @property
    def offsets(self) -> Mapping[str, int]:
        """First coordinate of each parameter."""

    @property
    def size(self) -> int:
        """Number d of coordinates."""


class Scale:
    """The diagonal of P^½, parameter by parameter.

    A factored one holds, for each parameter of two axes or more seen as a matrix (first axis, all others), the factors
    p ``(o,)`` and q ``(i,)`` of p ⊗ q, and vectors whole: that is what is kept of it, hashed and moved.

    Args:
        values: float32: the diagonal ``(d,)``; or p, q of each matrix and the entries of each vector, end to end in
            the order of the parameters.
        space: the attributed parameters.
        factored: which of the two.

    Raises:
        MismatchError: the values are more or fewer than that.

    Example:
        >>> from source_proj.gradients import ParameterSpace
        >>> space = ParameterSpace(("weight", "bias"), ((2, 2), (2,)))
        >>> Scale(torch.tensor([1.0, 2.0, 1.0, 10.0, 5.0, 7.0]), space, factored=True).diagonal
        tensor([ 1., 10.,  2., 20.,  5.,  7.])
    """

    def __init__(self, values: Tensor, space: Coordinates, *, factored: bool = False) -> None:
        self.values, self.factored, self._space = values, factored, space
        self._shapes = dict(zip(space.names, space.shapes, strict=True))
        sizes = [self.kept(shape, factored) for shape in space.shapes]
        if tuple(values.shape) != (sum(sizes),):
            form = "factors" if factored else "entries"
            raise MismatchError(f"a scale has {tuple(values.shape)} numbers; the space has {sum(sizes)} {form}")
        self._parts = dict(zip(space.names, values.split(sizes), strict=True))

    @property
    def hash(self) -> str:
        """Hash of the values; that of factors is no other scale's, whatever the numbers."""
        return hash_float32(self.values, "factored" if self.factored else "")

    @property
    def diagonal(self) -> Tensor:
        """All entries ``(d,)``."""
        return torch.cat([self.of(name) for name in self._space.names])

    @property
    def is_selection(self) -> bool:
        """Whether it is 1 of some parameters and 0 of the others."""
        return bool(((self.values == 0) | (self.values == 1)).all())

    def moves(self, name: str) -> bool:
        """Whether it is other than 0 anywhere in a parameter."""
        return bool(self._parts[name].any())

    def require(self, space: Coordinates) -> None:
        """Refuse other parameters.

        Raises:
            MismatchError: it scales these, and not those of a space.
        """
        if (space.names, space.shapes) != (self._space.names, self._space.shapes):
            raise MismatchError(
                f"a scale is of {len(self._space.names)} parameters of {self._space.size} entries; the space has other "
                f"ones, {len(space.names)} of {space.size}; use the scales of its own bank"
            )

    def of(self, name: str) -> Tensor:
        """The entries of a parameter, flat."""
        factors = self.factors(name)
        return self._parts[name] if factors is None else torch.outer(*factors).flatten()

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Of a matrix ``(o, i)`` that is scaled by p ⊗ q: p ``(o,)`` and q ``(i,)``; None where there are no such."""
        shape = self._shapes[name]
        if not self.factored or len(shape) < 2:
            return None
        return self._parts[name][: shape[0]], self._parts[name][shape[0] :]

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Some rows of a matrix ``(o, i)``, by an index of any shape: ``(…, i)``."""
        factors = self.factors(name)
        if factors is not None:
            return factors[0][index].unsqueeze(-1) * factors[1]
        table: Tensor = self._parts[name].view(self._shapes[name])
        return table[index]

    def to(self, device: torch.device | str) -> Scale:
        """The same on a device."""
        if self.values.device == torch.device(device):
            return self
        return Scale(self.values.to(device), self._space, factored=self.factored)

    @staticmethod
    def kept(shape: tuple[int, ...], factored: bool) -> int:
        """How many values a parameter of this shape has."""
        if factored and len(shape) > 1:
            return shape[0] + prod(shape[1:])
        return prod(shape)


def best_factors(p: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    r"""The rank-one matrix nearest to P where gradients are, by its two factors.

    .. math:: \min_{a, b} \sum_{ij} v_{ij} \, d(P_{ij} \,\|\, a_i b_j), \qquad d(x \| y) = x \log(x / y) - x + y

    At the minimum every row and every column keeps its :math:`\sum P v`, the share that it has in the trace of
    :math:`P^{1/2} H P^{1/2}` where v is H's diagonal, as the one number in place of P keeps the whole trace. With
    v = 1 these are the means of rows and columns that Adafactor takes of v (Shazeer and Stern 2018, arXiv 1804.04235),
    where the fit begins; weighed by v, entries with next to no gradient, where P is enormous, do not rule their row and
    column. By iterative proportional fitting: columns and rows in turn.

    Args:
        p: P ``(o, i)`` float64, at least 0.
        v: mean squares of the gradient ``(o, i)`` float64; P counts where they are positive.

    Returns:
        a ``(o,)`` and b ``(i,)`` float64; 0 where a row or a column has no gradient. If P is of rank one, their product
        is P.

    Example:
        >>> p = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
        >>> torch.outer(*best_factors(p, torch.ones(2, 2)))
        tensor([[3., 4.],
                [6., 8.]])
    """
    largest = v.amax() if v.numel() else v.new_zeros(())
    weight = v / largest.where(largest > 0, 1.0)
    product = p * weight
    rows, columns = ordered_sum(product.T), ordered_sum(product)
    a, b = ordered_sum(p.T), ordered_sum(p)
    for _ in range(_SWEEPS):
        b = _quotient(columns, ordered_sum(weight * a[:, None]))
        a = _quotient(rows, ordered_sum((weight * b).T))
    return a, b


def ordered_sum(x: Tensor) -> Tensor:
    """Sums over the first axis, which no machine or number of threads rounds otherwise: halves are added to halves."""
    while len(x) > 1:
        half, rest = len(x) // 2, x[len(x) // 2 * 2 :]
        x = x[:half] + x[half : 2 * half]
        x = torch.cat([x, rest]) if len(rest) else x
    return x[0] if len(x) else x.sum(0)


def _quotient(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(y > 0, x / y.where(y > 0, 1.0), 0.0)
