"""The folder of a :class:`GroundTruth`: made whole or not at all, opened with every damage named."""

import hashlib
import json
from collections.abc import Mapping
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
    "array_of",
    "contrast",
    "create",
    "digest",
    "opened",
    "plain",
    "read",
    "undone",
]

FORMAT, VERSION = "source-proj ground truth", 1


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


def undone(outcomes: NDArray[Any]) -> list[tuple[int, int]]:
    """Cells ``(subset, retraining)`` of outcomes ``(M, R, Q)`` that hold NaN, first retrainings first."""
    return [(int(j), int(r)) for r, j in np.argwhere(np.isnan(outcomes).any(axis=2).T)]


def array_of(group: zarr.Group, name: str, path: Path) -> zarr.Array[Any]:
    """One of a store's arrays, with its shape as it is on the disk now.

    Raises:
        SourceProjError: if its metadata are missing or damaged.
    """
    try:
        return cast("zarr.Array[Any]", group[name])
    except Exception as error:  # zarr's own, JSON's, the file system's
        raise SourceProjError(f"{path}: {name} is missing or damaged ({error}): remove the store") from error


def read(array: zarr.Array[Any], path: Path) -> NDArray[Any]:
    """All values of a store's array.

    Raises:
        SourceProjError: if bytes are not those that were written; names the files.
    """
    try:
        return np.asarray(array[...])
    except Exception as error:  # a codec's, of whatever kind
        remedy = "remove the store"
        if array.basename == "outcomes":
            remedy = f"remove {_damaged(array)} in it, and fill(train) does these retrainings again"
        raise SourceProjError(f"{path}: {array.basename} cannot be read ({error}): {remedy}") from error


def _damaged(outcomes: zarr.Array[Any]) -> str:
    """Names of the files, one per retraining, that cannot be read."""
    damaged = []
    for j, r in np.ndindex(*outcomes.shape[:2]):
        try:
            outcomes[j, r]
        except Exception:
            damaged.append(f"outcomes/c/{j}/{r}/0")
    return ", ".join(damaged[:5]) + (f" and {len(damaged) - 5} more" if len(damaged) > 5 else "")


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
    """Write an empty store: masks ``(M, N)``, and outcomes ``(M, R, Q)``, all NaN, in one chunk per retraining."""
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
