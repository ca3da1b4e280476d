"""A folder of the file system as a store."""

import contextlib
import os
import stat
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from source_proj._errors import BankError
from source_proj._io.files import PARTIAL, make_folders, write_files, write_new_files
from source_proj.bank.store.base import ObjectInfo, Store

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = ["LocalStore"]

_RETRY = 0.01  # seconds between two attempts at a lock
_LOCKED_BYTE = 1 << 30  # Windows refuses to read locked bytes: one behind the end of every object that is locked


class LocalStore(Store):
    """A folder; an object is a file in it.

    Args:
        root: the folder, made when something is written; from then on it may be reached from any working directory.
        patience: seconds to wait for another writer.
    """

    def __init__(self, root: str | Path, patience: float = 60.0) -> None:
        self.root = Path(root).absolute()
        self._patience = patience

    def __repr__(self) -> str:
        return f"LocalStore({str(self.root)!r})"

    def get(self, key: str) -> bytes:  # noqa: D102
        return self._path(key).read_bytes()

    def put(self, contents: Mapping[str, bytes]) -> None:  # noqa: D102
        write_files(self._with_folders(contents))

    def put_if_absent(self, contents: Mapping[str, bytes]) -> set[str]:  # noqa: D102
        there = {key for key in contents if os.path.lexists(self._path(key))}  # saves the writing
        paths = self._with_folders({key: content for key, content in contents.items() if key not in there})
        return there | {self._key(path) for path in write_new_files(paths)}

    def list(self, prefix: str = "") -> Sequence[str]:  # noqa: D102
        return sorted(key for key in self._walk(prefix) if not key.endswith(PARTIAL))

    def leftovers(self, prefix: str = "") -> Sequence[str]:  # noqa: D102
        return sorted(key for key in self._walk(prefix) if key.endswith(PARTIAL))

    def delete(self, key: str) -> None:  # noqa: D102
        path = self._path(key)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
        for folder in path.parents[: len(key.split("/")) - 1]:
            try:
                folder.rmdir()
            except OSError:  # it holds something
                return

    def stat(self, key: str) -> ObjectInfo | None:  # noqa: D102
        try:
            status = os.stat(self._path(key))
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        return ObjectInfo(status.st_size, f"{status.st_ino}-{status.st_mtime_ns}-{status.st_ctime_ns}-{status.st_size}")

    @contextlib.contextmanager
    def exclusive(self, key: str) -> Iterator[bool]:  # noqa: D102
        descriptor = os.open(self._path(key), os.O_RDWR)
        try:
            held = self._lock(descriptor, key)
            try:
                yield held
            finally:
                if held:
                    _unlock(descriptor)  # by name, as processes that were forked meanwhile share the descriptor
        finally:
            os.close(descriptor)

    def location(self, key: str = "") -> str:  # noqa: D102
        return str(self.root / key)

    def _lock(self, descriptor: int, key: str) -> bool:
        until = time.monotonic() + self._patience
        while True:
            try:
                _try_lock(descriptor)
            except (BlockingIOError, PermissionError):
                if time.monotonic() > until:
                    raise BankError(
                        f"another process has been writing beside {self.location(key)} for {self._patience:g} s: let "
                        "it go on or end it, then try again"
                    ) from None
                time.sleep(_RETRY)
            except OSError:  # no locks on this file system
                return False
            else:
                return True

    def _path(self, key: str) -> Path:
        """The file of a key.

        Raises:
            BankError: the way there leads over a link.
        """
        parts = key.split("/")
        if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
            raise ValueError(f"{key!r} is no key: it must be names joined by '/'")
        path = self.root
        for part in parts:
            path = path / part
            if path.is_symlink():
                raise _link(path)
        return path

    def _key(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _with_folders(self, contents: Mapping[str, bytes]) -> dict[Path, bytes]:
        paths = {self._path(key): content for key, content in contents.items()}
        make_folders({path.parent for path in paths})
        return paths

    def _walk(self, prefix: str) -> Iterator[str]:
        folder = self._path(prefix) if prefix else self.root
        try:
            entries = list(os.scandir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            if entry.is_symlink():
                raise _link(Path(entry.path))
            key = f"{prefix}/{entry.name}" if prefix else entry.name
            if entry.is_dir():
                yield from self._walk(key)
            else:
                yield key


def _link(path: Path) -> BankError:
    return BankError(f"{path} is a link, and a bank must not hold any: put there what it leads to, or remove it")


def _try_lock(descriptor: int) -> None:
    """Lock an open file.

    Raises:
        BlockingIOError, PermissionError: another one has.
        OSError: the file system has no locks.
    """
    if sys.platform == "win32":
        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _unlock(descriptor: int) -> None:
    if sys.platform == "win32":
        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)
    else:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
