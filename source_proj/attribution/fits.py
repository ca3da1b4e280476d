"""Hessians and moments of a bank, kept in it: at most two halves of k x k arrays for each segment.

Of a small k the eigendecomposition is kept. Of a large one, Ĥ in float32 and the Cholesky factor that queries need, of
either the half that says all; Ĥ itself is read again only for another factor. Where there are fewer rows than columns,
a factor of their Gram matrix alone is kept, and the rows are read again. Of a sketch that is taken as several
(`columns`), each block of columns has entries of its own; what takes a pass over the rows is made of all at once.
"""

import warnings
from collections.abc import Callable, Hashable, Sequence
from functools import cache as once
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from source_proj._errors import GradientError
from source_proj._io.executors import Executor
from source_proj._io.numbers import all_finite
from source_proj.attribution.columns import BlockHessian
from source_proj.attribution.curvature import Factors, check_curvature, count_factors
from source_proj.attribution.gram_hessian import GramHessian, gram_matrix, gram_spectrum
from source_proj.attribution.moments import (
    cross_moments,
    decomposed,
    factor_rows,
    mean_panels,
    takes_gram,
    takes_spectrum,
)
from source_proj.attribution.spectral import DenseHessian, Hessian, Spectrum, shifted_factor
from source_proj.bank import Bank
from source_proj.kernels.gram import mirrored, packed, unpacked, upper_panels
from source_proj.sketch.columns import blocks_of, default_blocks

__all__ = ["BlockFits", "Fit", "fitted_hessian", "fitted_matrix", "fitted_spectrum"]

_ROUNDING = 4e-7  # of Ĥ's norm: what its sums in single precision err by, and a few times more


class Fit(NamedTuple):
    """What is fitted, and how.

    Attributes:
        bank: a finalized bank.
        stage: index of the stage.
        checkpoints: which of its checkpoints are averaged.
        curvature: which factors.
        device: where products are computed; None for the CPU.
        cache: look for the results beside the bank, and keep them there.
        executor: computes products over all rows; None for this process.
    """

    bank: Bank
    stage: int
    checkpoints: Sequence[int]
    curvature: Factors
    device: torch.device | str | None = None
    cache: bool = True
    executor: Executor | None = None

    def get(self, kind: str, compute: Callable[[], dict[str, Tensor]], **settings: object) -> dict[str, Tensor]:
        """An entry's tensors on the device, from the bank's cache or computed."""

        def arrays() -> dict[str, np.ndarray]:
            try:
                made = compute()
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                if kind == "spectrum":  # which every matrix has whose numbers are finite
                    raise self._overflown(kind) from error
                raise
            if not all(map(all_finite, made.values())):
                raise self._overflown(kind)
            return {name: tensor.cpu().numpy() for name, tensor in made.items()}

        described = {
            "stage": self.stage,
            "checkpoints": list(self.checkpoints),
            "curvature": self.curvature,
            **settings,
        }
        made = self.bank.fits.get(kind, described, arrays) if self.cache else arrays()
        return {name: torch.from_numpy(values).to(self.place) for name, values in made.items()}

    def _overflown(self, kind: str) -> GradientError:
        stage = self.bank.settings.trajectory.stages[self.stage]
        steps = [stage.checkpoints[index].step for index in self.checkpoints]
        return GradientError(
            f"the {kind} of stage {stage.name!r} at steps {steps[:10]} is not finite: gradients there are too large "
            "for products in single precision, as where training diverged. Build the bank without these checkpoints, "
            "or with loss and outputs in other units"
        )

    @property
    def place(self) -> torch.device | str:
        """The device, named."""
        return self.device or "cpu"

    @property
    def has_few_rows(self) -> bool:
        """Whether the Gram matrix of the rows stands in for Ĥ of all columns."""
        captured = self.bank.stages[self.stage].captured
        return not captured and takes_gram(self.bank.sketch.dim, self.n_factors)

    @property
    def n_factors(self) -> int:
        """Number of factors a_i of Ĥ."""
        return count_factors(self.bank.stages[self.stage], self.checkpoints, self.curvature)


