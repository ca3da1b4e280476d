"""Fits: arrays computed from a bank and kept in it, so that they are computed once.

Each entry is a zarr group named by a hash of everything that it depends on: the bank's fingerprint, the kind of entry
and all its settings. It appears under its name when it is whole, and its attributes hold a digest of every array: what
differs from it, or lacks a chunk, is computed anew with a warning, and never used. Where the bank's folder cannot be
written, entries go to the user's cache folder.
"""

import hashlib
import json
import os
import shutil
import stat
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from source_proj._errors import BankError
from source_proj._io.files import CREATING, PARTIAL, publish, write_file
from source_proj.bank.layout import group_document

__all__ = ["Arrays", "FitCache"]

_VERSION = 3  # of the entries' meaning: raise it when a formula changes
_CHUNK_BYTES = 16 << 20
_DOCUMENT_BYTES = 64 << 20  # of metadata
_ABANDONED = 600  # seconds after which an entry in the making, to which nothing was added, counts as a killed process's

Arrays = dict[str, np.ndarray]


class FitCache:
    """The fits of one bank.

    Args:
        path: the bank's folder, whose fits others may keep to themselves; None for one elsewhere. Then all are in the
            user's cache.
        fingerprint: the bank's; None for an unfinished one, which has no valid fits.

    Raises:
        BankError: the folder of the fits is a link, which would be written through.
    """

    def __init__(self, path: Path | None, fingerprint: str | None) -> None:
        self._fingerprint = fingerprint
        cache = platformdirs.user_cache_path("source-proj") / (fingerprint or "unfinished")[:32]
        self._beside = cache if path is None else path / "fits"
        if self._beside.is_symlink():
            raise BankError(f"{self._beside} is a link, and a bank must not hold any: remove it")
        self._folders = [self._beside]
        if fingerprint is not None and path is not None:
            self._folders.append(cache)
            if self._beside.exists() and not os.access(self._beside, os.R_OK | os.X_OK):
                self._folders, self._beside = [cache], cache  # somebody else's, who keeps them private

    @property
    def folder(self) -> Path:
        """Where new entries go."""
        parent = self._beside if self._beside.exists() else self._beside.parent
        return self._beside if os.access(parent, os.W_OK) else self._folders[-1]

    def get(self, kind: str, settings: Mapping[str, Any], compute: Callable[[], Arrays]) -> Arrays:
        """Return an entry's arrays, from the cache or by computing (and then keeping) them.

        Args:
            kind: what the entry is, such as "spectrum".
            settings: everything besides the bank's content that the entry depends on; JSON-able.
            compute: makes the arrays.
        """
        description = {"kind": kind, "version": _VERSION, "bank": self._fingerprint, **settings}
        name = _name(description)
        for folder in self._folders:
            if (folder / name).is_symlink() or (folder / name).exists():
                try:
                    return _read(folder / name, description)
                except Exception as error:  # whatever is wrong with an entry, the remedy is the same
                    warnings.warn(f"the fit {folder / name} is damaged ({error}) and is computed anew", stacklevel=2)
                    _remove(folder / name)
        arrays = compute()
        try:
            self._write(name, description, arrays)
        except OSError as error:  # a full disk costs the cache, never the result
            warnings.warn(f"the fit could not be kept in {self.folder}: {error}", stacklevel=2)
        return arrays

    def clear(self) -> int:
        """Delete all fits, and return the bytes that are free now: those in a folder that is only read stay."""
        before = self.nbytes()
        for folder in self._folders:
            _remove(folder)
        return before - self.nbytes()

    def remove_stale(self) -> None:
        """Delete what is of no use any more: fits of other content of the bank, and what killed processes left."""
        for path in self.leftovers():
            _remove(path)

    def nbytes(self) -> int:
        """Bytes on disk of all fits."""
        return sum(_size(folder) for folder in self._folders)

    def leftovers(self) -> list[Path]:
        """Folders of fits of other content of the bank, and of fits that were never finished."""
        return [
            path for path in self._entries() if path.name.endswith((CREATING, PARTIAL)) or self._belongs_elsewhere(path)
        ]  # fmt: skip

    def problems(self) -> Iterator[str]:
        """Read all fits in the bank that it could use, and say what is wrong with them."""
        left = set(self.leftovers())
        for path in self._entries():
            if path not in left:
                try:
                    _read(path, _description(path))
                except Exception as error:
                    yield f"the fit {path} is damaged ({error}): remove it, or call the bank's clear_fits()"

    def _entries(self) -> list[Path]:
        """Everything in the bank's folder of fits but its own metadata."""
        try:
            return sorted(path for path in self._beside.iterdir() if path.name != "zarr.json")
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _belongs_elsewhere(self, path: Path) -> bool:
        try:
            return bool(_description(path).get("bank") != self._fingerprint)
        except Exception:  # named by `problems`
            return False

    def _write(self, name: str, description: Mapping[str, Any], arrays: Arrays) -> None:
        folder = self.folder
        _make_group(folder)
        for path in self._entries():
            if path.name.endswith((CREATING, PARTIAL)) and time.time() - _last_change(path) > _ABANDONED:
                _remove(path)
        publish(folder / name, lambda temporary: _fill(temporary, description, arrays))


