"""Rows that are added to a finished bank, as a part of their own."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from source_proj._errors import BankError, MismatchError, write_remedy
from source_proj._io.progress import Progress
from source_proj.bank.build.arguments import require_arguments, require_device
from source_proj.bank.build.at_work import AtWork, at_work
from source_proj.bank.build.batch_hash import batch_hash
from source_proj.bank.build.columns import arranged
from source_proj.bank.build.create import part_difference, put_same
from source_proj.bank.build.data import BatchSource, checked_ids
from source_proj.bank.build.fill import Work, checked_shard, fill
from source_proj.bank.build.first_data import NotFirstError
from source_proj.bank.format import Settings
from source_proj.bank.layout import PartSpec, default_shard_rows
from source_proj.bank.notes import Notes
from source_proj.bank.read.metrics import Metrics
from source_proj.bank.read.part import OtherDataError, Part, listed, part_name, part_objects
from source_proj.bank.store import Store
from source_proj.sketch import plain_modes
from source_proj.task import Task
from source_proj.trajectory import Checkpoint
from source_proj.trajectory.placement import placement_of, unwrapped

__all__ = ["append_rows"]


def append_rows(
    store: Store,
    settings: Settings,
    model: nn.Module,
    task: Task,
    metrics: Metrics,
    train_set: Any,
    *,
    notes: Notes,
    stage: int,
    parts: Sequence[Part],
    checkpoint: Callable[[int, int], Checkpoint],
    ids: Sequence[Any] | None,
    batch_size: int,
    device: torch.device | str | None,
    shard: tuple[int, int] | None,
    shard_rows: int | None,
    progress: Progress,
) -> Part:
    """Create the next part of a stage and fill it, or go on with the one that this append made; see ``Bank.append``.

    Args:
        store: where the bank lies.
        settings: its settings.
        model: a module of the bank's architecture.
        task: the bank's task.
        metrics: its metrics.
        train_set: the new examples.
        notes: the bank's.
        stage: index of the stage.
        parts: the stage's parts.
        checkpoint: gives a checkpoint of (stage, index).
        ids: ids of the new examples.
        batch_size: examples a batch.
        device: where the model runs.
        shard: a worker's share.
        shard_rows: rows a shard.
        progress: show a progress bar.

    Returns:
        The part: a sealed one, if the examples were there already.
    """
    model = unwrapped(model)
    require_arguments(model=model, task=task)
    require_device(device)
    checked_shard(shard)
    notes.warn_of_other_modules(model)
    notes.warn_of_other_code(task)
    notes.require_base(model, (checkpoint(stage, i) for i in range(parts[0].n_checkpoints)), store.location())
    if stage == len(settings.trajectory.stages) - 1:  # whose columns the notes are of
        train_set = arranged(train_set, notes.columns)
    task = task.told_by(settings.task)
    spec = replace(settings, task=task.spec()).task
    if not task.trains_as(settings.task):
        raise MismatchError(
            f"the bank {store.location()} was built with task {settings.task}, got {spec}; append with its own task"
        )
    source = BatchSource(train_set, batch_size)
    given: list[Any] | None = None
    if ids is not None:
        given = checked_ids(ids, 0, source.n, parts[0].stage_name).tolist()  # read once: they may be a generator
        for each in parts:
            _require_other_names(each.ids, given)
    placement = placement_of(model)
    with plain_modes(), at_work(store, leads=placement.lockstep.leads) as work:
        count = placement.lockstep.from_leader(lambda: _make_room(store, stage, parts, work))
        part, own = _begun(parts[:count], source, given), False
        complete = part is not None and part.sealed() is not None
        if part is None:
            _require_sealed(store, parts[:count])
            part, own = _created(store, settings, stage, parts[:count], source, given, shard_rows)
        else:
            expected = part.ids if given is None else given
            wanted = checked_ids(expected, 0, len(expected), part.stage_name)
            height = default_shard_rows(source.n, source.batch_size, settings, shard_rows)
            _require_same(part, _spec(part.spec.start, source, wanted, height), wanted, complete=complete)
        checkpoints = [checkpoint(stage, index) for index in range(part.n_checkpoints)]
        works = [Work(stage, part, source, checkpoints)]
        try:
            with placement.kept():
                fill(works, settings, model, task, metrics, shard=shard, device=device, progress=progress)
        except OtherDataError as error:
            if own and not isinstance(error, NotFirstError):
                raise
            raise (_no_repetition(part, error.args[0]) if complete else _of_another(part, str(error))) from error
    return part


def _make_room(store: Store, stage: int, parts: Sequence[Part], work: AtWork) -> int:
    """Remove what an append left that failed before its first row, and say how many parts there are without it."""
    try:
        last = parts[-1]
        if len(parts) > 1 and last.sealed() is None and work.remove_part(last.name):
            return len(parts) - 1
        work.remove_part(part_name(stage, len(parts)))  # one that has no group yet
        return len(parts)
    except OSError as error:
        raise _not_appended(store, error) from error
    finally:
        work.share()


def _begun(parts: Sequence[Part], source: BatchSource, ids: Sequence[Any] | None) -> Part | None:
    """The part that this append made before: the first complete one of its examples, or else the unfinished one.

    A complete one is known by its ids; where none are given, by its data. Complete ones go first: a script that was
    killed in its second append begins again with its first one.
    """
    appended = parts[1:]
    for part in appended:
        if part.sealed() is not None and (_holds(part, source) if ids is None else list(ids) == part.ids):
            return part
    return next((part for part in appended if part.sealed() is None), None)


def _require_same(part: Part, spec: PartSpec, ids: np.ndarray, *, complete: bool = False) -> None:
    """Refuse to go on with what another append began, or to repeat a complete one in another way.

    Raises:
        MismatchError: it did; says what to do.
    """
    difference = part_difference(part, spec, ids)
    if difference is not None:
        raise _no_repetition(part, f"it {difference}") if complete else _of_another(part, difference)


def _of_another(part: Part, difference: str) -> MismatchError:
    return MismatchError(
        f"{part.location} was begun by another append, of other examples: if another process is at it now, wait "
        f"until it is done and append again; if it was killed, give its own examples first, which finishes it, or "
        f"remove {part.location} and append again ({difference})"
    )


def _no_repetition(part: Part, difference: str) -> MismatchError:
    return MismatchError(
        f"the ids {part.ids[0]!r} to {part.ids[-1]!r} are in stage {part.stage_name!r} of the bank "
        f"{part.store.location()} already, as {part.name}, and this is no repetition of that append: {difference}. "
        "Rows that are there are never replaced: give new ids to add these examples beside them, or for a repetition "
        "the data, batch_size and shard_rows of then"
    )


def _holds(part: Part, source: BatchSource) -> bool:
    """Whether a part is of just these examples, in these batches; reads no further than to the first other one."""
    if (part.spec.n, part.spec.batch_size) != (source.n, source.batch_size):
        return False
    for shard in range(part.spec.n_shards):
        hashes = part.read(0, "batch_hashes", shard)
        for (_, _, batch), stored in zip(source.load([part.spec.span(shard)]), hashes, strict=True):
            if batch_hash(batch) != stored.tobytes():
                return False
    return True


def _require_sealed(store: Store, parts: Sequence[Part]) -> None:
    missing = [text for part in parts for text in part.missing()]
    if missing or any(part.sealed() is None for part in parts):
        lacks = f"it lacks {listed(missing)}" if missing else "it is not finalized"
        raise BankError(f"the bank {store.location()} is unfinished, {lacks}: finish it before rows are appended")


def _created(
    store: Store,
    settings: Settings,
    stage: int,
    parts: Sequence[Part],
    source: BatchSource,
    ids: Sequence[Any] | None,
    shard_rows: int | None,
) -> tuple[Part, bool]:
    """The next part, and whether it was made here: another process may have been first."""
    start = sum(part.spec.n for part in parts)
    known = {known_id for part in parts for known_id in part.ids}
    new = checked_ids(ids, _next_id(parts) if ids is None else start, source.n, parts[0].stage_name)
    twice = [new_id for new_id in new.tolist() if new_id in known]
    if twice:
        raise ValueError(f"the ids {twice[:5]} are in stage {parts[0].stage_name!r} already; give new ones")
    spec = _spec(start, source, new, default_shard_rows(source.n, source.batch_size, settings, shard_rows))
    *content, (group, attributes) = part_objects(settings, stage, len(parts), spec, new).items()
    own = False
    try:
        if put_same(store, dict(content), part_name(stage, len(parts))):
            own = not store.put_if_absent({group: attributes})
    except OSError as error:
        raise _not_appended(store, error) from error
    part = Part(store, stage, len(parts), settings)
    _require_same(part, spec, new)
    return part, own


def _not_appended(store: Store, error: OSError) -> BankError:
    return BankError(f"cannot append to the bank {store.location()}: {error}; {write_remedy(error)}, then append again")


def _spec(start: int, source: BatchSource, ids: np.ndarray, height: int) -> PartSpec:
    return PartSpec(start, source.n, source.batch_size, height, "string" if ids.dtype == object else "int64")


def _next_id(parts: Sequence[Part]) -> int:
    """The first integer after all ids."""
    known = [known_id for part in parts for known_id in part.ids]
    if any(isinstance(known_id, str) for known_id in known):
        raise ValueError(
            f"stage {parts[0].stage_name!r} has ids that are strings; give ids for the new examples too, in Python by "
            "bank.append(..., ids=[...]): source-proj append can only go on counting"
        )
    return int(max(known)) + 1


def _require_other_names(there: Sequence[Any], given: Sequence[Any]) -> None:
    """Refuse a string that reads as a number that is there, or the reverse: two examples would have one name."""
    if not (len(there) and len(given)) or isinstance(there[0], str) == isinstance(given[0], str):
        return
    both = sorted(set(map(str, there)) & set(map(str, given)))
    if both:
        raise ValueError(
            f"the new examples' ids {both[:5]} are written as those of others in the bank, which are "
            f"{'strings' if isinstance(there[0], str) else 'integers'}: give other ids"
        )
