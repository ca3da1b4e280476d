"""Hessians and moments of a bank, kept in it: at most two halves of k x k arrays for each segment.

Of a small k the eigendecomposition is kept. Of a large one, Ĥ in float32 and the Cholesky factor that queries need, of
either the half that says all; Ĥ itself is read again only for another factor. Where there are fewer rows than columns,
a factor of their Gram matrix alone is kept, and the rows are read again.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cache as once
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from source_proj._errors import GradientError
from source_proj._io.executors import Executor
from source_proj.attribution.curvature import Factors, check_curvature, count_factors
from source_proj.attribution.gram_hessian import GramHessian, gram_matrix
from source_proj.attribution.moments import (
    cross_moment,
    decomposed,
    factor_rows,
    mean_panels,
    spectrum,
    takes_gram,
    takes_spectrum,
)
from source_proj.attribution.spectral import DenseHessian, Hessian, Spectrum, shifted_factor
from source_proj.bank import Bank
from source_proj.kernels.gram import mirrored, packed, unpacked, upper_panels

__all__ = ["Fit", "fitted_cross_moment", "fitted_hessian", "fitted_matrix", "fitted_spectrum"]

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
            if not all(_is_finite(tensor) for tensor in made.values()):
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


def _is_finite(tensor: Tensor) -> bool:
    """By the extremes, which takes no memory."""
    return not tensor.numel() or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def fitted_hessian(fit: Fit) -> Hessian:
    """Return the mean Hessian of some checkpoints, as far as its functions go.

    Raises:
        ValueError: for a curvature that the bank's rows do not offer.
    """
    stage, dim = fit.bank.stages[fit.stage], fit.bank.sketch.dim
    check_curvature(stage, fit.curvature)
    if takes_spectrum(dim):
        return fitted_spectrum(fit)
    if not stage.captured and takes_gram(dim, count_factors(stage, fit.checkpoints, fit.curvature)):
        return _gram_hessian(fit)

    @once
    def hessian() -> Tensor:
        return fitted_matrix(fit)

    def sizes() -> dict[str, Tensor]:
        return _sizes(hessian())

    def factor(shift: float, dtype: torch.dtype) -> Tensor:
        if shift < (resolved := _ROUNDING * norm):
            warnings.warn(
                f"a damping, or an inverse of time, of {shift:.2g} is less than the sums of Ĥ resolve, about "
                f"{resolved:.2g}: in directions of small eigenvalues scores are rounding. Give damping={resolved:.1g} "
                "or more",
                UserWarning,
                stacklevel=2,
            )

        def compute() -> dict[str, Tensor]:
            lower = shifted_factor(hessian(), shift, dtype)
            if fit.cache:  # where it can be read again
                hessian.cache_clear()
            return {"upper": packed(upper_panels(lower.mT))}

        return _lower(fit.get("factor", compute, shift=shift, dtype=str(dtype))["upper"], dim)

    trace, norm = fit.get("sizes", sizes)["sizes"].tolist()
    return DenseHessian(dim, trace, norm, once(factor), once(lambda: fitted_spectrum(fit)))


def _gram_hessian(fit: Fit) -> GramHessian:
    """Ĥ by the Gram matrix of its factors, which is made again for every Cholesky factor that is not kept."""
    stage, dim = fit.bank.stages[fit.stage], fit.bank.sketch.dim
    count = count_factors(stage, fit.checkpoints, fit.curvature)

    @once
    def rows() -> Tensor:
        return factor_rows(stage, fit.checkpoints, fit.curvature, device=fit.place)

    @once
    def gram(dtype: torch.dtype) -> Tensor:
        return gram_matrix(rows(), dtype)

    def factor(shift: float, dtype: torch.dtype) -> Tensor:
        def compute() -> dict[str, Tensor]:
            lower = shifted_factor(gram(dtype), shift, torch.float64)
            if fit.cache:
                gram.cache_clear()
            return {"upper": packed(upper_panels(lower.mT))}

        return _lower(fit.get("gram_factor", compute, shift=shift, dtype=str(dtype))["upper"], count)

    trace, norm = fit.get("gram_sizes", lambda: _sizes(gram(torch.float32)))["sizes"].tolist()
    return GramHessian(dim, trace, norm, rows, once(factor), once(lambda: fitted_spectrum(fit)))


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


def fitted_spectrum(fit: Fit) -> Spectrum:
    """Return the eigendecomposition of the mean Hessian of some checkpoints; raises as :func:`fitted_hessian`."""
    stage, dim = fit.bank.stages[fit.stage], fit.bank.sketch.dim
    count = count_factors(stage, fit.checkpoints, fit.curvature)

    def compute() -> dict[str, Tensor]:
        if takes_spectrum(dim) or takes_gram(dim, count):
            made = spectrum(stage, fit.checkpoints, dim, fit.curvature, device=fit.place, executor=fit.executor)
        else:  # of the Ĥ that other functions may have asked for
            made = decomposed(fitted_matrix(fit))
        return {"values": made.values, "vectors": made.vectors}

    return Spectrum(**fit.get("spectrum", compute))


def fitted_cross_moment(fit: Fit, metric: int) -> Tensor:
    """Return the matrix ``(k, k)`` float64 that leads from some checkpoints' metric to an earlier one."""

    def compute() -> dict[str, Tensor]:
        stage, dim = fit.bank.stages[fit.stage], fit.bank.sketch.dim
        matrix = cross_moment(
            stage, fit.checkpoints, dim, metric, fit.curvature, device=fit.place, executor=fit.executor
        )
        return {"matrix": matrix}

    return fit.get("crossing", compute, metric=metric)["matrix"]


def fitted_matrix(fit: Fit) -> Tensor:
    """Return the mean Hessian Ĥ of some checkpoints itself, ``(k, k)`` float32; raises as :func:`fitted_hessian`."""
    stage, dim = fit.bank.stages[fit.stage], fit.bank.sketch.dim

    def compute() -> dict[str, Tensor]:
        panels = mean_panels(stage, fit.checkpoints, dim, fit.curvature, device=fit.place, executor=fit.executor)
        return {"upper": packed([panel.float() for panel in panels])}

    return mirrored(unpacked(fit.get("hessian", compute)["upper"], dim))
