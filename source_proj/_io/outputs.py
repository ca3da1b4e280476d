"""What users ask to be written: whole or not there, and in the place of nothing unless they said so."""

import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from source_proj._errors import full_disk_named
from source_proj._io.files import CREATING, Content, publish, write_files, write_new_files

__all__ = [
    "from_home",
    "local_path",
    "name_folder",
    "refused_together",
    "require_free",
    "write_output",
    "write_output_folder",
    "write_outputs",
]


_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # a Path leaves one slash of the two; drives have one letter


def local_path(path: str | Path) -> Path:
    """Return a path of this machine; "~" is the user's own folder, as in a shell.

    Raises:
        ValueError: it is a URL, which would become a folder called "s3:" here, and be lost with the machine.

    Example:
        >>> local_path("runs/first").name
        'first'
    """
    local = from_home(path)
    if _URL.match(local.as_posix()):
        url = _URL.sub(lambda scheme: f"{scheme[0]}/", local.as_posix(), count=1)
        raise ValueError(f"{url!r} is a URL, and only banks lie there: give a path of this machine, and copy the files")
    return local


def from_home(path: str | Path) -> Path:
    """A path whose "~", which nothing but a shell knows, is the user's own folder."""
    local = Path(path)
    return local.expanduser() if local.parts[:1] == ("~",) else local


def require_free(path: Path, *, overwrite: bool, replaceable: Callable[[Path], bool] = Path.is_file) -> None:
    """Refuse a path where something is, before any work is done for it.

    Args:
        path: where an output shall be.
        overwrite: whether a replaceable one is replaced.
        replaceable: whether what is there is of the output's own kind; nothing else is ever replaced, nor is a
            symbolic link, behind which lies what the user may not have meant.

    Raises:
        FileExistsError: something is there that may not be overwritten.
        OSError: nothing can have this name.
        ValueError: it is a URL.
    """
    local_path(path)
    store = next((above for above in Path(path).absolute().parents if (above / "zarr.json").is_file()), None)
    if store is not None:
        raise FileExistsError(
            f"{path} lies within the store {store}, which has nothing but its own in it: give another"
        )
    try:
        os.lstat(path)
    except FileNotFoundError:
        return
    if path.is_symlink():
        raise FileExistsError(f"{path} exists and is a symbolic link, which is never replaced: give the path itself")
    if not replaceable(path):
        kind = "folder" if path.is_dir() else "file"
        raise FileExistsError(
            f"{path} exists and is a {kind} of another kind than the one to write, which is never replaced: "
            "remove it or give another path"
        )
    if not overwrite:
        raise _taken(path)


def refused_together(*checks: Callable[[], None]) -> None:
    """Make checks of several outputs, and name all that are there already in one message.

    Args:
        checks: each refuses one output, as `require_free` does.

    Raises:
        FileExistsError: some are there.
        Exception: the first other one of a check.
    """
    taken = []
    for check in checks:
        try:
            check()
        except FileExistsError as error:
            taken.append(str(error))
    if taken:
        raise FileExistsError("; ".join(taken))


def write_output(path: Path, content: Content, *, overwrite: bool) -> None:
    """Write a file; see :func:`write_outputs`."""
    write_outputs({path: content}, overwrite=overwrite)


def write_outputs(
    contents: Mapping[Path, Content], *, overwrite: bool, replaceable: Callable[[Path], bool] = Path.is_file
) -> None:
    """Write files, each whole or not at all: no reader sees a part of one or of several, and good ones stay until then.

    Args:
        contents: by path, the bytes, or what writes them into an open file; the last one is there if all are.
        overwrite: whether files that have these names are replaced.
        replaceable: which of them may be; see :func:`require_free`.

    Raises:
        FileExistsError: something is there that may not be overwritten; none is written.
        OSError: one cannot be written; what was there is as it was.
    """
    for path in contents:
        require_free(path, overwrite=overwrite, replaceable=replaceable)
    with full_disk_named(" and ".join(map(str, contents))):
        if overwrite:
            write_files(contents, last_counts=len(contents) > 1)
            return
        taken = write_new_files(contents)
    if taken:
        raise _taken(min(taken))


def write_output_folder(
    path: Path, fill: Callable[[Path], object], *, overwrite: bool, replaceable: Callable[[Path], bool]
) -> None:
    """Write a folder, whole or not at all.

    Args:
        path: its name.
        fill: called with an empty folder to fill.
        overwrite: whether a replaceable folder that has this name is replaced.
        replaceable: whether the folder that is there may be; see :func:`require_free`.

    Raises:
        FileExistsError: something is there that may not be overwritten.
        OSError: it cannot be written; what was there is as it was.
    """
    require_free(path, overwrite=overwrite, replaceable=replaceable)
    with full_disk_named(path):
        if not os.path.lexists(path):
            if not publish(path, fill):
                raise _taken(path)
            return
        whole = path.with_name(f".{uuid.uuid4().hex}{CREATING}")
        publish(whole, fill)
    try:
        name_folder(whole, path, overwrite=True, replaceable=replaceable)
    finally:
        shutil.rmtree(whole, ignore_errors=True)


def name_folder(whole: Path, path: Path, *, overwrite: bool, replaceable: Callable[[Path], bool]) -> None:
    """Give a folder that is whole and on the disk its name, in place of a replaceable one; see `write_output_folder`.

    Raises:
        FileExistsError: something is there that may not be overwritten; the folder stays where it is.
        OSError: it cannot be renamed; what was there is as it was.
    """
    require_free(path, overwrite=overwrite, replaceable=replaceable)  # what is there may have changed meanwhile
    if not os.path.lexists(path):
        os.rename(whole, path)
        return
    old = path.with_name(f".{uuid.uuid4().hex}{CREATING}")
    try:
        os.rename(path, old)  # a folder with content gives its name to no other
        try:
            os.rename(whole, path)
        except OSError:
            os.rename(old, path)
            raise
    finally:
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.unlink(missing_ok=True)


def _taken(path: Path) -> FileExistsError:
    return FileExistsError(f"{path} exists: remove it, give another path, or say overwrite=True (--overwrite)")