def _make_group(folder: Path) -> None:
    """Keep the folder of the fits itself a readable zarr node, whatever stands there.

    Raises:
        OSError: it cannot be written.
    """
    document = folder / "zarr.json"
    try:
        if _size(document) <= _DOCUMENT_BYTES:  # which refuses what is no file
            zarr.open_group(folder, mode="r")
            return
    except Exception:  # whatever is wrong with it
        _remove(document)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(document, group_document({}))


def _name(description: Mapping[str, Any]) -> str:
    text = json.dumps(description, sort_keys=True)
    return f"{description['kind']}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


def _description(path: Path) -> dict[str, Any]:
    """What an entry says that it is."""
    if _size(path / "zarr.json") > _DOCUMENT_BYTES:
        raise ValueError("its metadata are too long")
    description = zarr.open_group(path, mode="r").attrs["description"]
    if not isinstance(description, dict):
        raise ValueError(f"its description is {description!r}")
    return description


def _read(path: Path, description: Mapping[str, Any]) -> Arrays:
    """Read an entry.

    Raises:
        Exception: of whatever kind, if it is not, to the bit, what was written.
    """
    on_disk = _size(path)  # which refuses links and pipes
    if max(_size(file) for file in path.rglob("zarr.json")) > _DOCUMENT_BYTES:
        raise ValueError("its metadata are too long")
    group = zarr.open_group(path, mode="r")
    if _description(path) != json.loads(json.dumps(description)) or path.name != _name(description):
        raise ValueError("it describes another fit")
    digests = group.attrs["digests"]
    arrays = dict(group.arrays())
    if not isinstance(digests, dict) or set(arrays) != set(digests):
        raise ValueError("arrays are missing")
    wanted = sum(array.nbytes for array in arrays.values())
    if not wanted <= on_disk <= 2 * wanted + _DOCUMENT_BYTES:
        raise ValueError("chunks are missing, cut short or too long")
    values = {name: np.asarray(array[...]) for name, array in arrays.items()}
    for name, digest in digests.items():
        if _digest(values[name]) != digest:
            raise ValueError(f"{name} is not what was written")
    return values


def _fill(folder: Path, description: Mapping[str, Any], arrays: Arrays) -> None:
    """Write an entry.

    Raises:
        FileNotFoundError: whoever was first with the same one removed the folder, which zarr makes anew without a word.
    """
    digests = {name: _digest(values) for name, values in arrays.items()}
    group = zarr.open_group(folder, mode="w", attributes={"description": dict(description), "digests": digests})
    for name, values in arrays.items():
        row_bytes = max(1, values[:1].nbytes)
        array = group.create_array(
            name,
            shape=values.shape,
            chunks=(max(1, min(len(values), _CHUNK_BYTES // row_bytes)), *values.shape[1:]),
            dtype=values.dtype,
            compressors=[Crc32cCodec()],
            serializer=BytesCodec(),
            config={"write_empty_chunks": True},  # `_read` counts bytes, and looking for zeros takes longer
        )
        array[...] = values
    if "description" not in zarr.open_group(folder, mode="r").attrs:
        raise FileNotFoundError(f"{folder} was removed while it was filled: another process was first")


def _digest(values: np.ndarray) -> str:
    """SHA-256, in hex, over type, shape and the digests of the content's blocks, which are taken side by side."""
    content = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    blocks = [content[start : start + _CHUNK_BYTES] for start in range(0, len(content), _CHUNK_BYTES)]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
        digests = threads.map(lambda block: hashlib.sha256(block.data).digest(), blocks)
        return hashlib.sha256(f"{values.dtype.str} {values.shape}\n".encode() + b"".join(digests)).hexdigest()


def _files(path: Path) -> Iterator[os.stat_result]:
    """What the file system knows of a path and of all below it.

    Raises:
        ValueError: one of them is neither a file nor a folder.
    """
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        raise ValueError(f"{path} is a link")
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise ValueError(f"{path} is neither a file nor a folder")
    yield status
    if stat.S_ISDIR(status.st_mode):
        for name in sorted(os.listdir(path)):
            yield from _files(path / name)


def _size(path: Path) -> int:
    """Bytes of all files below a path."""
    if not os.path.lexists(path):
        return 0
    return sum(status.st_size for status in _files(path) if stat.S_ISREG(status.st_mode))


def _last_change(path: Path) -> float:
    try:
        return max(status.st_mtime for status in _files(path))
    except (OSError, ValueError):  # it is being removed, or holds what no fit does
        return 0.0


def _remove(path: Path) -> None:
    """Remove a folder; of a link, the link."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
