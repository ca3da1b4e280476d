"""The builder's loop: batches to gradients to rows to committed shards."""

import operator
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from source_proj._errors import MismatchError
from source_proj._io.progress import Bar, Progress, progress_bar
from source_proj.bank.build.batch_hash import batch_hash
from source_proj.bank.build.claims import Claims
from source_proj.bank.build.data import Batch, BatchSource
from source_proj.bank.build.first_data import FirstData, NotFirstError
from source_proj.bank.build.rounds import loaded_in_rounds
from source_proj.bank.build.row_encoder import BatchLocation, RowEncoder
from source_proj.bank.format import Settings
from source_proj.bank.read.metrics import Metrics
from source_proj.bank.read.part import OtherDataError, Part
from source_proj.gradients import ParameterSpace, Refuted
from source_proj.task import Task
from source_proj.trajectory import Checkpoint
from source_proj.trajectory.placement import Lockstep, placement_of

__all__ = ["Work", "checked_shard", "fill"]


@dataclass(frozen=True)
class Work:
    """A part to fill.

    Attributes:
        stage: index of its stage.
        part: the part.
        source: its examples.
        checkpoints: the checkpoints of its stage.
    """

    stage: int
    part: Part
    source: BatchSource
    checkpoints: Sequence[Checkpoint]


@dataclass(frozen=True)
class _Pass:
    """One worker's shards of one part, the work-th of all, at one checkpoint."""

    work: int
    checkpoint: int
    todo: list[int]
    done: list[int]


def checked_shard(shard: tuple[int, int] | None) -> tuple[int, int]:
    """Return (i, n) as given, (0, 1) for None.

    Raises:
        ValueError: it is no (i, n) with 0 ≤ i < n.
    """
    if shard is None:
        return 0, 1
    try:
        index, count = map(operator.index, shard)
    except (TypeError, ValueError):
        raise ValueError(f"shard must be (i, n), the i-th of n workers from 0, got {shard!r}") from None
    if not 0 <= index < count:
        raise ValueError(f"shard must be (i, n) with 0 <= i < n, got {shard!r}")
    return index, count


def fill(
    works: Sequence[Work],
    settings: Settings,
    model: nn.Module,
    task: Task,
    metrics: Metrics,
    *,
    shard: tuple[int, int] | None,
    device: torch.device | str | None,
    progress: Progress,
    claims: Claims | None = None,
) -> None:
    """Compute and commit all shards of a worker that are not committed yet.

    All shards of all checkpoints are numbered through, and worker i of n takes those with number % n = i. The data of
    its shards that are committed already are compared with their hashes, each batch once: before anything is committed
    of a shard that no checkpoint has. Where it has none yet, one of the others' is compared.

    With claims, a shard of which another worker is at work is left out, and after its own share a worker makes whatever
    nobody who lives has claimed, the last shards first, until all shards are committed.

    The processes of a sharded model are one worker: the first of them decides what is made, and they make it together.

    Raises:
        GradientError: a gradient is not finite; names the stage, the checkpoint and the ids. Nothing of its shard is
            committed.
        MismatchError: the data differ from those of another checkpoint, or a checkpoint changed.
        BankError: a shard cannot be written.
    """
    worker = checked_shard(shard)
    space = ParameterSpace.from_spec(settings.parameters)
    space.parameters(model)  # refuses another model
    lockstep = placement_of(model).lockstep
    first_data = FirstData()
    try:
        lockstep.from_leader(lambda: _say_data(works, first_data))
        done = [np.stack([work.part.done(c) for c in range(work.part.n_checkpoints)]) for work in works]
        passes = list(_passes(works, done, *worker))
        checks = _checks(works, done, passes)
        total = sum(_rows(works[run.work].part, run.todo) for run in passes)
        total += sum(_rows(work.part, shards) for work, shards in checks)
        with progress_bar(progress if lockstep.leads else False, "bank", total, "rows") as bar:
            lockstep.from_leader(lambda: _check_committed(checks, bar))
            rest = iter(()) if claims is None else _rest(works, claims)
            to_come = lockstep.followed(chain((run for run in passes if run.todo), rest))
            first = next(to_come, None)
            if first is None:
                return
            rows = RowEncoder(model, task, space, settings, device, metrics)
            with _Committer(claims, first_data) as committer:
                for run in chain([first], to_come):
                    _run(run, works[run.work], rows, committer, bar, claims, lockstep)
            lockstep.barrier()  # all are committed
    finally:
        for work in works:
            first_data.take_back(work.part)


