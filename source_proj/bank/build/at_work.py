"""Who builds a bank at this moment, so that what was begun and holds no row gives way to the next build.

A build that fails in its first batches, of labels out of range say, leaves a bank of no rows. The corrected one begins
anew, unless another process is at work there. All builds and appends of a bank share the lock of one file in it, which
the operating system takes back from a process that dies; who gets it alone knows that it is alone. A file is locked and
not the folder, because network file systems share the locks of files only. Where there are no locks (buckets, some
file systems) nothing is ever removed. Workers with heartbeats count as at work, too, for as long as these are there.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from source_proj._errors import BankError
from source_proj._io.files import PARTIAL
from source_proj.bank.build.claims import heartbeats
from source_proj.bank.format import FORMAT, VERSION
from source_proj.bank.store import Store

if sys.platform != "win32":
    import fcntl

__all__ = ["AT_WORK", "AtWork", "at_work", "is_bank", "is_sealed", "sweep_builders"]

AT_WORK = f"stage_0/part_0/ids/build{PARTIAL}"  # zarr warns of what lies in a group and is none, not in an array

_WAIT = 60.0  # seconds until others may share, who remove what was begun; it takes milliseconds
_TRIES = 20  # each needs another process that ends in the same instant
_FILE = r"(zarr\.json|c(\.\d+)+)"
_OWN = re.compile(
    rf"zarr\.json|stage_\d+/(part_\d+/((ids|seal|checkpoint_\d+(/[^/]+)?)/)?)?{_FILE}"
    rf"|(weights|metrics|curvature)/(zarr\.json|[0-9a-f]{{64}}/(.+/)?{_FILE})"
)
_DONE = re.compile(r"stage_\d+/part_\d+/(checkpoint_\d+/committed|seal)/c\.")


class AtWork:
    """One build's or append's share of the lock; see :func:`at_work`.

    Args:
        store: where the bank lies.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._descriptor: int | None = None
        self._alone = False
        self._made: list[Path] = []  # folders to remove if they stay empty, innermost first

    def remove_begun(self) -> None:
        """Remove a bank, or the beginning of one, that has no row, if nobody else is at work on it.

        Raises:
            OSError: it cannot be removed.
        """
        try:
            keys = self._store.list() if self._alone else []
        except BankError:  # a link, which is no bank's
            return
        own = [key for key in keys if _OWN.fullmatch(key)]
        whole = is_bank(self._store) if "zarr.json" in keys else len(own) == len(keys)
        if own and whole and not self._has_rows(keys):
            nodes = ("stage_", "weights/", "metrics/", "curvature/", "claims/")
            self._remove([key for key in self._store.leftovers() if key.startswith(nodes) and key != AT_WORK])
            self._remove([key for key in own if key != "zarr.json"])
            self._remove(["zarr.json"])  # last: killed before, it is still a bank without rows

    def remove_part(self, name: str) -> bool:
        """Remove a part of a bank, or the beginning of one, if it has no row and nobody else is at work on the bank.

        Args:
            name: its node.

        Returns:
            Whether it was removed.

        Raises:
            OSError: it cannot be removed.
        """
        if not self._alone or self._has_rows(keys := self._store.list(name)):
            return False
        # What was staged goes first: a writer that was chosen would be taken for one of the next part. The group goes
        # before the rest: without it the bank is whole, and has a part less.
        self._remove([*self._store.leftovers(name), *self._store.leftovers(f"claims/{name}")])
        self._remove([f"{name}/zarr.json"])
        self._remove([key for key in keys if key != f"{name}/zarr.json"])
        return True

    def share(self) -> None:
        """Let others work on the bank, too, from now on."""
        if self._descriptor is not None and self._alone:
            self._alone = False
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def _has_rows(self, keys: Sequence[str]) -> bool:
        """Whether a shard is done, or some worker may be about to."""
        return any(map(_DONE.match, keys)) or any(not each.ended for each in heartbeats(self._store))

    def _remove(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._store.delete(key)

    def begin(self) -> None:
        """Take the lock, alone if nobody else has it.

        Raises:
            BankError: another process was stopped while it removed what was begun.
        """
        folder = self._store.folder
        if folder is None or sys.platform == "win32":
            return
        file = folder / AT_WORK
        outer = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
        self._made = [*file.parents[: len(Path(AT_WORK).parents) - 1], *outer]
        for _ in range(_TRIES):
            with suppress(OSError):  # no folder can be there, or none that can be written, or there are no locks
                file.parent.mkdir(parents=True, exist_ok=True)
                if self._taken(file):
                    return

    def end(self) -> None:
        """Give it back; the last one removes the file, and the folders if nothing came into them."""
        folder, descriptor, self._descriptor = self._store.folder, self._descriptor, None
        if folder is None or descriptor is None:
            return
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (folder / AT_WORK).unlink()
            for each in self._made:
                each.rmdir()
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # or else forked children would keep it
        os.close(descriptor)

    def _taken(self, file: Path) -> bool:
        """Lock the file, unless it was removed before that: then others lock another one."""
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            alone = _locked(descriptor, fcntl.LOCK_EX)
            if not alone and not _locked(descriptor, fcntl.LOCK_SH, _WAIT):
                raise BankError(
                    f"another process has been about to replace the bank {self._store.location()} for {_WAIT:g} s: "
                    "end it, then call this again"
                )
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                self._alone, self._descriptor = alone, descriptor
        finally:
            if self._descriptor is None:
                os.close(descriptor)
        return self._descriptor is not None


@contextmanager
def at_work(store: Store, *, leads: bool = True) -> Iterator[AtWork]:
    """Hold a bank's lock while it is built or appended to.

    Args:
        store: where the bank lies.
        leads: whether this is the process that writes; others hold none.
    """
    work = AtWork(store)
    if leads:
        work.begin()
    try:
        yield work
    finally:
        work.end()


def sweep_builders(store: Store) -> None:
    """Remove what killed builders of a complete bank left of their claims, and their lock."""
    store.sweep("claims")
    if store.leftovers(AT_WORK.rpartition("/")[0]):
        with at_work(store):  # its end removes the file, unless others have it
            pass


def is_sealed(store: Store) -> bool:
    """Whether the first part of a bank is complete, as far as can be told: no build will remove it."""
    try:
        return any(map(_DONE.match, store.list("stage_0/part_0/seal")))
    except (OSError, BankError):
        return False


def _locked(descriptor: int, kind: int, wait: float = 0.0) -> bool:
    """Take a lock, and say whether it was had within some seconds."""
    until = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.02)
        else:
            return True


def is_bank(store: Store) -> bool:
    """Whether a store's root is a bank's of this version."""
    try:
        attributes = json.loads(store.get("zarr.json"))["attributes"]
        return bool((attributes["format"], attributes["version"]) == (FORMAT, VERSION))
    except (OSError, ValueError, TypeError, KeyError):
        return False
