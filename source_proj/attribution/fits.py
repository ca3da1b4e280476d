"""Spectra and moments of a bank, kept in it."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from source_proj.attribution.curvature import Factors, cross_moment, spectrum
from source_proj.attribution.spectral import Spectrum
from source_proj.bank import Bank

__all__ = ["cached_cross_moment", "cached_spectrum"]


def cached_spectrum(
    bank: Bank,
    stage: int,
    checkpoints: Sequence[int],
    curvature: Factors,
    *,
    device: torch.device | str | None = None,
    cache: bool = True,
) -> Spectrum:
    """Return the spectrum of some checkpoints' mean Hessian, from the bank's cache if it is there."""

    def compute() -> dict[str, np.ndarray]:
        fitted = spectrum(bank.stages[stage], checkpoints, bank.sketch.dim, curvature, device=device or "cpu")
        return {"values": fitted.values.cpu().numpy(), "vectors": fitted.vectors.cpu().numpy()}

    settings = {"stage": stage, "checkpoints": list(checkpoints), "curvature": curvature}
    arrays = bank.fits.get("spectrum", settings, compute) if cache else compute()
    target = device or "cpu"
    return Spectrum(torch.from_numpy(arrays["values"]).to(target), torch.from_numpy(arrays["vectors"]).to(target))


def cached_cross_moment(
    bank: Bank,
    stage: int,
    checkpoints: Sequence[int],
    metric: int,
    curvature: Factors,
    *,
    device: torch.device | str | None = None,
    cache: bool = True,
) -> Tensor:
    """Return the matrix that leads from some checkpoints' metric to an earlier one, from the bank's cache if there."""

    def compute() -> dict[str, np.ndarray]:
        moment = cross_moment(bank.stages[stage], checkpoints, metric, curvature, device=device or "cpu")
        return {"matrix": moment.cpu().numpy()}

    settings = {"stage": stage, "checkpoints": list(checkpoints), "metric": metric, "curvature": curvature}
    arrays = bank.fits.get("crossing", settings, compute) if cache else compute()
    return torch.from_numpy(arrays["matrix"]).to(device or "cpu")
