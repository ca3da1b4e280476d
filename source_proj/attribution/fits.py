"""A cache of fitted arrays, beside the bank they were computed from.

Each entry is a zarr group named by a hash of everything that it depends on: the bank's fingerprint, the kind of entry
and all its settings. It is written under a temporary name and renamed when whole, so a reader sees all of it or
nothing; every chunk carries a checksum, and an entry that fails it is computed anew. Where the bank's folder cannot
be written, entries go to the user's cache folder.
"""

import hashlib
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import torch
import zarr
from torch import Tensor
from zarr.codecs import BytesCodec, Crc32cCodec

from source_proj.attribution.curvature import Factors, cross_moment, spectrum
from source_proj.attribution.spectral import Spectrum
from source_proj.bank import Bank

__all__ = ["FitCache", "cached_cross_moment", "cached_spectrum"]

_VERSION = 1  # of the entries' meaning: raise it when a formula changes
_CHUNK_BYTES = 16 << 20

Arrays = dict[str, np.ndarray]


class FitCache:
    """The entries of one bank.

    Args:
        bank: a finalized bank.
    """

    def __init__(self, bank: Bank) -> None:
        self._fingerprint = bank.fingerprint
        self._beside = Path(bank.path) / "fits"
        self._user = platformdirs.user_cache_path("source-proj") / bank.fingerprint[:32]

    @property
    def folder(self) -> Path:
        """Where new entries go."""
        parent = self._beside if self._beside.exists() else self._beside.parent
        return self._beside if os.access(parent, os.W_OK) else self._user

    def get(self, kind: str, settings: Mapping[str, Any], compute: Callable[[], Arrays]) -> Arrays:
        """Return an entry's arrays, from the cache or by computing (and then keeping) them.

        Args:
            kind: what the entry is, such as "spectrum".
            settings: everything besides the bank's content that the entry depends on; JSON-able.
            compute: makes the arrays.
        """
        description = {"kind": kind, "version": _VERSION, "bank": self._fingerprint, **settings}
        name = f"{kind}-{_digest(description)}"
        for folder in (self._beside, self._user):
            kept = _read(folder / name, description)
            if kept is not None:
                return kept
        arrays = compute()
        try:
            _write(self.folder, name, description, arrays)
        except OSError as error:  # a full disk costs the cache, never the result
            warnings.warn(f"the fit could not be cached in {self.folder}: {error}", stacklevel=2)
        return arrays

    def clear(self) -> None:
        """Delete all entries of this bank."""
        for folder in (self._beside, self._user):
            shutil.rmtree(folder, ignore_errors=True)

    def nbytes(self) -> int:
        """Bytes on disk of all entries of this bank."""
        return sum(
            file.stat().st_size for folder in (self._beside, self._user) for file in folder.rglob("*") if file.is_file()
        )


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
    arrays = FitCache(bank).get("spectrum", settings, compute) if cache else compute()
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
    arrays = FitCache(bank).get("crossing", settings, compute) if cache else compute()
    return torch.from_numpy(arrays["matrix"]).to(device or "cpu")


def _digest(description: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:24]


def _read(path: Path, description: Mapping[str, Any]) -> Arrays | None:
    if not path.is_dir():
        return None
    try:
        group = zarr.open_group(path, mode="r")
        if group.attrs.get("description") != json.loads(json.dumps(description)):
            raise ValueError("it describes another fit")
        return {name: np.asarray(array[...]) for name, array in group.arrays()}
    except Exception as error:  # whatever is wrong with a cache entry, the remedy is the same
        warnings.warn(f"the cached fit {path} is damaged ({error}) and is computed anew", stacklevel=3)
        shutil.rmtree(path, ignore_errors=True)
        return None


def _write(folder: Path, name: str, description: Mapping[str, Any], arrays: Arrays) -> None:
    zarr.open_group(folder, mode="a")  # the folder itself stays a readable zarr node
    temporary = folder / f"partial-{uuid.uuid4().hex}"
    try:
        group = zarr.open_group(temporary, mode="w", attributes={"description": dict(description)})
        for key, values in arrays.items():
            row_bytes = max(1, values[:1].nbytes)
            chunk = (max(1, min(len(values), _CHUNK_BYTES // row_bytes)), *values.shape[1:])
            array = group.create_array(
                key,
                shape=values.shape,
                chunks=chunk,
                dtype=values.dtype,
                compressors=[Crc32cCodec()],
                serializer=BytesCodec(),
            )
            array[...] = values
        temporary.rename(folder / name)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        if not (folder / name).is_dir():  # another process may have written the same entry first
            raise