def _say_data(works: Sequence[Work], first_data: FirstData) -> None:
    for work in works:
        first_data.say(work.part, work.source)


def _passes(works: Sequence[Work], done: Sequence[np.ndarray], index: int, count: int) -> Iterator[_Pass]:
    """One worker's passes, by what is committed of each work, ``(checkpoints, shards)`` bool."""
    number = 0
    for place, work in enumerate(works):
        for checkpoint in range(work.part.n_checkpoints):
            shards = range(work.part.spec.n_shards)
            mine = [shard for shard in shards if (number + shard) % count == index]
            number += len(shards)
            committed = done[place][checkpoint]
            todo = [shard for shard in mine if not committed[shard]]
            yield _Pass(place, checkpoint, todo, [shard for shard in mine if committed[shard]])


def _rest(works: Sequence[Work], claims: Claims) -> Iterator[_Pass]:
    """Passes over what others have not committed, until there is nothing left; waits while others are at work."""
    while True:
        passes = [
            _Pass(place, checkpoint, todo, [])
            for place, work in reversed(list(enumerate(works)))
            for checkpoint in reversed(range(work.part.n_checkpoints))
            if (todo := _uncommitted(work.part, checkpoint))
        ]
        if not passes:
            return
        before = claims.taken
        yield from passes
        if claims.taken == before:
            claims.wait()


def _uncommitted(part: Part, checkpoint: int) -> list[int]:
    """The last ones first: whoever has them in its own share comes to them last."""
    committed = set(part.committed(checkpoint))
    return [shard for shard in reversed(range(part.spec.n_shards)) if shard not in committed]


def _rows(part: Part, shards: Sequence[int]) -> int:
    return sum(stop - start for start, stop in map(part.spec.span, shards))


def _checks(works: Sequence[Work], done: Sequence[np.ndarray], passes: Sequence[_Pass]) -> list[tuple[Work, list[int]]]:
    """Committed shards whose data no pass to come compares before it commits a shard that no checkpoint has.

    Of wrong data, such a shard would stay: the right ones could never finish the part.
    """
    checks = []
    for place, work in enumerate(works):
        own = [run for run in passes if run.work == place]
        coming = {shard for run in own for shard in run.todo}
        compared = {shard for run in own for shard in run.done}
        there = set(np.flatnonzero(done[place].any(axis=0)).tolist())
        if coming <= there:  # each is compared when it is made
            compared -= coming
        elif there and not compared:
            compared = {min(there)}
        checks.append((work, sorted(compared)))
    return checks


def _check_committed(checks: Sequence[tuple[Work, list[int]]], bar: Bar) -> None:
    """Compare the data of committed shards with the hashes that were banked."""
    bar.describe("bank, comparing data")
    for work, shards in checks:
        for shard in shards:
            hashes = []
            for start, stop, batch in work.source.load([work.part.spec.span(shard)]):
                hashes.append(batch_hash(batch))
                bar.update(stop - start)
            try:
                work.part.check_data(shard, _as_array(hashes))
            except OtherDataError as error:
                raise NotFirstError(*error.args) from error


def _run(
    run: _Pass,
    work: Work,
    rows: RowEncoder,
    committer: "_Committer",
    bar: Bar,
    claims: Claims | None,
    lockstep: Lockstep,
) -> None:
    part, checkpoint = work.part, work.checkpoints[run.checkpoint]
    todo = iter(run.todo) if claims is None else claims.take(part, run.checkpoint, run.todo)
    first = lockstep.from_leader(lambda: next(todo, None))
    if first is None:
        return
    lockstep.from_leader(lambda: _require_unchanged(part, run.checkpoint, checkpoint))
    bar.describe(f"bank, {part.stage_name}, step {checkpoint.step}")
    rows.load(checkpoint)
    buffer = committer.buffer(part, run.checkpoint)
    for loaded in loaded_in_rounds(work.source, part.spec, chain([first], todo), lockstep):
        start, stop = loaded.start, loaded.stop
        shard = start // part.spec.shard_rows
        begin, end = part.spec.span(shard)
        place = BatchLocation(part, work.stage, run.checkpoint, start, stop)
        if not loaded.kept:  # a pass that others need
            rows(place, loaded.batch)
            continue
        if start == begin:
            rows.begin(work.stage, run.checkpoint, shard)
        try:
            _put(place, rows, buffer, loaded.batch)
        except Refuted:  # the rows of this shard, none of which is committed, are made again by the general path
            buffer.clear()
            for again, until, earlier in work.source.load([(begin, stop)]):
                _put(replace(place, start=again, stop=until), rows, buffer, earlier)
        bar.expect(bar.done + loaded.rows)  # those of another worker's share come on top of what was to do
        bar.update(loaded.rows)
        if claims is not None:
            claims.beat(loaded.rows)
        if stop == end:
            rows.require_graph(place)
            buffer.audit = rows.audit()
            committer.commit(part, run.checkpoint, shard, buffer)
            buffer = committer.buffer(part, run.checkpoint)
    committer.wait()


