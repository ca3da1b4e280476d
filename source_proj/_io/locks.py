"""Locks that end with their process: one on a folder, which no stale lock is ever in the way of, one among threads."""

from __future__ import annotations

import os
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakSet

from source_proj._errors import MismatchError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = ["FolderLock", "ThreadLock", "locked"]

_WAIT = 60.0  # seconds; what is done under a lock that is waited for takes milliseconds

_HELD: WeakSet[FolderLock] = WeakSet()


class FolderLock:
    """One holder at a time, among all processes of a machine, and within one.

    The operating system keeps the lock on an open file, and gives it back when the process ends. The file itself stays.

    Args:
        folder: the folder, which must be there.
        name: name of the file in it.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / name
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def acquire(self) -> bool:
        """Take the lock, and say whether it is held; True also where the file system knows no locks.

        Raises:
            MismatchError: something else than a file has its name.
            OSError: it cannot be made.
        """
        if self.held:
            return True
        if os.path.lexists(self._path) and not stat.S_ISREG(os.lstat(self._path).st_mode):
            raise MismatchError(f"{str(self._path)!r} must be an empty file, and is none: remove it")
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        if not _locked(descriptor):
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        _HELD.add(self)
        return True

    def release(self) -> None:
        """Give it back, if it is held."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def locked(folder: Path, name: str, *, wait: float = _WAIT) -> Iterator[None]:
    """Hold the lock of a folder, once whoever holds it has given it back.

    Args:
        folder: the folder, which must be there.
        name: name of the lock's file in it.
        wait: seconds, at most.

    Raises:
        MismatchError: something else than a file has its name.
        OSError: it cannot be made.
        TimeoutError: another process has held it all the time.
    """
    lock, until = FolderLock(folder, name), time.monotonic() + wait
    while not lock.acquire():
        if time.monotonic() > until:
            raise TimeoutError(f"another process has held {folder / name} for {wait:g} s: wait for it, or end it")
        time.sleep(0.01)
    try:
        yield
    finally:
        lock.release()


def _locked(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _forget() -> None:
    """In a forked child: the lock is the parent's, and must not outlive it."""
    for lock in list(_HELD):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


class ThreadLock:
    """A lock among the threads of a process, which a thread may take again; a copy, and another process, has its own.

    Example:
        >>> import copy
        >>> lock = ThreadLock()
        >>> with lock, lock, copy.deepcopy(lock):
        ...     pass
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[ThreadLock], tuple[()]]:
        return ThreadLock, ()
