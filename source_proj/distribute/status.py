"""How far a build has come, from any process: of the rows themselves nothing is read."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from source_proj.bank import Bank
from source_proj.bank.build.claims import Heartbeat, heartbeats

__all__ = ["Status", "WorkerStatus", "status"]


@dataclass(frozen=True)
class WorkerStatus:
    """A worker that has not ended in order.

    Attributes:
        host: name of its machine.
        pid: number of its process there.
        shard: (i, n) of its own share.
        rows: rows that it made.
        rate: rows a second since it began.
        silent: seconds since its last heartbeat.
        dead: whether its process is gone, or it was silent for longer than its ``takeover``: others make its shards.
    """

    host: str
    pid: int
    shard: tuple[int, int]
    rows: int
    rate: float
    silent: float
    dead: bool


@dataclass(frozen=True)
class Status:
    """How far a build has come; a row counts once for every checkpoint.

    Attributes:
        path: the bank.
        rows_done: rows of committed shards.
        rows: all rows.
        finalized: whether the bank is whole.
        workers: those at work with ``takeover=``, and the dead ones; of others nothing is known.
    """

    path: str
    rows_done: int
    rows: int
    finalized: bool
    workers: Sequence[WorkerStatus]

    @property
    def rate(self) -> float:
        """Rows a second of all living workers together."""
        return sum(worker.rate for worker in self.workers if not worker.dead)

    @property
    def seconds_left(self) -> float | None:
        """Time until all rows are there at this rate; None where nobody is known to work."""
        return (self.rows - self.rows_done) / self.rate if self.rate else None

    @property
    def dead(self) -> list[WorkerStatus]:
        """The workers that died."""
        return [worker for worker in self.workers if worker.dead]


def status(path: str | Path) -> Status:
    """Say how far the build of a bank has come: reads its metadata, lists its commit marks, reads the heartbeats.

    Ages of heartbeats are told by the clocks of this machine and the workers', which should agree to some seconds.

    Args:
        path: the bank.

    Raises:
        BankError: there is none yet, or it cannot be read.
    """
    bank = Bank(path)
    done = total = 0
    for part in bank.parts:
        total += part.spec.n * part.n_checkpoints
        for checkpoint in range(part.n_checkpoints):
            spans = map(part.spec.span, part.committed(checkpoint))
            done += sum(stop - start for start, stop in spans)
    beats = heartbeats(bank.store)
    now = max([time.time(), *(beat.time for beat in beats)])
    workers = sorted((_worker(beat, now) for beat in beats), key=lambda worker: (worker.dead, worker.shard))
    return Status(str(bank.path), done, total, bank.finalized, workers)


def _worker(beat: Heartbeat, now: float) -> WorkerStatus:
    silent = now - beat.time
    rate = beat.rows / max(beat.time - beat.started, 1e-3)
    dead = beat.ended or silent > beat.takeover
    return WorkerStatus(beat.host, beat.pid, beat.shard, beat.rows, rate, silent, dead)