class BlockFits:
    """What is fitted of some checkpoints' rows, for each block of the sketch's columns.

    Args:
        fit: what, and how.
        count: the number of blocks.

    Raises:
        ValueError: for a curvature that the bank's rows do not offer.
    """

    def __init__(self, fit: Fit, count: int = 1) -> None:
        self._fit, self._stage = fit, fit.bank.stages[fit.stage]
        check_curvature(self._stage, fit.curvature)
        self.blocks = blocks_of(fit.bank.sketch.dim, count)
        self._factors = fit.n_factors
        self._made: dict[Hashable, Tensor] = {}  # of a pass over the rows, what other blocks have not asked for yet
        self._matrices: dict[int, Tensor] = {}  # where the bank keeps none
        self.hessian: Callable[[int], Hessian] = once(self._hessian)

    def whole(self) -> Hessian:
        """The mean Hessian of all blocks together."""
        hessians = [self.hessian(index) for index in range(len(self.blocks))]
        self.forget()
        return hessians[0] if len(hessians) == 1 else BlockHessian(self.blocks, hessians)

    def forget(self) -> None:
        """Let go of what was made for blocks that did not ask for it, as the bank had kept theirs."""
        self._made.clear()

    def matrix(self, index: int) -> Tensor:
        """The mean Hessian of a block itself, float32; not to be changed."""
        if index in self._matrices:
            return self._matrices[index]
        upper = self._get("hessian", index, lambda: {"upper": self._sums(index).float()})["upper"]
        matrix = mirrored(unpacked(upper, self.blocks[index].width))
        if not self._fit.cache:
            self._matrices[index] = matrix
        return matrix

    def spectrum(self, index: int) -> Spectrum:
        """The eigendecomposition of a block's mean Hessian."""
        width = self.blocks[index].width

        def compute() -> dict[str, Tensor]:
            if self._is_dual(width):
                made = gram_spectrum(self._rows(index).double())
            elif takes_spectrum(width):  # of sums in double precision, which are not kept
                made = decomposed(mirrored(unpacked(self._sums(index), width)))
            else:  # of the Ĥ that other functions may have asked for
                made = decomposed(self.matrix(index))
            return {"values": made.values, "vectors": made.vectors}

        return Spectrum(**self._get("spectrum", index, compute))

    def cross_moment(self, index: int, metric: int) -> Tensor:
        """The matrix float64 that leads from the checkpoints' metric to an earlier one, in a block."""

        def make_all() -> list[Tensor]:
            fit = self._fit
            return cross_moments(
                self._stage,
                fit.checkpoints,
                self.blocks,
                metric,
                fit.curvature,
                device=fit.place,
                executor=fit.executor,
            )

        def compute() -> dict[str, Tensor]:
            return {"matrix": self._one(index, ("crossing", metric), make_all)}

        return self._get("crossing", index, compute, metric=metric)["matrix"]

    def _hessian(self, index: int) -> Hessian:
        """The mean Hessian of a block, as far as its functions go."""
        width = self.blocks[index].width
        if takes_spectrum(width):
            return self.spectrum(index)
        if self._is_dual(width):
            return self._gram(index)

        @once
        def hessian() -> Tensor:
            return self.matrix(index)

        def factor(shift: float, dtype: torch.dtype) -> Tensor:
            _warn_of_rounding(shift, norm)

            def compute() -> dict[str, Tensor]:
                lower = shifted_factor(hessian(), shift, dtype)
                if self._fit.cache:  # where it can be read again
                    hessian.cache_clear()
                return {"upper": packed(upper_panels(lower.mT))}

            return _lower(self._get("factor", index, compute, shift=shift, dtype=str(dtype))["upper"], width)

        trace, norm = self._get("sizes", index, lambda: _sizes(hessian()))["sizes"].tolist()
        return DenseHessian(width, trace, norm, once(factor), once(lambda: self.spectrum(index)))

    def _gram(self, index: int) -> GramHessian:
        """Ĥ by the Gram matrix of its factors, which is made again for every Cholesky factor that is not kept."""

        @once
        def rows() -> Tensor:
            return self._rows(index)

        @once
        def gram(dtype: torch.dtype) -> Tensor:
            return gram_matrix(rows(), dtype)

        def factor(shift: float, dtype: torch.dtype) -> Tensor:
            def compute() -> dict[str, Tensor]:
                lower = shifted_factor(gram(dtype), shift, torch.float64)
                if self._fit.cache:
                    gram.cache_clear()
                return {"upper": packed(upper_panels(lower.mT))}

            made = self._get("gram_factor", index, compute, shift=shift, dtype=str(dtype))
            return _lower(made["upper"], self._factors)

        trace, norm = self._get("gram_sizes", index, lambda: _sizes(gram(torch.float32)))["sizes"].tolist()
        width = self.blocks[index].width
        return GramHessian(width, trace, norm, rows, once(factor), once(lambda: self.spectrum(index)))

    def _is_dual(self, width: int) -> bool:
        """Whether the Gram matrix of the factors stands in for Ĥ."""
        if self._stage.captured:
            return False
        return self._factors < width if takes_spectrum(width) else takes_gram(width, self._factors)

    def _rows(self, index: int) -> Tensor:
        """The factors' columns, of which a block's Ĥ is AᵀA."""

        def make_all() -> list[Tensor]:
            fit = self._fit
            return factor_rows(self._stage, fit.checkpoints, fit.curvature, self.blocks, device=fit.place)

        return self._one(index, "rows", make_all)

    def _sums(self, index: int) -> Tensor:
        """The upper part of a block's Ĥ, packed; float64 where it is decomposed at once, else float32."""

        def make_all() -> list[Tensor]:
            fit = self._fit
            made = mean_panels(
                self._stage, fit.checkpoints, self.blocks, fit.curvature, device=fit.place, executor=fit.executor
            )
            types = [torch.float64 if takes_spectrum(columns.width) else torch.float32 for columns in self.blocks]
            return [packed([panel.to(dtype) for panel in own]) for own, dtype in zip(made, types, strict=True)]

        return self._one(index, "hessian", make_all)

    def _one(self, index: int, kind: Hashable, make_all: Callable[[], list[Tensor]]) -> Tensor:
        """A block's of what one pass over the rows makes of all blocks."""
        found = self._made.pop((kind, index), None)
        if found is None:
            made = dict(enumerate(make_all()))
            found = made.pop(index)
            self._made |= {(kind, other): part for other, part in made.items()}
        return found

    def _get(
        self, kind: str, index: int, compute: Callable[[], dict[str, Tensor]], **settings: object
    ) -> dict[str, Tensor]:
        columns = self.blocks[index]
        own = {} if len(self.blocks) == 1 else {"columns": [columns.start, columns.stop]}
        return self._fit.get(kind, compute, **settings, **own)


