"""A folder of the file system as a store."""

import contextlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from source_proj._errors import BankError
from source_proj._io.files import copy_files, make_folders, write_files, write_new_files
from source_proj.bank.store.base import ObjectInfo, Store, checked_key

__all__ = ["LocalStore"]

_T = TypeVar("_T")
_R = TypeVar("_R")
_TRIES = 5
_FITS = "fits"  # no part of a bank: whoever made them may keep them private


class LocalStore(Store):
    """A folder; an object is a file in it.

    Args:
        root: the folder, made when something is written; found again from any working directory.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()

    def __repr__(self) -> str:
        return f"LocalStore({str(self.root)!r})"

    def get(self, key: str) -> bytes:  # noqa: D102
        with open(self._file(key), "rb") as file:
            return file.read()

    def put(self, contents: Mapping[str, bytes]) -> None:  # noqa: D102
        self._in_folders(write_files, contents)

    def put_if_absent(self, contents: Mapping[str, bytes]) -> set[str]:  # noqa: D102
        there = {key for key in contents if os.path.lexists(self._file(key))}  # saves the writing
        absent = {key: content for key, content in contents.items() if key not in there}
        return there | {self._key(path) for path in self._in_folders(write_new_files, absent)}

    def copy(self, sources: Mapping[str, str]) -> None:  # noqa: D102
        self._in_folders(copy_files, {key: Path(self._file(source)) for key, source in sources.items()})

    def keys(self, prefix: str = "") -> Iterable[str]:  # noqa: D102
        return self._walk(prefix)

    def delete(self, key: str) -> None:  # noqa: D102
        path = Path(self._file(key))
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
        for folder in path.parents[: len(key.split("/")) - 1]:
            try:
                folder.rmdir()
            except OSError:  # it holds something
                return

    def sweep(self, prefix: str) -> None:  # noqa: D102
        for folder, _, _ in os.walk(self._file(prefix), topdown=False):
            with contextlib.suppress(OSError):  # it holds something
                os.rmdir(folder)

    def stat(self, key: str) -> ObjectInfo | None:  # noqa: D102
        try:
            status = os.stat(self._file(key))
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        return ObjectInfo(status.st_size, f"{status.st_ino}-{status.st_mtime_ns}-{status.st_ctime_ns}-{status.st_size}")

    def location(self, key: str = "") -> str:  # noqa: D102
        return f"{self.root}{os.sep}{key}" if key else str(self.root)

    @property
    def folder(self) -> Path:  # noqa: D102
        return self.root

    def above(self) -> Iterable[Store]:  # noqa: D102
        return map(LocalStore, self.root.resolve().parents)

    def _file(self, key: str) -> str:
        """The file of a key, by strings: a bank asks for thousands, and path objects would take most of the time.

        Raises:
            BankError: the way there leads over a link.
        """
        path = str(self.root)
        for part in checked_key(key).split("/"):
            path = f"{path}{os.sep}{part}"
            if os.path.islink(path):
                raise _link(path)
        return path

    def _key(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _in_folders(self, write: Callable[[Mapping[Path, _T]], _R], contents: Mapping[str, _T]) -> _R:
        """Write files, their folders being made where they are missing."""
        paths = {Path(self._file(key)): content for key, content in contents.items()}
        for tries_left in reversed(range(_TRIES)):
            try:
                make_folders({path.parent for path in paths})
                return write(paths)
            except FileNotFoundError:  # another process emptied a folder just now, and removed it
                if not tries_left:
                    raise
        raise AssertionError("unreachable")

    def _walk(self, prefix: str) -> Iterator[str]:
        try:
            entries = list(os.scandir(self._file(prefix) if prefix else self.root))
        except (FileNotFoundError, NotADirectoryError):
            return
        except PermissionError:
            if prefix != _FITS:
                raise
            return
        for entry in entries:
            if entry.is_symlink():
                raise _link(entry.path)
            key = f"{prefix}/{entry.name}" if prefix else entry.name
            if entry.is_dir():
                yield from self._walk(key)
            else:
                yield key


def _link(path: str) -> BankError:
    return BankError(f"{path} is a link, and a bank must not hold any: put there what it leads to, or remove it")
