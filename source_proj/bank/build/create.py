"""A bank's beginning: made whole under another name, so that it is there or not, whoever is first."""

import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import zarr
from torch import Tensor

from source_proj._io.files import publish
from source_proj.bank.format import FORMAT, VERSION, Settings
from source_proj.bank.layout import PartSpec
from source_proj.bank.read.metrics import write_metrics
from source_proj.bank.read.part import Part, create_part
from source_proj.bank.read.weights import relative_paths, write_weights
from source_proj._errors import MismatchError
from source_proj.trajectory import Trajectory

__all__ = ["create_bank", "require_same_part", "require_same_settings"]


def create_bank(
    path: Path,
    settings: Settings,
    trajectory: Trajectory,
    scales: Mapping[str, Tensor],
    parts: Sequence[tuple[PartSpec, np.ndarray]],
) -> None:
    """Create an empty bank: metadata, ids of each stage's first part, metrics, copies of weights given as dicts.

    Does nothing if another process creates it first.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """

    def write(folder: Path) -> None:
        attributes = {
            "format": FORMAT,
            "version": VERSION,
            "settings": settings.to_json(),
            "versions": _versions(),
            "checkpoint_paths": relative_paths(path, settings),
        }
        zarr.create_group(folder, attributes=attributes)
        for index, (stage, (spec, ids)) in enumerate(zip(settings.trajectory.stages, parts, strict=True)):
            zarr.create_group(folder / f"stage_{index}", attributes={"name": stage.name})
            create_part(folder / f"stage_{index}" / "part_0", settings, index, spec, ids)
        if any(checkpoint.path is None for checkpoint in settings.trajectory.checkpoints):
            write_weights(folder / "weights", trajectory)
        if scales:
            write_metrics(folder / "metrics", scales)

    publish(path, write, beside=path)


def require_same_settings(path: Path, there: Settings, here: Settings) -> None:
    """Compare a bank's settings with those of a build.

    Raises:
        MismatchError: they differ; names each entry with both values.
    """
    differences = there.differences(here)
    if differences:
        raise MismatchError(
            f"the bank {path} was begun with other settings: {'; '.join(differences)}. Build with the same settings to "
            "go on with it, or give another path"
        )


def require_same_part(part: Part, spec: PartSpec, ids: np.ndarray) -> None:
    """Compare a part of a bank with the examples of a build.

    Raises:
        MismatchError: they differ in number, batches, shards or ids; names both values.
    """
    remedy = "give the same to go on with it, or build another bank"
    for name, there in part.spec.to_json().items():
        here = spec.to_json()[name]
        if there != here:
            raise MismatchError(f"{part.path} was begun with {name} {there!r}, got {here!r}; {remedy}")
    for place, (there, here) in enumerate(zip(part.ids, ids.tolist(), strict=True)):
        if there != here:
            raise MismatchError(f"{part.path} has id {there!r} at row {place}, got {here!r}; {remedy}")


def _versions() -> dict[str, str]:
    names = ("source-proj", "torch", "numpy", "zarr")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # a plain checkout
            found[name] = "unknown"
    return found