def fitted_hessian(fit: Fit, blocks: int | None = 1) -> Hessian:
    """Return the mean Hessian of some checkpoints, as far as its functions go; raises as :class:`BlockFits`."""
    return BlockFits(fit, blocks or default_blocks(fit.bank.sketch, few_rows=fit.has_few_rows)).whole()


def fitted_spectrum(fit: Fit) -> Spectrum:
    """Return the eigendecomposition of the mean Hessian of some checkpoints; raises as :class:`BlockFits`."""
    return BlockFits(fit).spectrum(0)


def fitted_matrix(fit: Fit) -> Tensor:
    """Return the mean Hessian Ĥ of some checkpoints itself, ``(k, k)`` float32; raises as :class:`BlockFits`."""
    return BlockFits(fit).matrix(0)


def _warn_of_rounding(shift: float, norm: float) -> None:
    if shift < (resolved := _ROUNDING * norm):
        warnings.warn(
            f"a damping, or an inverse of time, of {shift:.2g} is less than the sums of Ĥ resolve, about "
            f"{resolved:.2g}: in directions of small eigenvalues scores are rounding. Give damping={resolved:.1g} "
            "or more",
            UserWarning,
            stacklevel=3,
        )


def _sizes(matrix: Tensor) -> dict[str, Tensor]:
    """Trace and Frobenius norm, which Ĥ and its Gram matrix share."""
    trace = matrix.diagonal().sum(dtype=torch.float64)
    return {"sizes": torch.stack([trace, torch.linalg.matrix_norm(matrix).double()])}


def _lower(packed_upper: Tensor, dim: int) -> Tensor:
    """The triangle ``(dim, dim)`` whose transpose was packed."""
    upper = packed_upper.new_zeros(dim, dim)
    for into, panel in zip(upper_panels(upper), unpacked(packed_upper, dim), strict=True):
        into.copy_(panel)
    return upper.mT