def _require_unchanged(part: Part, index: int, checkpoint: Checkpoint) -> None:
    expected = part.hashes[index]
    if checkpoint.hash() != expected:
        raise MismatchError(
            f"{checkpoint!r} of stage {part.stage_name!r} changed since the bank was begun: its hash was "
            f"{expected[:16]}, and is {checkpoint.hash()[:16]}; put the original back"
        )


def _put(place: BatchLocation, rows: RowEncoder, buffer: "_Buffer", batch: Batch) -> None:
    """Make a batch's rows and put them into the buffer of their shard."""
    buffer.put(place.start % place.part.spec.shard_rows, rows(place, batch), batch_hash(batch))


@dataclass
class _Buffer:
    """The arrays of one shard while it is made."""

    part: Part
    checkpoint: int
    arrays: dict[str, np.ndarray]
    filled: int = 0
    hashes: list[bytes] = field(default_factory=list)
    audit: np.ndarray | None = None

    def clear(self) -> None:
        """Begin again."""
        self.filled, self.hashes = 0, []

    def put(self, start: int, encoded: dict[str, Tensor], digest: bytes) -> None:
        for name, values in encoded.items():
            # Sampled-Fisher arrays have several entries a row.
            factor = self.part.data(self.checkpoint)[name].height // self.part.spec.shard_rows
            torch.from_numpy(self.arrays[name])[start * factor : start * factor + len(values)].copy_(values)
        self.filled = start + len(encoded["d1"])
        self.hashes.append(digest)

    def content(self) -> dict[str, np.ndarray]:
        spec = self.part.spec
        arrays = {
            name: array[: self.filled * (self.part.data(self.checkpoint)[name].height // spec.shard_rows)]
            for name, array in self.arrays.items()
        }
        assert self.audit is not None  # set with the last batch
        return {**arrays, "batch_hashes": _as_array(self.hashes), "audit": self.audit}


class _Committer:
    """Commits shards in a thread of its own, one after the other, while the next is made: flushing takes long."""

    def __init__(self, claims: Claims | None, first_data: FirstData) -> None:
        self._claims = claims
        self._first_data = first_data
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="bank")
        self._pending: Future[None] | None = None
        self._arrays: dict[tuple[int, tuple[str, ...]], list[dict[str, np.ndarray]]] = {}

    def __enter__(self) -> "_Committer":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)

    def buffer(self, part: Part, checkpoint: int) -> _Buffer:
        """An empty buffer: two take turns, because fresh memory is slow to get."""
        pair = self._arrays.setdefault((id(part), tuple(part.data(checkpoint))), [])
        if len(pair) < 2:
            pair.append(_allocated(part, checkpoint))
        else:
            pair.reverse()
        return _Buffer(part, checkpoint, pair[-1])

    def commit(self, part: Part, checkpoint: int, shard: int, buffer: _Buffer) -> None:
        """Wait for the shard before, then commit this one in the background."""
        self.wait()
        self._pending = self._thread.submit(self._commit, part, checkpoint, shard, buffer)

    def wait(self) -> None:
        """Wait for the last shard, and raise what went wrong with it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _commit(self, part: Part, checkpoint: int, shard: int, buffer: _Buffer) -> None:
        content: Mapping[str, np.ndarray] = buffer.content()
        part.check_hashes(checkpoint, shard, content["batch_hashes"])
        part.commit(checkpoint, shard, content)
        self._first_data.forget(part)
        if self._claims is not None:
            self._claims.release(part, checkpoint, shard)


def _allocated(part: Part, checkpoint: int) -> dict[str, np.ndarray]:
    return {
        name: np.empty((min(spec.height, spec.shape[0]), *spec.shape[1:]), spec.dtype)
        for name, spec in part.data(checkpoint).items()
        if name not in ("batch_hashes", "audit")
    }


def _as_array(hashes: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(hashes), np.uint8).reshape(len(hashes), 32)
