"""What users ask to be written: whole or not there, and in the place of nothing unless they said so."""

import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from source_proj._io.files import CREATING, Content, publish, write_files, write_new_files

__all__ = ["require_free", "write_output", "write_output_folder", "write_outputs"]


def require_free(path: Path, *, overwrite: bool) -> None:
    """Refuse a path where something is, before any work is done for it.

    Raises:
        FileExistsError: something is there, and it may not be overwritten.
    """
    if os.path.lexists(path) and not overwrite:
        raise _taken(path)


def write_output(path: Path, content: Content, *, overwrite: bool) -> None:
    """Write a file; see :func:`write_outputs`."""
    write_outputs({path: content}, overwrite=overwrite)


def write_outputs(contents: Mapping[Path, Content], *, overwrite: bool) -> None:
    """Write files, each whole or not at all: no reader sees a part of one, and a good one is kept until then.

    Args:
        contents: by path, the bytes, or what writes them into an open file.
        overwrite: whether what has these names is replaced.

    Raises:
        FileExistsError: one is there, and may not be overwritten; none is written.
        OSError: one cannot be written; what was there is as it was.
    """
    for path in contents:
        require_free(path, overwrite=overwrite)
    if overwrite:
        write_files(contents)
        return
    taken = write_new_files(contents)
    if taken:
        raise _taken(min(taken))


def write_output_folder(path: Path, fill: Callable[[Path], object], *, overwrite: bool) -> None:
    """Write a folder, whole or not at all.

    Args:
        path: its name.
        fill: called with an empty folder to fill.
        overwrite: whether what has this name is replaced.

    Raises:
        FileExistsError: something is there, and may not be overwritten.
        OSError: it cannot be written; what was there is as it was.
    """
    require_free(path, overwrite=overwrite)
    if not os.path.lexists(path):
        if not publish(path, fill):
            raise _taken(path)
        return
    whole, old = (path.with_name(f".{uuid.uuid4().hex}{CREATING}") for _ in range(2))
    publish(whole, fill)
    try:
        os.rename(path, old)  # a folder with content gives its name to no other
        try:
            os.rename(whole, path)
        except OSError:
            os.rename(old, path)
            raise
    finally:
        for leftover in (whole, old):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def _taken(path: Path) -> FileExistsError:
    return FileExistsError(f"{path} exists: remove it, give another path, or say overwrite=True (--overwrite)")
