"""`build`: from checkpoints and data to a bank."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from source_proj._errors import BankError, MismatchError, named_examples
from source_proj._io.executors import Executor, check_executor
from source_proj._io.progress import Progress
from source_proj.bank.bank import Bank
from source_proj.bank.base_weights import base_print
from source_proj.bank.build.agreement import agreement, weighted_by_agreement
from source_proj.bank.build.arguments import require_arguments, require_device
from source_proj.bank.build.at_work import AtWork, at_work, is_sealed
from source_proj.bank.build.claims import Claims, checked_takeover
from source_proj.bank.build.create import create_bank, not_written, require_same_part, require_same_settings
from source_proj.bank.build.data import BatchSource, by_stage, checked_ids, to_device
from source_proj.bank.build.fill import Work, checked_shard, fill
from source_proj.bank.build.normalizer import with_normalizer
from source_proj.bank.build.parameters import (
    ParameterWeights,
    as_begun,
    chosen_space,
    in_words,
    known_space,
    spec_of,
    weighting_of,
)
from source_proj.bank.build.shares import fill_by, require_whole
from source_proj.bank.examples import Examples
from source_proj.bank.format import Settings, storage_of
from source_proj.bank.layout import PartSpec, default_shard_rows
from source_proj.bank.notes import Notes, modules_of
from source_proj.bank.read.part import Part
from source_proj.bank.store import Store, open_store
from source_proj.gradients import private_copy
from source_proj.gradients.batches import require_examples
from source_proj.gradients.law import chosen_autocast
from source_proj.sketch import Sketch, plain_modes
from source_proj.task import Task
from source_proj.task.base import derivatives_of, fisher_weight_of
from source_proj.trajectory import Scale, Trajectory
from source_proj.trajectory.placement import placement_of, refuse_parallelism, unwrapped
from source_proj.trajectory.state_order import check_state_order, unnamed_alike

__all__ = ["build"]

_LOOKED_AT = 8  # batches, of as many examples, that tell whether an optimizer's state is in the model's order


def build(
    model: nn.Module,
    task: Task,
    trajectory: Trajectory,
    train_set: Any,
    path: str | Path,
    *,
    sketch: Sketch = Sketch(),  # noqa: B008 (frozen)
    batch_size: int = 64,
    device: torch.device | str | None = None,
    storage: str | None = None,
    shard: tuple[int, int] | None = None,
    takeover: float | None = None,
    resume: bool = True,
    progress: Progress = True,
    ids: Any = None,
    parameters: Sequence[str] | None = None,
    parameter_weights: ParameterWeights = None,
    sampled_fisher: int | None = None,
    autocast: str | None = None,
    gradients: str = "auto",
    shard_rows: int | None = None,
    executor: Executor | None = None,
) -> Bank:
    """Sketch the training gradients of every checkpoint into a bank: one forward and backward pass over the data each.

    A build that was stopped at any instant goes on from its last whole shard when it is called again with the same
    arguments, and ends with the same bits on the same device and number of threads. Data that were sketched before are
    then read once more and compared with their hashes. What failed before its first shard was whole is begun anew.

    Several processes may build one bank at once: give each ``takeover=300`` and, so that they begin apart, its own
    ``shard=(i, n)``. Each makes its own share and then what nobody else is at work on, shards of workers that died or
    fell silent included; all return when the bank is whole, and one of them has finalized it. They may come and go.
    Without ``takeover``, ``shard=(i, n)`` makes just its share: call ``bank.finalize()`` when all are done. What a
    launcher says of (i, n) and the device, :func:`source_proj.distribute.this_worker` reads.

    Args:
        model: a module of the architecture that was trained. What runs is a copy, of the module within where it is
            wrapped by DataParallel, DistributedDataParallel or torch.compile; the model itself is left as it is.
        task: what it was trained on, and what is asked of it.
        trajectory: the training run. Checkpoints given as dicts are copied into the bank.
        train_set: map-style data set or DataLoader without shuffling; {stage name: data set} for several stages. A
            pandas frame of numbers with a label column, a ``datasets.Dataset``, or a ``DatasetDict`` whose splits have
            the stages' names ("train" for a run of one) are taken as they are.
        path: the bank's folder, or a URL: s3://bucket/bank, gs://…, az://… (extra ``cloud``), memory://….
        sketch: the projection of the gradients.
        batch_size: examples a batch; a DataLoader brings its own.
        device: where the model runs; default: where it is.
        storage: "int8", "int4", "int2", "int1" (one scale a row), "float16" or "float32". Default: what keeps a
            row in 4,096 bytes, int8 for k <= 4,096, int4 up to 8,192, int2 beyond; int8 where nothing is projected, or
            the sketch is as large as the gradient. "int1" errs less than the sketch does only where k is at most a
            quarter of the examples.
        shard: (i, n) to do the i-th of n workers' share, counted from 0.
        takeover: seconds without progress of another worker after which its shards are taken over; more than a batch
            takes, and the loading of a checkpoint. None: other workers' shards are left alone.
        resume: go on with a bank that is there; False refuses if there is anything.
        progress: show a progress bar after two seconds; False for none, or a function of (description, done, total).
        ids: ids of the examples in order, integers or strings; {stage name: ids} for several stages. Default: 0, 1, …
        parameters: globs of the parameters to attribute through, "!glob" to leave out; ``["*"]`` for all. Default:
            those that training moved, see :func:`source_proj.trajectory.trained_parameters`; ``bank.parameter_choice``
            says which these are, and so does a line where some are left out.
        parameter_weights: what gradients are multiplied by before they are sketched: "agreement", the squared agreement
            of each parameter's gradients between checkpoints, see :mod:`source_proj.bank.build.agreement`; numbers by
            glob, the first that matches, ``{"embed.*": 0.5}``; or "none". Default: "agreement" for :class:`CausalLM`,
            of which it predicts retraining better, where rows are projected and some stage has 3 checkpoints and 128
            examples; else "none".
        sampled_fisher: draws of labels from the model's prediction per example, for the curvature of that name: each
            takes a backward pass more, and half an int8 row's bytes. Default: 1 for :class:`CausalLM`, of which it
            predicts retraining better; else 0.
        autocast: "bfloat16" or "float16" for the forward pass; default: that of a ``torch.autocast`` around the call.
        gradients: "auto", "hooks" or "general"; see :func:`source_proj.gradients.gradient_engine`.
        shard_rows: rows a shard, a multiple of the batch size; default: as many as make 16 MiB, 4,096 at most.
        executor: makes the rows: anything shaped like :class:`concurrent.futures.Executor`, whose workers get the
            model, the run and the data, and reach ``path``. The bits are those of this process.

    Returns:
        The bank; finalized, unless ``shard`` was given without ``takeover``.

    Raises:
        BankError: something else is at ``path``, or it cannot be written.
        MismatchError: a bank is there that was begun with other settings or data (names both values); or the model does
            not fit a checkpoint; or an optimizer's state is missing or does not fit.
        GradientError: a gradient is not finite (names stage, checkpoint and ids), or cannot be computed.
        TypeError, ValueError: the data set is iterable, empty or shuffled, or an argument is of another type, out of
            range, or a device that is not there.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from source_proj.task import Classification
        >>> from source_proj.trajectory import Checkpoint
        >>> model = nn.Linear(2, 3)
        >>> run = Trajectory([Checkpoint(model.state_dict(), step=10, lr=0.1)])
        >>> data = torch.utils.data.TensorDataset(torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1]))
        >>> with TemporaryDirectory() as folder:
        ...     bank = build(model, Classification(), run, data, f"{folder}/bank", sketch=Sketch(dim=16))
        ...     [(block.start, block.stop, block.rows.shape) for block in bank.stages[0].iter_rows(0)]
        [(0, 5, torch.Size([5, 16]))]
    """
    model = unwrapped(model)
    refuse_parallelism(model)
    require_arguments(model=model, task=task, trajectory=trajectory, sketch=sketch)
    require_device(device)
    check_executor(executor)
    placement = placement_of(model)
    autocast = chosen_autocast(autocast, placement.device if device is None else torch.device(device))
    require_whole(executor, shard, takeover, placement)
    lockstep = placement.lockstep
    store = open_store(path)
    where = store.location()
    share, takeover = checked_shard(shard), checked_takeover(takeover)
    lockstep.require_same((where, shard, takeover), "path, shard and takeover")
    names = [stage.name for stage in trajectory.stages]
    sources = [BatchSource(data, batch_size) for data in by_stage(train_set, names, "train_set")]
    given_ids = by_stage(ids, names, "ids")
    stage_ids = [checked_ids(one, 0, s.n, name) for one, s, name in zip(given_ids, sources, names, strict=True)]
    _check_loss(task, trajectory)
    task = with_normalizer(task, sources, names)
    sampled_fisher = task.sampled_draws if sampled_fisher is None else sampled_fisher
    second_derivative, fisher_weight = _columns(task, sources[0], stage_ids[0])
    space, choice = lockstep.from_leader(lambda: chosen_space(model, trajectory, parameters, sketch, progress is True))
    weighting = weighting_of(parameter_weights, task, sketch, trajectory, [source.n for source in sources])
    with plain_modes(), at_work(store, leads=lockstep.leads and not is_sealed(store)) as work:
        lockstep.from_leader(lambda: _require_room(store, resume, work))
        known = lockstep.from_leader(lambda: known_space(space, model, parameter_weights, weighting, store))
        if known is None:
            with placement.kept():
                shown = progress if lockstep.leads else False
                found = agreement(model, task, trajectory, sources, stage_ids, space, device, autocast, shown)
            known = lockstep.from_leader(lambda: weighted_by_agreement(space, *found))
        space = known
        choice = "; ".join(filter(None, (choice, in_words(space, weighting))))
        base = base_print(model, trajectory.checkpoints)
        notes = Notes(choice, modules_of(model), sources[-1].columns, base, task.code())

        def create() -> Settings:
            resolved = trajectory.resolve(model, space)
            settings = Settings(
                sketch=sketch.spec(),
                parameters=spec_of(space, weighting),
                task=task.spec(),
                trajectory=resolved.record,
                storage=storage_of(storage, sketch.spec(), space.size),
                sampled_fisher=sampled_fisher,
                second_derivative=second_derivative,
                fisher_weight=fisher_weight,
                gradients=gradients,
                autocast=autocast,
            )
            _begin(store, settings, trajectory, resolved.scales, _parts(settings), notes, resume=resume)
            return settings

        def _parts(settings: Settings) -> list[tuple[PartSpec, np.ndarray]]:
            specs = [
                _part_spec(source, own, settings, shard_rows) for source, own in zip(sources, stage_ids, strict=True)
            ]
            return list(zip(specs, stage_ids, strict=True))

        with placement.kept():
            _check_orders(task, model, trajectory, sources, device)
            settings = lockstep.from_leader(create)
            bank = Bank(path)
            settings = as_begun(settings, bank.settings)
            require_same_settings(where, bank.settings, settings)
            bank.notes.require_columns(sources[-1].columns, where)
            bank.notes.warn_of_other_modules(model, stacklevel=3)
            bank.notes.warn_of_other_code(task, stacklevel=3)
            bank.notes.require_base(model, trajectory.checkpoints, where)
            parts = [stage.parts[0] for stage in bank.stages]
            for part, (spec, own) in zip(parts, _parts(settings), strict=True):
                require_same_part(part, spec, own)
            works = [
                Work(index, part, source, stage.checkpoints)
                for index, (part, source, stage) in enumerate(zip(parts, sources, trajectory.stages, strict=True))
            ]
            _examine(task, model, trajectory, sources, device)
            claims = None if takeover is None or not lockstep.leads else Claims(store, takeover, share)
            with claims or nullcontext():
                if executor is not None:
                    # As they were read: a generator gives them once.
                    ids = None if ids is None else dict(zip(names, stage_ids, strict=True))
                    whole = partial(
                        build, model, task, trajectory, train_set, sketch=sketch, batch_size=batch_size,
                        device=device, storage=storage, ids=ids, parameters=parameters,
                        parameter_weights=parameter_weights, sampled_fisher=sampled_fisher, autocast=autocast,
                        gradients=gradients, shard_rows=shard_rows,
                    )  # fmt: skip
                    fill_by(executor, whole, where, max(part.spec.n_shards for part in parts), progress)
                else:
                    fill(
                        works, settings, model, task, bank.metrics, shard=shard, device=device, progress=progress,
                        claims=claims,
                    )  # fmt: skip
                lockstep.from_leader(lambda: _finish(bank, parts, claims, all_made=shard is None))
    if takeover is not None or shard is None:
        bank.reload()
    bank.examples = Examples(dict(zip(names, by_stage(train_set, names, "train_set"), strict=True)))
    return bank


def _begin(
    store: Store,
    settings: Settings,
    trajectory: Trajectory,
    scales: Mapping[str, Scale],
    parts: Sequence[tuple[PartSpec, np.ndarray]],
    notes: Notes,
    *,
    resume: bool,
) -> None:
    """Create the bank, unless it is there."""
    try:
        if not _is_there(store, resume):
            create_bank(store, settings, trajectory.checkpoints, scales, parts, notes)
    except OSError as error:
        if not _was_created(store):  # else another process has, and removed what it took for leftovers
            raise not_written(store, error) from error


def _finish(bank: Bank, parts: Sequence[Part], claims: Claims | None, *, all_made: bool) -> None:
    """Declare the parts complete, if they are or others will make them so."""
    if claims is not None:
        claims.once("seal", lambda: bank.seal(parts), lambda: all(part.sealed() is not None for part in parts))
    elif all_made:
        bank.seal(parts)


def _check_loss(task: Task, trajectory: Trajectory) -> None:
    """Refuse a built-in task of another label smoothing than the run's.

    Raises:
        MismatchError: names both.
    """
    smoothing = getattr(task, "label_smoothing", 0.0)
    for stage in trajectory.stages:
        if "class" not in task.spec() and stage.label_smoothing not in (None, smoothing):
            raise MismatchError(
                f"stage {stage.name!r} was trained with label smoothing {stage.label_smoothing}, and the task is "
                f"{task!r}: give Classification(label_smoothing=...), or a Task with the loss that was trained with"
            )


def _check_orders(
    task: Task,
    model: nn.Module,
    trajectory: Trajectory,
    sources: Sequence[BatchSource],
    device: torch.device | str | None,
) -> None:
    """Refuse optimizer states whose order is not the model's; see `check_state_order`."""
    for index, (stage, source) in enumerate(zip(trajectory.stages, sources, strict=True)):
        alike = unnamed_alike(stage, model)
        if alike is None:
            continue
        if not placement_of(model).is_whole:
            raise MismatchError(
                f"the optimizer's state of stage {stage.name!r} names no parameters, and several have one shape, whose "
                f"order cannot be checked on a model that is {placement_of(model).kind}: save the state of an "
                "optimizer made from model.named_parameters()"
            )
        private = private_copy(model, device)
        alike[0].load_into(private)
        where = placement_of(private).device
        ends = [source.n * place // _LOOKED_AT for place in range(_LOOKED_AT + 1)]
        spans = [(begin, min(begin + _LOOKED_AT, end)) for begin, end in pairwise(ends) if begin < end]
        batches = (to_device(batch, where) for _, _, batch in source.load(spans))
        check_state_order(*alike, private, task.of_stage(index), batches)


def _examine(
    task: Task,
    model: nn.Module,
    trajectory: Trajectory,
    sources: Sequence[BatchSource],
    device: torch.device | str | None,
) -> None:
    """Let the task look at the first batch of each stage, at the final weights."""
    if type(task).examine is Task.examine:
        return
    private = private_copy(model, device)
    trajectory.final.load_into(private)
    where = placement_of(private).device
    for source in sources:
        _, _, batch = next(iter(source.load([(0, min(source.n, source.batch_size))])))
        task.examine(private, to_device(batch, where))


def _columns(task: Task, source: BatchSource, ids: np.ndarray) -> tuple[bool, bool]:
    """Whether the task gives ℓ'', and a weight for the empirical Fisher; asked with the first batch."""
    _, stop, batch = next(iter(source.load([(0, min(source.n, source.batch_size))])))
    require_examples(batch, ids[:stop].tolist())
    task = task.of_stage(0)
    with named_examples(ids.tolist()):
        _, second = derivatives_of(task, torch.zeros(stop, dtype=torch.float32, device="cpu"), batch)
        return second is not None, fisher_weight_of(task, batch, stop) is not None


def _part_spec(source: BatchSource, ids: np.ndarray, settings: Settings, shard_rows: int | None) -> PartSpec:
    height = default_shard_rows(source.n, source.batch_size, settings, shard_rows)
    return PartSpec(0, source.n, source.batch_size, height, "string" if ids.dtype == object else "int64")


def _is_there(store: Store, resume: bool) -> bool:
    """Whether a bank is there already."""
    if not resume and store.list():
        raise BankError(
            f"{store.location()} exists already, and resume=False begins a new bank: remove it, give another path, or "
            "resume=True"
        )
    return store.exists("zarr.json")


def _require_room(store: Store, resume: bool, work: AtWork) -> None:
    """Refuse a place where no bank can be, or where one is that must not be, before anything is measured.

    What a build left that failed before its first row is removed.
    """
    try:
        if not _is_there(store, resume) or resume:
            work.remove_begun()
    except OSError as error:
        raise not_written(store, error) from error
    finally:
        work.share()


def _was_created(store: Store) -> bool:
    """Whether a bank is there, as far as can be told."""
    try:
        return store.exists("zarr.json")
    except OSError:
        return False
