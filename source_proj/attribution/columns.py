"""What is fitted of a sketch whose columns are taken as several sketches (`source_proj.sketch.columns`)."""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from source_proj.attribution.series import SpectralFunction
from source_proj.attribution.spectral import Hessian
from source_proj.bank import Bank
from source_proj.sketch.columns import Columns, kept_blocks

__all__ = ["BlockHessian", "checked_blocks"]


def checked_blocks(blocks: int | None, banks: Iterable[Bank]) -> int | None:
    """Return into how many blocks columns are to be cut, as an int; None is the default.

    Args:
        blocks: what the user gave; integers of NumPy do.
        banks: of whose sketches.

    Raises:
        TypeError: it is no integer.
        ValueError: it is not in 1..k, or more than one of an exact sketch, or rows were captured in other blocks.
    """
    if blocks is None:
        return None
    try:
        count = operator.index(blocks)
    except TypeError:
        raise TypeError(f"blocks must be an integer, got {blocks!r}") from None
    for bank in banks:
        sketch, captured = bank.sketch, len(kept_blocks(bank.sketch)) if bank.captured else 1
        if isinstance(blocks, bool) or not 1 <= count <= sketch.dim:
            raise ValueError(f"blocks must lie in 1..{sketch.dim}, the sketch's columns, got {blocks}")
        if count > 1 and sketch.is_exact:
            raise ValueError(
                f"blocks={count} takes a sketch as several, and an exact one has a column a parameter: leave it out"
            )
        if count % captured:
            raise ValueError(
                f"the curvature of {bank.path} was kept in {captured} blocks of columns, which have no joint one: "
                f"leave blocks= out, or give a multiple of {captured}, got {count}"
            )
    return count


@dataclass(frozen=True)
class BlockHessian:
    """Ĥ of several blocks of columns, each a sketch's own; what a block has of Ĥ is times k/k'.

    Attributes:
        blocks: the columns.
        hessians: Ĥ of each.

    Example:
        >>> from source_proj.attribution.spectral import Spectrum, ridge_inverse
        >>> from source_proj.sketch.columns import blocks_of
        >>> halves = [Spectrum(torch.ones(1) * value, torch.eye(1)) for value in (1.0, 3.0)]
        >>> BlockHessian(blocks_of(2, 2), halves).multiply(torch.ones(1, 2), ridge_inverse(1.0, 2))
        tensor([[0.5000, 0.2500]])
    """

    blocks: Sequence[Columns]
    hessians: Sequence[Hessian]

    @property
    def dim(self) -> int:
        """The size k of the space."""
        return self.blocks[0].dim

    @property
    def trace(self) -> float:
        """tr(Ĥ) of the whole sketch, to which each block adds what its own columns have of it."""
        pairs = zip(self.blocks, self.hessians, strict=True)
        return sum(hessian.trace / columns.scale for columns, hessian in pairs)

    def multiply(self, rows: Tensor, function: SpectralFunction) -> Tensor:
        """Return ``rows @ f(Ĥ)``, ``(n, k)``."""
        pairs = zip(self.blocks, self.hessians, strict=True)
        moved = [hessian.multiply(rows[:, columns.slice], function) for columns, hessian in pairs]
        types = [part.dtype for part in moved]
        widest = torch.float64 if torch.float64 in types else types[0]
        return torch.cat([part.to(widest) for part in moved], dim=1)

    def apply(self, function: SpectralFunction) -> Tensor:
        """Return the matrix f(Ĥ), ``(k, k)``, zero outside its blocks."""
        matrix: Tensor = torch.block_diag(*(hessian.apply(function).double() for hessian in self.hessians))
        return matrix

    def effective_dimension(self, ridge: float) -> float:
        """Tr Ĥ(Ĥ + λ)⁻¹, for λ > 0, the mean over the blocks."""
        return sum(hessian.effective_dimension(ridge) for hessian in self.hessians) / len(self.hessians)
