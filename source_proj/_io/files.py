"""Files and folders that are whole or not there: written under another name, flushed to the disk, then renamed."""

import contextlib
import errno
import glob
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

__all__ = [
    "CREATING",
    "PARTIAL",
    "Content",
    "copy_files",
    "make_folders",
    "publish",
    "sync_folder",
    "walk",
    "write_file",
    "write_files",
    "write_new_files",
]

PARTIAL = ".partial"
"""Ends the name of every temporary file, as in zarr's own store."""

Content = bytes | Callable[[BinaryIO], object]
"""The bytes of a file, or what writes them into an open one."""

CREATING = ".creating"
"""Ends the name of every temporary folder."""

_LONGEST = 128  # bytes of a name that are kept in a temporary one; file systems allow 255


def write_file(path: Path, content: Content) -> None:
    """Write a file whole or not at all, in place of what had its name; see :func:`write_files`."""
    write_files({path: content})


def write_files(contents: Mapping[Path, Content], *, last_counts: bool = False) -> None:
    """Write files, each whole or not at all, and return when they and their names are on the disk.

    Args:
        contents: by path, the bytes, or what writes them into an open file.
        last_counts: whether the last one says of the others what they are. What has its name goes first then, so that
            it never stands beside new ones: a kill in that instant leaves none of that name.

    Raises:
        OSError: a file cannot be written; temporary files are removed.
    """
    with _written_aside(contents) as temporary:
        if last_counts:
            list(contents)[-1].unlink(missing_ok=True)
        for path in contents:
            temporary[path].replace(path)
    _sync({path.parent for path in contents})


def write_new_files(contents: Mapping[Path, Content]) -> set[Path]:
    """Write files as :func:`write_files`, but none in place of another.

    Returns:
        The files whose names were taken already; what is there stays as it is.
    """
    with _written_aside(contents) as temporary:
        taken = {path for path in contents if not _give_name(temporary[path], path)}
    _sync({path.parent for path in contents})
    return taken


def copy_files(sources: Mapping[Path, Path]) -> None:
    """Give each target the content of its source, whole, in place of what was there; they may share it from then on.

    Raises:
        FileNotFoundError: a source is not there.
        OSError: a target cannot be written.
    """
    for target, source in sources.items():
        temporary = _aside(target)
        try:
            if not _linked(source, temporary):
                shutil.copyfile(source, temporary)
                _sync([temporary])
            temporary.replace(target)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)  # it is still there where both were one file already
    _sync({target.parent for target in sources})


def make_folders(folders: Iterable[Path]) -> None:
    """Make folders, and those above them, where they are missing; return when their names are on the disk."""
    missing = {above for folder in folders for above in (folder, *folder.parents) if not above.exists()}
    for folder in sorted(missing):
        folder.mkdir(exist_ok=True)
    _sync({folder.parent for folder in missing})


def publish(path: Path, fill: Callable[[Path], object]) -> bool:
    """Let ``fill`` make a folder, and give it its name when it is whole and on the disk.

    Args:
        path: the folder's name; its parent is made where it is missing.
        fill: called with an empty folder to fill, which lies beside ``path``.

    Returns:
        Whether it was published; False if another process was first, whose folder then stays.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{_short(path.name)}.{uuid.uuid4().hex}{CREATING}")
    try:
        temporary.mkdir()
        fill(temporary)
        sync_folder(temporary)
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
            _remove_unpublished(path)
        shutil.rmtree(temporary, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Return when a folder and all that is in it are on the disk."""
    _sync([*walk(folder), *(Path(inner) for inner, _, _ in os.walk(folder))])


def walk(root: Path) -> Iterator[Path]:
    """Yield all files under a folder, in order of their names.

    Raises:
        OSError: a folder cannot be read.
    """
    for folder, folders, files in os.walk(root, onerror=_raised):
        folders.sort()
        for name in sorted(files):
            yield Path(folder) / name


@contextlib.contextmanager
def _written_aside(contents: Mapping[Path, Content]) -> Iterator[dict[Path, Path]]:
    """Write files under temporary names, flushed, and remove what still has such a name at the end."""
    temporary = {path: _aside(path) for path in contents}
    try:
        for path, content in contents.items():
            with temporary[path].open("xb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    content(file)
        _sync(temporary.values())
        yield temporary
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _give_name(temporary: Path, path: Path) -> bool:
    """Give a file its name, unless something has it: whether it was given."""
    try:
        if not _linked(temporary, path):
            # There two writers in one instant both get the name, and the last one's file stays.
            if os.path.lexists(path):
                return False
            os.rename(temporary, path)
    except FileExistsError:
        return False
    return True


def _linked(source: Path, target: Path) -> bool:
    """Give a file a second name; False where there are none, as on FAT and some network disks."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        return False
    return True


def _aside(path: Path) -> Path:
    """A name beside a file's, until it is whole."""
    return path.with_name(f"{_short(path.name)}.{uuid.uuid4().hex}{PARTIAL}")


def _remove_unpublished(path: Path) -> None:
    """Remove what killed or slower processes left of a folder that another one has published meanwhile."""
    for old in path.parent.glob(f".{glob.escape(_short(path.name))}.{'?' * len(uuid.uuid4().hex)}{CREATING}"):
        shutil.rmtree(old, ignore_errors=True)


def _short(name: str) -> str:
    """A name that leaves room for what is added to it."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= _LONGEST else hashlib.sha256(encoded).hexdigest()


def _has_content(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())


def _raised(error: OSError) -> None:
    raise error


def _sync(paths: Iterable[Path]) -> None:
    """Return when files, and the names in folders, are on the disk."""
    # Many at once: the file system's journal then takes them together, ten times faster than one by one.
    with ThreadPoolExecutor(max_workers=16) as threads:
        list(threads.map(_sync_path, paths))


def _sync_path(path: Path) -> None:
    windows = os.name == "nt"  # flushes only what is open for writing, and cannot open folders
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
