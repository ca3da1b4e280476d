"""The bank's root: what it says about itself, and the parts that lie below."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import zarr

from source_proj._errors import BankError
from source_proj.bank.format import FORMAT, VERSION, Settings
from source_proj.bank.read.part import Part, open_node

__all__ = ["Root", "check_seal", "find_parts", "kind_of", "read_root"]


class Root(NamedTuple):
    """What a bank says about itself.

    Attributes:
        settings: what its rows depend on.
        versions: what software made it.
        checkpoint_paths: where checkpoint files lay relative to it, by hash.
    """

    settings: Settings
    versions: dict[str, str]
    checkpoint_paths: dict[str, str]


def read_root(path: Path) -> Root:
    """Read a bank's root.

    Raises:
        BankError: there is no bank, or one of another version, or one whose metadata are damaged; says what was found.
    """
    root = _root(path)
    attributes = root.attrs.asdict()
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
        settings = Settings.from_json(attributes.get("settings"))
    except BankError as error:
        raise BankError(f"the bank {path} cannot be read: {error}") from error
    notes = [attributes.get(name) for name in ("versions", "checkpoint_paths")]
    for note in notes:
        if not isinstance(note, Mapping):
            raise BankError(f"the bank {path} cannot be read: versions or checkpoint_paths is {note!r}, not an object")
    return Root(settings, *(dict(note) for note in notes))  # type: ignore[arg-type]


def _root(path: Path) -> zarr.Group:
    if not path.exists():
        raise BankError(f"there is no bank at {path}: nothing is there; build one with source_proj.build")
    if not path.is_dir():
        raise BankError(f"{path} is a file, and a bank is a folder; give the folder")
    if not (path / "zarr.json").is_file():
        found = sorted(entry.name for entry in path.iterdir())[:5]
        older = " (a zarr v2 node: banks are zarr v3)" if {".zgroup", ".zarray"} & set(found) else ""
        raise BankError(f"{path} is no bank: it has no zarr.json, but {found or 'nothing'}{older}")
    root = open_node(path, ".")
    if not isinstance(root, zarr.Group):
        raise BankError(f"{path} is no bank, but a zarr array")
    return root


def find_parts(path: Path, settings: Settings, stage: int) -> list[Part]:
    """Open all parts of a stage.

    Raises:
        BankError: there is none, or one is not as it must be.
    """
    group, name = open_node(path, f"stage_{stage}"), settings.trajectory.stages[stage].name
    if group.attrs.get("name") != name:
        raise BankError(f"{path / f'stage_{stage}'} is of stage {group.attrs.get('name')!r}, and must be of {name!r}")
    parts: list[Part] = []
    while not parts or (path / f"stage_{stage}" / f"part_{len(parts)}").is_dir():
        part = Part(path, stage, len(parts), settings)
        before = sum(one.spec.n for one in parts)
        if part.spec.start != before:
            raise BankError(f"{part.path} starts at row {part.spec.start}, and {before} rows are before it")
        parts.append(part)
    ids = [one for part in parts for one in part.ids]
    if len(set(ids)) != len(ids):
        raise BankError(f"{path / f'stage_{stage}'} holds an id twice; ids must be unique within a stage")
    return parts


def check_seal(part: Part) -> None:
    """Compare a part's seal, if it has one, with what it seals.

    Raises:
        BankError: something changed since.
    """
    sealed = part.sealed()
    if sealed is None:
        return
    if sealed[1] != part.metadata_hash():
        raise BankError(f"the metadata of {part.path}, or of the groups above it, changed since it was sealed")
    if sealed[0] != part.content_hash():
        raise BankError(f"the ids or commit marks of {part.path} changed since it was sealed: verify says more")


_KINDS = {
    "rows": "rows",
    "scale": "scales",
    "d1": "derivatives",
    "d2": "derivatives",
    "fisher_rows": "sampled_fisher",
    "fisher_scale": "sampled_fisher",
    "batch_hashes": "batch_hashes",
    "committed": "marks",
    "seal": "marks",
    "ids": "ids",
}


def kind_of(file: Path) -> str:
    """What a file of a bank, named relative to it, holds."""
    if file.parts[0] in ("fits", "weights", "metrics"):
        return file.parts[0]
    if file.name == "zarr.json":
        return "metadata"
    if file.name.endswith(".partial"):
        return "temporary"
    if "_metric_" in file.parent.name:
        return "crossings"
    return _KINDS.get(file.parent.name, "temporary")
