"""Files that are whole or not there: written under another name, flushed to the disk, then renamed."""

import contextlib
import glob
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

__all__ = ["beside_part", "leftovers", "publish", "remove_unpublished", "walk", "write_files"]

_PARTIAL = ".partial"  # ends every temporary file's name, as in zarr's own store
_CREATING = ".creating"  # ends every temporary folder's name


Content = bytes | Callable[[IO[bytes]], object]
"""A file's bytes, or a function that writes them: for what is too large to hold twice."""


def write_files(contents: Mapping[Path, Content]) -> None:
    """Write files, each whole or not at all, and return when they and their names are on the disk.

    Raises:
        OSError: a file cannot be written; temporary files are removed.
    """
    temporary = {path: path.with_name(f"{path.name}.{uuid.uuid4().hex}{_PARTIAL}") for path in contents}
    try:
        for path, content in contents.items():
            with temporary[path].open("xb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    content(file)
        _sync(temporary.values())
        for path in contents:
            temporary[path].replace(path)
    except BaseException:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        raise
    _sync({path.parent for path in contents})


def beside_part(bank: Path, part: Path) -> Path:
    """Where a part is prepared: next to its bank, so that the bank holds zarr nodes alone."""
    return bank.with_name(".".join([bank.name, *part.relative_to(bank).parts]))


def publish(path: Path, fill: Callable[[Path], None], beside: Path) -> bool:
    """Let ``fill`` make a folder, and give it its name when it is whole and on the disk.

    Args:
        path: the folder's name; its parent is made where it is missing.
        fill: called with an empty folder to fill.
        beside: the temporary folder lies next to this path, on the file system of ``path``, and is named after it.

    Returns:
        Whether it was published; False if another process was first, whose folder then stays.
    """
    beside.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside.with_name(f".{beside.name}.{uuid.uuid4().hex}{_CREATING}")
    try:
        temporary.mkdir()
        fill(temporary)
        _sync([*walk(temporary), *(Path(folder) for folder, _, _ in os.walk(temporary))])
        path.parent.mkdir(parents=True, exist_ok=True)
        os.rename(temporary, path)  # refused where a folder with content is there already
        _sync([path.parent])
    except OSError:
        if not _has_content(path):
            raise
        return False
    else:
        return True
    finally:
        # Whoever is still making one has lost the race, and finds out in `os.rename` at the latest.
        if _has_content(path):
            remove_unpublished(beside)
        shutil.rmtree(temporary, ignore_errors=True)


def remove_unpublished(beside: Path) -> None:
    """Remove what killed or slower processes left of a folder that another one has published meanwhile."""
    for old in beside.parent.glob(f".{glob.escape(beside.name)}.{'?' * len(uuid.uuid4().hex)}{_CREATING}"):
        shutil.rmtree(old, ignore_errors=True)


def walk(root: Path) -> Iterator[Path]:
    """Yield all files under a folder, in order of their names."""
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(files):
            yield Path(folder) / name


def leftovers(root: Path) -> list[Path]:
    """Temporary files that a killed process left under a folder."""
    return [file for file in walk(root) if file.name.endswith(_PARTIAL)]


def _has_content(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())


def _sync(paths: Iterable[Path]) -> None:
    """Return when files, and the names in folders, are on the disk."""
    # Many at once: the file system's journal then takes them together, ten times faster than one by one.
    with ThreadPoolExecutor(max_workers=16) as threads:
        list(threads.map(_sync_one, paths))


def _sync_one(path: Path) -> None:
    windows = os.name == "nt"  # flushes only what is open for writing, and cannot open folders
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
