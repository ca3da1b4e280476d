"""The bank's root: what it says about itself, and the parts that lie below."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from source_proj._errors import BankError
from source_proj.bank.format import FORMAT, VERSION, Settings
from source_proj.bank.notes import Notes
from source_proj.bank.read.objects import list_objects, object_info, read_group
from source_proj.bank.read.part import Part, part_name
from source_proj.bank.store import Store
from source_proj.trajectory.recording.run_files import recorders_own

__all__ = ["Root", "find_parts", "kind_of", "read_root"]


class Root(NamedTuple):
    """What a bank says about itself.

    Attributes:
        settings: what its rows depend on.
        versions: what software made it.
        checkpoint_paths: where checkpoint files lay relative to it, by hash.
        notes: on its model and data.
    """

    settings: Settings
    versions: dict[str, str]
    checkpoint_paths: dict[str, str]
    notes: Notes


def read_root(store: Store) -> Root:
    """Read a bank's root.

    Raises:
        BankError: there is no bank, or one of another version, or one whose metadata are damaged; says what was found.
    """
    path, attributes = store.location(), _root(store)
    if attributes.get("format") != FORMAT:
        raise BankError(
            f"{path} is a zarr group, but no bank: its attribute format is {attributes.get('format')!r}, not {FORMAT!r}"
        )
    if attributes.get("version") != VERSION or isinstance(attributes["version"], bool):
        raise BankError(
            f"the bank {path} has format version {attributes.get('version')!r}, and this package reads {VERSION}: "
            "use the version of source-proj that made it, or build it anew"
        )
    try:
        settings, notes = Settings.from_json(attributes.get("settings")), Notes.from_json(attributes)
    except (BankError, ValueError) as error:
        raise BankError(f"the bank {path} cannot be read: {error}") from error
    versions, paths = (attributes.get(name) for name in ("versions", "checkpoint_paths"))
    for note in (versions, paths):
        if not isinstance(note, Mapping):
            raise BankError(f"the bank {path} cannot be read: versions or checkpoint_paths is {note!r}, not an object")
    return Root(settings, dict(versions), dict(paths), notes)  # type: ignore[arg-type]  # for people: types unchecked


def _root(store: Store) -> dict[str, Any]:
    """The root's attributes."""
    where = store.location()
    if object_info(store, "zarr.json") is None:
        names = sorted(_names(store))[:5]
        if not names:
            raise BankError(
                f"there is no bank at {where}: nothing is there; build one with source_proj.build, or source-proj build"
            )
        if recorders_own(Path(where)):
            raise BankError(
                f"{where} is no bank, but the run of a Recorder: build a bank from it by source_proj.build(model, "
                f"task, Trajectory.from_recorder({str(where)!r}), train_set, path), or source-proj build --recorder, "
                "and open that"
            )
        older = " (a zarr v2 node: banks are zarr v3)" if {".zgroup", ".zarray"} & set(names) else ""
        raise BankError(f"{where} is no bank: it has no zarr.json, but {names}{older}")
    return read_group(store, "")


def _names(store: Store) -> Iterable[str]:
    """What lies at the top: a folder that is no bank may be somebody's home, and lead anywhere by links."""
    if store.folder is None:
        return {key.split("/")[0] for key in list_objects(store)}
    try:
        return os.listdir(store.folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise BankError(f"{store.location()} cannot be read ({error})") from error


def find_parts(store: Store, settings: Settings, stage: int) -> list[Part]:
    """Open all parts of a stage.

    Raises:
        BankError: there is none, or one is not as it must be.
    """
    name, there = settings.trajectory.stages[stage].name, read_group(store, f"stage_{stage}").get("name")
    where = store.location(f"stage_{stage}")
    if there != name:
        raise BankError(f"{where} is of stage {there!r}, and must be of {name!r}")
    parts: list[Part] = []
    while not parts or object_info(store, f"{part_name(stage, len(parts))}/zarr.json") is not None:
        part = Part(store, stage, len(parts), settings)
        before = sum(other.spec.n for other in parts)
        if part.spec.start != before:
            raise BankError(f"{part.location} starts at row {part.spec.start}, and {before} rows are before it")
        parts.append(part)
    _require_last(store, stage, len(parts))
    ids = [row_id for part in parts for row_id in part.ids]
    if len(set(ids)) != len(ids):
        raise BankError(f"{where} holds an id twice; ids must be unique within a stage")
    return parts


def _require_last(store: Store, stage: int, count: int) -> None:
    """Refuse a part that had rows once, and has lost the file by which it counts: it would be taken for a leftover."""
    lost, later = part_name(stage, count), part_name(stage, count + 1)
    if any(object_info(store, key) is not None for key in (f"{lost}/seal/c.0.0", f"{later}/zarr.json")):
        raise BankError(
            f"{store.location(lost)} has no zarr.json, and was finished once: bring the file back from a copy of the "
            "bank, or remove that part, and those after it, and append again"
        )


_KINDS = {
    "rows": "rows",
    "scale": "scales",
    "d1": "derivatives",
    "d2": "derivatives",
    "fisher_weight": "derivatives",
    "fisher_rows": "sampled_fisher",
    "fisher_scale": "sampled_fisher",
    "batch_hashes": "batch_hashes",
    "audit": "audits",
    "committed": "marks",
    "seal": "marks",
    "ids": "ids",
}


def kind_of(key: str) -> str:
    """What an object of a bank holds."""
    folder, _, name = key.rpartition("/")
    first, last = key.split("/")[0], folder.split("/")[-1]
    if first in ("fits", "weights", "metrics", "curvature"):
        return first
    if name == "zarr.json":
        return "metadata"
    if "_metric_" in last:
        return "crossings"
    return _KINDS.get(last, "temporary")
