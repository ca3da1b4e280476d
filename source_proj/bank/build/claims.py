"""Who makes which shard, so that the shards of dead and slow workers are taken over by whoever is free.

Claims save work, and nothing else rests on them: of several commits of one shard the first stays (`Part.commit`), so
that two workers at one shard are harmless.

A claim is an object ``claims/<what>/<turn>.partial`` that names its owner, and is put if it is absent. An owner
rewrites its heartbeat, ``claims/workers/<owner>.partial``, as its work goes on. A claim is void once its owner's
heartbeat is gone, or has stayed the same for `takeover` seconds by the clock of the one who looks, who counts from the
first look: clocks of several machines need not agree. Then the next turn is free, and of several who want it one is
first. All of these names end as those of temporary objects do, so that readers ignore them and sealing removes them.
"""

import json
import os
import platform
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from source_proj._errors import BankError, write_remedy
from source_proj._io.files import PARTIAL
from source_proj._io.json_records import read_record, write_record
from source_proj.bank.read.part import Part
from source_proj.bank.store import Store

__all__ = ["Claims", "Heartbeat", "checked_takeover", "heartbeats"]

_WORKERS = "claims/workers"
_BEATS = 10  # in the time after which a worker counts as dead, if its batches are that quick
_SHORTEST_WAIT, _LONGEST_WAIT = 0.05, 15.0  # seconds between two looks at what others do, growing twofold
_TURN = re.compile(rf"\d+{re.escape(PARTIAL)}")
_OWNER = re.compile(rf"[0-9a-f]{{32}}{re.escape(PARTIAL)}")


@dataclass(frozen=True)
class Heartbeat:
    """What a worker says of itself.

    Attributes:
        owner: its name, another one for every process and build.
        host: name of its machine.
        machine: what processes share that see each other's numbers, such as a container; None where it cannot be told.
        pid: number of its process.
        shard: (i, n) of its own share.
        takeover: seconds without a new heartbeat after which its claims are void.
        started: when it began, in seconds since 1970 by its own clock.
        time: of this heartbeat, likewise.
        beats: heartbeats before this one.
        rows: rows that it made, one for every example and checkpoint.
    """

    owner: str
    host: str
    machine: str | None
    pid: int
    shard: tuple[int, int]
    takeover: float
    started: float
    time: float
    beats: int = 0
    rows: int = 0

    @property
    def ended(self) -> bool:
        """Whether this process sees that the worker's is gone; False where it cannot see it."""
        if self.machine is None or self.machine != _machine():
            return False
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):  # no process has so large a number
            return True
        except OSError:  # another user's
            return False
        return False


def heartbeats(store: Store) -> list[Heartbeat]:
    """The last heartbeats of all workers that have not ended in order.

    Raises:
        OSError: they cannot be read.
    """
    found = []
    for key in _named(store, _WORKERS, _OWNER):
        with suppress(FileNotFoundError, ValueError):  # it ended meanwhile; or a stranger's file
            found.append(_parsed(store.get(key)))
    return found


def checked_takeover(takeover: float | None) -> float | None:
    """Return it as given.

    Raises:
        ValueError: it is no positive number of seconds.
    """
    if takeover is None:
        return None
    if isinstance(takeover, bool) or not isinstance(takeover, int | float) or not 0 < takeover < float("inf"):
        raise ValueError(f"takeover must be a positive number of seconds, or None, got {takeover!r}")
    return float(takeover)


