"""The folder of a :class:`GroundTruth`: made whole or not at all, opened with every damage named."""

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec

from source_proj._errors import MismatchError, SourceProjError, write_remedy
from source_proj._io.files import PARTIAL, walk
from source_proj._io.locks import locked

__all__ = [
    "FORMAT",
    "VERSION",
    "Cell",
    "array_of",
    "checked",
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

_SAID = ("format", "version", "seed", "settings", "subsets", "queries")

Cell = tuple[int, int]
"""(subset, retraining)."""

FORMAT, VERSION = "source-proj ground truth", 3

_LOCK, _WRITING = "grow.lock", "write.lock"
_CHECKSUM = 4  # bytes at a chunk's end
_DOCUMENT_BYTES = 64 << 20  # of metadata
_PLAIN_BYTES = 256 << 20  # an array of so many bytes may be claimed by a store of any size
_MOST_TIMES = 1000  # a larger one by files of at least a thousandth of it: most of it may still be to be done


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
    if attributes.get("digest") != _digest_of(attributes):
        raise SourceProjError(f"{path}: the store's attributes are not those that it was made with: remove it")
    return group, attributes


def checked(path: Path) -> tuple[zarr.Group, dict[str, Any]]:
    """Open a store's folder as :func:`opened` does, and hold all that is in it to what a store has.

    Raises:
        SourceProjError: it is damaged, or claims what it does not have.
    """
    try:
        _require_files(path)
    except (OSError, ValueError) as error:
        raise SourceProjError(f"{path} holds no ground truth ({error}): remove it") from error
    group, attributes = opened(path)
    _require_arrays(group, attributes, path)
    return group, attributes


def _require_arrays(group: zarr.Group, attributes: Mapping[str, Any], path: Path) -> None:
    """Hold the arrays' metadata to what a store has, to one another, and to the disk, before anything is read.

    Raises:
        SourceProjError: they differ.
    """
    arrays = {name: array_of(group, name, path) for name in ("masks", "outcomes", "proofs")}
    for name, array in arrays.items():
        if not isinstance(array, zarr.Array) or array.ndim != (2 if name == "masks" else 3):
            raise SourceProjError(f"{path}: {name} is not the array that it must be: remove the store")
    masks, outcomes, proofs = (arrays[name].shape for name in ("masks", "outcomes", "proofs"))
    fit = outcomes == (masks[0], outcomes[1], attributes["queries"]) and proofs == (masks[0], proofs[1], 32)
    if not fit or proofs[1] < outcomes[1]:
        raise SourceProjError(f"{path}: masks {masks}, outcomes {outcomes} and proofs {proofs} do not fit: remove it")
    wanted = zarr.open_group(zarr.storage.MemoryStore())
    for name, array in arrays.items():
        if _metadata(_make_array(wanted, name, array.shape)) != _metadata(array):
            raise SourceProjError(
                f"{path}: the metadata of {name} are not those that it was made with: remove the store"
            )
    _require_sizes(group, arrays, path)


def _require_sizes(group: zarr.Group, arrays: Mapping[str, zarr.Array[Any]], path: Path) -> None:
    """Refuse arrays that claim much more than the disk has, and chunks that belong to no retraining.

    Raises:
        SourceProjError: there are such.
    """
    sizes = {}
    for file in walk(path):
        with contextlib.suppress(FileNotFoundError):  # another process has renamed what it wrote
            sizes[file.relative_to(path).as_posix()] = file.stat().st_size
    masks = sizes.get("masks/c/0/0", 0)
    if masks != arrays["masks"].nbytes + _CHECKSUM:
        raise SourceProjError(
            f"{path / 'masks/c/0/0'} has {masks} bytes, and masks of {arrays['masks'].shape} have "
            f"{arrays['masks'].nbytes + _CHECKSUM}: remove the store"
        )
    outcomes = arrays["outcomes"]
    most = max(_PLAIN_BYTES, _MOST_TIMES * sum(sizes.values()))
    if outcomes.nbytes > most or arrays["proofs"].nbytes > most:
        raise SourceProjError(f"{path}: outcomes of {outcomes.shape} are claimed in so small a store: remove it")
    shape = array_of(group, "outcomes", path).shape  # after the files were seen: another process may have grown it
    for name in sizes:
        kind, *cell = name.split("/")
        if kind == "outcomes" and len(cell) == 4 and not name.endswith(PARTIAL) and not _is_cell(cell, shape):
            raise SourceProjError(f"{path / name} is of none of the retrainings {shape}: remove it")
        if kind in ("outcomes", "proofs") and sizes[name] > _DOCUMENT_BYTES + 8 * outcomes.shape[2]:
            raise SourceProjError(f"{path / name} has {sizes[name]} bytes, more than it can have: remove the store")


def _require_files(path: Path) -> None:
    """Refuse links, pipes and huge metadata before they are read.

    Raises:
        OSError, ValueError: there are such.
    """
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            try:
                status = os.lstat(os.path.join(folder, name))
            except FileNotFoundError:  # another process has renamed what it wrote
                continue
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
                raise ValueError(f"{os.path.join(folder, name)} is neither a file nor a folder")
            if name == "zarr.json" and status.st_size > _DOCUMENT_BYTES:
                raise ValueError(f"{os.path.join(folder, name)} has {status.st_size} bytes")


def _metadata(array: zarr.Array[Any]) -> str:
    return json.dumps(array.metadata.to_dict(), sort_keys=True, default=str)


def _is_cell(cell: Sequence[str], shape: Sequence[int]) -> bool:
    """Whether "c", subset, retraining and column are those of a chunk of the array."""
    letter, j, r, column = cell
    within = all(part.isdecimal() and int(part) < size for part, size in zip((j, r), shape, strict=False))
    return (letter, column) == ("c", "0") and within


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
    array = array_of(group, "outcomes", path)  # whose size is read first: of a store that grows, proofs go before
    proofs, without_proof = _cells(array_of(group, "proofs", path))  # read first: an outcome that has one stays
    outcomes, unreadable = _cells(array)
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

    Of several processes that measured one cell, whose outcomes can differ in bits, the first one counts: they take
    turns, and each looks what is there when its turn has come.

    Raises:
        SourceProjError: they cannot be written, as on a full disk; those before are kept.
    """
    group, _ = opened(path)
    outcomes, proofs, key = array_of(group, "outcomes", path), array_of(group, "proofs", path), _key(group)
    for (j, r), row in zip(cells, measured, strict=True):
        try:
            with locked(path, _WRITING):
                _record(outcomes, proofs, key, (j, r), row)
        except OSError as error:
            raise SourceProjError(
                f"{path}: the outcome of subset {j}, retraining {r} cannot be written ({error}): "
                f"{write_remedy(error)}, then call fill(train) again"
            ) from error


def _record(
    outcomes: zarr.Array[Any], proofs: zarr.Array[Any], key: str, cell: Cell, measured: NDArray[np.float64]
) -> None:
    """Write one outcome with its proof, unless there is one."""
    there, proof = _stored(outcomes, cell), _stored(proofs, cell)
    if there is not None and proof is not None and _proof(key, cell, there) == proof.tobytes():
        return
    if proof is None or proof.any():
        proofs[cell] = 0  # of a file that was removed: who is killed in between leaves none beside another outcome
    outcomes[cell] = measured
    proofs[cell] = np.frombuffer(_proof(key, cell, measured), np.uint8)


def _stored(array: zarr.Array[Any], cell: Cell) -> NDArray[Any] | None:
    """What stands in a cell; None if it cannot be decoded."""
    try:
        return np.asarray(array[cell])
    except OSError:
        raise
    except Exception:  # a codec's, of whatever kind
        return None


def grow(group: zarr.Group, path: Path, retrainings: int) -> None:
    """Make room for at least so many retrainings of each subset; those that are there stay.

    Processes that open one store at once take turns, and each looks how many there are when its turn has come: one that
    had read a smaller number before would take retrainings away that another has finished meanwhile.

    Raises:
        SourceProjError: the store cannot be written.
    """
    try:
        with locked(path, _LOCK):
            for name in ("proofs", "outcomes"):  # who reads in between finds a proof's place for each outcome
                array = array_of(group, name, path)
                if array.shape[1] < retrainings:
                    array.resize((array.shape[0], retrainings, array.shape[2]))
    except OSError as error:
        raise SourceProjError(f"{path} cannot be written ({error}): {write_remedy(error)}, then try again") from error


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


def _digest_of(attributes: Mapping[str, Any]) -> str:
    """SHA-256 of what a store was made for."""
    return hashlib.sha256(json.dumps({key: attributes.get(key) for key in _SAID}, sort_keys=True).encode()).hexdigest()


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back: tuples are lists there."""
    try:
        return cast(dict[str, Any], json.loads(json.dumps(dict(settings), default=_plain_number)))
    except TypeError as error:
        raise TypeError(f"settings must be numbers, strings, and lists or dicts of them: {error}") from error


def _plain_number(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r:.60} of type {type(value).__name__} is none of these")


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
    group = zarr.open_group(folder, mode="w", attributes={**description, "digest": _digest_of(description)})
    queries = int(description["queries"])
    _make_array(group, "masks", masks.shape)[...] = masks
    _make_array(group, "outcomes", (len(masks), retrainings, queries))
    _make_array(group, "proofs", (len(masks), retrainings, 32))


def _make_array(group: zarr.Group, name: str, shape: tuple[int, ...]) -> zarr.Array[Any]:
    """One of a store's arrays, empty: masks in one chunk, the others in one for each retraining."""
    dtype, fill = {"masks": ("bool", False), "outcomes": ("float64", float("nan")), "proofs": ("uint8", 0)}[name]
    return group.create_array(
        name, shape=shape, chunks=shape if name == "masks" else (1, 1, shape[2]), dtype=dtype,
        serializer=BytesCodec(), compressors=[Crc32cCodec()], fill_value=fill,
    )  # fmt: skip
