"""A bank's beginning: its root appears last, so that it is there whole or not, whoever is first."""

import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import MappingProxyType

import numpy as np
from torch import Tensor

from source_proj._errors import BankError, MismatchError, write_remedy
from source_proj.bank.build.at_work import is_bank
from source_proj.bank.format import FORMAT, VERSION, Settings
from source_proj.bank.layout import PartSpec, group_document
from source_proj.bank.notes import Notes
from source_proj.bank.read.curvature import curvature_objects
from source_proj.bank.read.metrics import metrics_objects
from source_proj.bank.read.part import Part, part_objects
from source_proj.bank.read.weights import relative_paths, weights_objects
from source_proj.bank.store import Store
from source_proj.trajectory import Checkpoint, Scale

__all__ = ["create_bank", "not_written", "part_difference", "put_same", "require_same_part", "require_same_settings"]


def not_written(store: Store, error: OSError) -> BankError:
    """The error of a place where a bank cannot be written."""
    return BankError(f"cannot write the bank {store.location()}: {error}; {write_remedy(error)}, or give another path")


def create_bank(
    store: Store,
    settings: Settings,
    weights: Iterable[Checkpoint],
    scales: Mapping[str, Scale],
    parts: Sequence[tuple[PartSpec, np.ndarray]],
    notes: Notes,
    curvature: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Create an empty bank: metadata, ids of each stage's first part, metrics, copies of weights given as dicts.

    The root comes last, and makes it a bank. If another process creates one first, that one stays.

    Args:
        store: where the bank shall lie.
        settings: its settings.
        weights: the run's checkpoints, of which those that were given as dicts are copied.
        scales: the metrics, by hash.
        parts: each stage's first part with its ids.
        notes: what it says of its model and data.
        curvature: Ĥ of captured segments, flat and by hash.

    Raises:
        BankError: there is something else, or the beginning of another bank, or it is within one.
        OSError: it cannot be written; what was, another attempt goes on with.
    """
    objects: dict[str, bytes] = {}
    for index, (stage, (spec, ids)) in enumerate(zip(settings.trajectory.stages, parts, strict=True)):
        objects |= part_objects(settings, index, 0, spec, ids)
        objects[f"stage_{index}/zarr.json"] = group_document({"name": stage.name})
    _require_outside(store)
    _require_own(store, objects, settings, [*scales], [*curvature])
    beside = (*weights_objects(weights), *metrics_objects(scales), *curvature_objects(curvature))
    for batch in (objects, *beside):
        if not put_same(store, batch, ""):
            return
    attributes = {
        "format": FORMAT,
        "version": VERSION,
        "settings": settings.to_json(),
        "versions": _versions(),
        "checkpoint_paths": relative_paths(store.folder, settings),
        **notes.to_json(),
    }
    store.put_if_absent({"zarr.json": group_document(attributes)})


def put_same(store: Store, objects: Mapping[str, bytes], group: str) -> bool:
    """Write objects that are absent, and compare those that are there, before the group that will make them count.

    Returns:
        False if they differ, and another process has written the group meanwhile.

    Raises:
        BankError: they differ from what a killed process left.
    """
    for key in sorted(store.put_if_absent(objects)):
        if store.get(key) != objects[key]:
            if store.exists(f"{group}/zarr.json" if group else "zarr.json"):
                return False
            raise BankError(
                f"{store.location(key)} was begun by a call with other arguments: wait for it, or if it was killed, "
                f"remove {store.location(group)}"
            )
    return True


def _require_outside(store: Store) -> None:
    """Write into no other bank, whose objects these would be taken for: it would be said to be damaged."""
    for outer in store.above():
        with suppress(OSError):  # a place that one may not look into
            if outer.exists("zarr.json") and is_bank(outer):
                where = f"{store.location()} lies within the bank {outer.location()}"
                raise BankError(f"{where}; give a path outside of it")


def _require_own(
    store: Store, objects: Mapping[str, bytes], settings: Settings, scales: Sequence[str], curvature: Sequence[str]
) -> None:
    """Leave a folder of something else alone."""
    copies = [checkpoint.hash for checkpoint in settings.trajectory.checkpoints if checkpoint.path is None]
    nodes = [
        *(f"weights/{digest}" for digest in copies),
        *(f"metrics/{digest}" for digest in scales),
        *(f"curvature/{digest}" for digest in curvature),
        "weights",
        "metrics",
        "curvature",
    ]
    foreign = [key for key in store.list() if key not in objects and key.rpartition("/")[0] not in nodes]
    if foreign and not store.exists("zarr.json"):
        names = sorted({key.split("/")[0] for key in foreign})[:5]
        raise BankError(f"{store.location()} is no bank: it has no zarr.json, but {names}; give another path")


def require_same_settings(path: Path | str, there: Settings, here: Settings) -> None:
    """Compare a bank's settings with those of a build.

    Raises:
        MismatchError: they differ; names each entry with both values.
    """
    differences = there.differences(here)
    if differences:
        raise MismatchError(
            f"the bank {path} was begun with other settings: {'; '.join(differences)}. Build with the same settings to "
            "go on with it, remove it to begin anew, or give another path"
        )


def require_same_part(part: Part, spec: PartSpec, ids: np.ndarray) -> None:
    """Compare a part of a bank with the examples of a build.

    Raises:
        MismatchError: they differ in number, batches, shards or ids; names both values.
    """
    difference = part_difference(part, spec, ids)
    if difference is not None:
        raise MismatchError(
            f"the bank {part.store.location()} holds rows of other examples: stage {part.stage_name!r} {difference}. "
            "Build with the same to go on with it, remove it to begin anew, or give another path"
        )


def part_difference(part: Part, spec: PartSpec, ids: np.ndarray) -> str | None:
    """Say where the examples of a part are others than these, in number, batches, shards or ids; None if nowhere."""
    for name, there in part.spec.to_json().items():
        here = spec.to_json()[name]
        if there != here:
            begun = f"{there} examples" if name == "n" else f"{name} {there!r}"
            return f"was begun with {begun}, got {here!r}"
    for place, (there, here) in enumerate(zip(part.ids, ids.tolist(), strict=True)):
        if there != here:
            return f"has id {there!r} at row {place}, got {here!r}"
    return None


def _versions() -> dict[str, str]:
    names = ("source-proj", "torch", "numpy", "zarr")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # a plain checkout
            found[name] = "unknown"
    return found