class Claims:
    """What one worker claims, while it is used as a context.

    Args:
        store: where the bank lies.
        takeover: seconds after which a worker without a new heartbeat counts as dead.
        shard: (i, n) of the worker's own share, for people.

    Attributes:
        taken: shards that were claimed so far.
    """

    def __init__(self, store: Store, takeover: float, shard: tuple[int, int]) -> None:
        now = time.time()
        self.taken = 0
        self._wait = _SHORTEST_WAIT
        self._store = store
        self._takeover = takeover
        self._own = Heartbeat(
            uuid.uuid4().hex, platform.node(), _machine(), os.getpid(), shard, takeover, started=now, time=now
        )
        self._last_beat = 0.0
        self._seen: dict[str, tuple[bytes, float]] = {}  # each other worker's last heartbeat, and when it was new

    def __enter__(self) -> "Claims":
        with self._errors_named():
            self._put_heartbeat()
        return self

    def __exit__(self, *_: object) -> None:
        # What it still claims is free from now on. If this fails, it is after `takeover` seconds.
        with suppress(OSError):
            self._store.delete(_heartbeat_key(self._own.owner))

    def beat(self, rows: int) -> None:
        """Show that the work goes on.

        Args:
            rows: rows that were made since the last call.
        """
        self._own = replace(self._own, rows=self._own.rows + rows)
        if time.monotonic() - self._last_beat > self._takeover / _BEATS:
            with self._errors_named():
                self._put_heartbeat()

    def take(self, part: Part, checkpoint: int, shards: Iterable[int]) -> Iterator[int]:
        """Claim shards one after the other, each when it is asked for, and yield those that were had.

        Raises:
            BankError: claims cannot be written.
        """
        for shard in shards:
            if self._claim(_shard_name(part, checkpoint, shard), partial(part.is_done, checkpoint, shard)):
                self.taken, self._wait = self.taken + 1, _SHORTEST_WAIT
                yield shard

    def release(self, part: Part, checkpoint: int, shard: int) -> None:
        """Remove all claims on a shard that is committed."""
        with suppress(OSError):  # sealing removes what is left
            for key in self._store.leftovers(_shard_name(part, checkpoint, shard)):
                self._store.delete(key)

    def once(self, name: str, work: Callable[[], object], done: Callable[[], bool]) -> None:
        """Let one worker do something, and wait until it is done; if that one dies, another does it.

        Args:
            name: of the claim.
            work: what to do; harmless if done twice.
            done: whether it is done.
        """
        while not done():
            if self._claim(f"claims/{name}", done):
                work()
            else:
                self.wait()

    def wait(self) -> None:
        """Give others time, more of it each time until a shard is had again."""
        time.sleep(self._wait)
        self._wait = min(2 * self._wait, _LONGEST_WAIT)

    def _claim(self, name: str, done: Callable[[], bool]) -> bool:
        """Claim something, unless it is done or a living worker has it."""
        turn = 0
        with self._errors_named():
            while not done() and self._store.put_if_absent({_turn_key(name, turn): self._own.owner.encode()}):
                turns = [int(key.rpartition("/")[2].removesuffix(PARTIAL)) for key in _named(self._store, name, _TURN)]
                if not turns:
                    return False  # it is done, and its claims were removed
                turn = max(turns)
                if self._is_alive(_turn_key(name, turn)):
                    return False
                turn += 1
            if not done():
                self.beat(0)
                return True
            with suppress(OSError):
                for key in self._store.leftovers(name):
                    self._store.delete(key)
            return False

    def _is_alive(self, claim: str) -> bool:
        """Whether the owner of a claim is at work."""
        try:
            owner = self._store.get(claim).decode()
            content = self._store.get(_heartbeat_key(owner))
            heartbeat = _parsed(content)
        except FileNotFoundError:  # it ended, or gave the claim back
            return False
        except ValueError:
            return False
        now = time.monotonic()
        before = self._seen.get(owner)
        if before is None or before[0] != content:
            self._seen[owner] = content, now
            return not heartbeat.ended
        return now - before[1] < self._takeover and not heartbeat.ended

    def _put_heartbeat(self) -> None:
        self._last_beat = time.monotonic()
        self._own = replace(self._own, time=time.time(), beats=self._own.beats + 1)
        content = json.dumps(write_record(self._own)).encode()
        self._store.put({_heartbeat_key(self._own.owner): content})

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise BankError(
                f"cannot claim shards of the bank {self._store.location()}: {error}. What was committed is whole: "
                f"{write_remedy(error)} and call build again to go on from there"
            ) from error


def _parsed(content: bytes) -> Heartbeat:
    return read_record(Heartbeat, json.loads(content), "heartbeat")


def _shard_name(part: Part, checkpoint: int, shard: int) -> str:
    return f"claims/{part.name}/checkpoint_{checkpoint}/{shard}"


def _heartbeat_key(owner: str) -> str:
    return f"{_WORKERS}/{owner}{PARTIAL}"


def _turn_key(name: str, turn: int) -> str:
    return f"{name}/{turn}{PARTIAL}"


def _named(store: Store, prefix: str, names: re.Pattern[str]) -> list[str]:
    """Keys of whole objects: a local store's own temporary files have longer names."""
    return [key for key in store.leftovers(prefix) if names.fullmatch(key.rpartition("/")[2])]


def _machine() -> str | None:
    """What all processes share that see each other's numbers; None where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return None
