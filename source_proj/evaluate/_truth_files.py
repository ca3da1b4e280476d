"""The folder of a :class:`GroundTruth`: made whole or not at all, opened with every damage named."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

from source_proj._errors import MismatchError, SourceProjError

__all__ = [
    "FORMAT",
    "VERSION",
    "Cell",
    "array_of",
    "contrast",
    "create",
    "digest",
    "grow",
    "opened",
    "plain",
    "read_masks",
    "read_outcomes",
    "record",
]

Cell = tuple[int, int]
"""(subset, retraining)."""

FORMAT, VERSION = "source-proj ground truth", 2


def opened(path: Path) -> tuple[zarr.Group, dict[str, Any]]:
    """Open a store's folder: the group and its attributes.

    Raises:
        SourceProjError: if there is none, or a damaged one.
        MismatchError: if it is of another format.
    """
    try:
        if not path.is_dir():  # zarr would make the folder
            raise FileNotFoundError("there is no such folder")
        group = zarr.open_group(path, mode="r+")
        attributes: dict[str, Any] = dict(group.attrs)
    except Exception as error:
        raise SourceProjError(f"{path} holds no ground truth ({error}): make one with GroundTruth.subsets") from error
    if attributes.get("format") != FORMAT or attributes.get("version") != VERSION:
        raise MismatchError(
            f"{path} holds {attributes.get('format')!r} version {attributes.get('version')!r}, expected "
            f"{FORMAT!r} version {VERSION}: give another path"
        )
    lacking = [key for key in ("seed", "settings", "subsets", "queries") if key not in attributes]
    if lacking:
        raise SourceProjError(f"{path}: the store's attributes lack {lacking}; remove it")
    return group, attributes


def array_of(group: zarr.Group, name: str, path: Path) -> zarr.Array[Any]:
    """One of a store's arrays, with its shape as it is on the disk now.

    Raises:
        SourceProjError: if its metadata are missing or damaged.
    """
    try:
        return cast("zarr.Array[Any]", group[name])
    except Exception as error:  # zarr's own, JSON's, the file system's
        raise SourceProjError(f"{path}: {name} is missing or damaged ({error}): remove the store") from error


def read_masks(group: zarr.Group, path: Path) -> NDArray[np.bool_]:
    """Which examples each subset keeps, ``(M, N)``.

    Raises:
        SourceProjError: if they are not those that the store was made for.
    """
    try:
        masks = np.asarray(array_of(group, "masks", path)[...], dtype=np.bool_)
    except SourceProjError:
        raise
    except Exception as error:  # a codec's, of whatever kind
        raise SourceProjError(f"{path}: masks cannot be read ({error}): remove the store") from error
    if digest(masks) != group.attrs["subsets"]:
        raise SourceProjError(f"{path}: masks are not those that the store was made for: remove it")
    return masks


def read_outcomes(group: zarr.Group, path: Path) -> tuple[NDArray[np.float64], list[Cell], dict[Cell, str]]:
    """What is in a store: measurements ``(M, R, Q)``, cells still to be done, and cells with what is wrong with them.

    Cells still to be done come first retrainings first; they are NaN.
    """
    outcomes, unreadable = _cells(array_of(group, "outcomes", path))
    proofs, without_proof = _cells(array_of(group, "proofs", path))
    values = np.full(outcomes.shape, np.nan)
    undone: list[Cell] = []
    wrong: dict[Cell, str] = {}
    key = _key(group)
    for r, j in np.ndindex(outcomes.shape[1], outcomes.shape[0]):
        cell, proof = (j, r), proofs[j, r].tobytes()
        if cell in unreadable:
            wrong[cell] = f"cannot be read ({unreadable[cell]})"
        elif np.isnan(outcomes[cell]).any():
            undone.append(cell)
        elif cell in without_proof:
            wrong[cell] = f"has no proof that can be read ({without_proof[cell]})"
        elif not any(proof):  # it is written last
            undone.append(cell)
        elif _proof(key, cell, outcomes[cell]) != proof:
            wrong[cell] = "is not what was measured there: it belongs elsewhere, or was altered"
        else:
            values[cell] = outcomes[cell]
    return values, undone, wrong


def _cells(array: zarr.Array[Any]) -> tuple[NDArray[Any], dict[Cell, Exception]]:
    """All of an array of cells, and what stood in the way of reading some of them, which are zero here."""
    try:
        return np.asarray(array[...]), {}
    except Exception:  # a codec's, of whatever kind: cell by cell, then
        values = np.zeros(array.shape, array.dtype)
    unreadable: dict[Cell, Exception] = {}
    for j, r in np.ndindex(*array.shape[:2]):
        try:
            values[j, r] = array[j, r]
        except Exception as error:
            unreadable[j, r] = error
    return values, unreadable


def record(path: Path, cells: Sequence[Cell], measured: NDArray[np.float64]) -> None:
    """Write the measurements ``(n, Q)`` of cells; each is in the store once its proof is.

    Raises:
        SourceProjError: they cannot be written, as on a full disk; those before are kept.
    """
    group, _ = opened(path)
    outcomes, proofs, key = array_of(group, "outcomes", path), array_of(group, "proofs", path), _key(group)
    for (j, r), row in zip(cells, measured, strict=True):
        try:
            outcomes[j, r] = row
            proofs[j, r] = np.frombuffer(_proof(key, (j, r), row), np.uint8)
        except OSError as error:
            raise SourceProjError(
                f"{path}: the outcome of subset {j}, retraining {r} cannot be written ({error}): make room, then "
                "call fill(train) again"
            ) from error


def grow(group: zarr.Group, path: Path, retrainings: int) -> None:
    """Make room for more retrainings of each subset.

    Raises:
        SourceProjError: the store cannot be written.
    """
    try:
        for name in ("proofs", "outcomes"):
            array = array_of(group, name, path)
            array.resize((array.shape[0], retrainings, array.shape[2]))
    except OSError as error:
        raise SourceProjError(f"{path} cannot be written ({error}): make room, then try again") from error


def _key(group: zarr.Group) -> str:
    """What makes a store's outcomes its own, as JSON."""
    return json.dumps([group.attrs[name] for name in ("seed", "settings", "subsets", "queries")], sort_keys=True)


def _proof(key: str, cell: Cell, measured: NDArray[np.float64]) -> bytes:
    """SHA-256 of which store and cell the measurements ``(Q,)`` belong to, and of their bytes."""
    content = np.ascontiguousarray(measured, dtype="<f8").tobytes()
    return hashlib.sha256(f"{key} {cell[0]} {cell[1]}\n".encode() + content).digest()


def digest(masks: NDArray[np.bool_]) -> str:
    """Fingerprint of masks ``(M, N)``."""
    return hashlib.sha256(repr(masks.shape).encode() + np.packbits(masks).tobytes()).hexdigest()


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back: tuples are lists there."""
    try:
        return cast(dict[str, Any], json.loads(json.dumps(dict(settings))))
    except TypeError as error:
        raise TypeError(f"settings must be numbers, strings, and lists or dicts of them: {error}") from error


def contrast(key: str, stored: Any, wanted: Any) -> str:
    """What differs, by name."""
    if key == "subsets":
        return "other subsets (masks)"
    if key == "settings" and isinstance(stored, dict):
        nothing = object()
        names = [name for name in {**stored, **wanted} if stored.get(name, nothing) != wanted.get(name, nothing)]
        before, now = ({name: side[name] for name in names if name in side} for side in (stored, wanted))
        return f"settings {before}, now wanted are {now}"
    return f"{key} {stored!r}, now wanted is {wanted!r}"


def create(folder: Path, description: Mapping[str, Any], masks: NDArray[np.bool_], retrainings: int) -> None:
    """Write an empty store.

    That is masks ``(M, N)``; outcomes ``(M, R, Q)``, all NaN, in one chunk per retraining; and proofs ``(M, R, 32)``,
    the digest of each outcome and of where it belongs, all zero.
    """
    group = zarr.open_group(folder, mode="w", attributes=dict(description))
    kept = group.create_array(
        "masks", shape=masks.shape, chunks=masks.shape, dtype="bool", serializer=BytesCodec(),
        compressors=[ZstdCodec(), Crc32cCodec()],
    )  # fmt: skip
    kept[...] = masks
    queries = int(description["queries"])
    group.create_array(
        "outcomes", shape=(len(masks), retrainings, queries), chunks=(1, 1, queries), dtype="float64",
        serializer=BytesCodec(), compressors=[Crc32cCodec()], fill_value=float("nan"),
    )  # fmt: skip
    group.create_array(
        "proofs", shape=(len(masks), retrainings, 32), chunks=(1, 1, 32), dtype="uint8",
        serializer=BytesCodec(), compressors=[Crc32cCodec()], fill_value=0,
    )  # fmt: skip
