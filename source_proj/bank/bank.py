"""The bank as its readers see it."""

import os
import sys
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from source_proj._errors import BankError, MismatchError
from source_proj._io.html import facts
from source_proj._io.printable import bytes_in_words, printable
from source_proj._io.progress import Progress
from source_proj.bank.build.append import append_rows
from source_proj.bank.build.at_work import AT_WORK, sweep_builders
from source_proj.bank.examples import KnownExamples
from source_proj.bank.fits import FitCache
from source_proj.bank.format import Settings
from source_proj.bank.read.metrics import Metrics
from source_proj.bank.read.objects import list_objects
from source_proj.bank.read.part import Part, listed
from source_proj.bank.read.root import find_parts, kind_of, read_root
from source_proj.bank.read.stage_bank import StageBank
from source_proj.bank.read.weights import Weights
from source_proj.bank.store import open_store
from source_proj.bank.verify import VerifyReport, fingerprint_of, verify
from source_proj.sketch import Sketch
from source_proj.task import Task
from source_proj.trajectory import Checkpoint, RunRecord
from source_proj.trajectory.placement import placement_of

__all__ = ["Bank", "open_bank"]


class Bank:
    """A store of sketched training gradients; made by :func:`source_proj.build`, opened by :func:`source_proj.open`.

    It is sent to another process by its place, without its examples: there it is opened, once, if it is the same.

    Args:
        path: the bank's folder, or a URL: s3://bucket/bank, gs://…, az://…, memory://…, or one that fsspec reads.

    Attributes:
        path: the bank's folder, or its URL.
        store: what its objects are read from and written to.
        sketch: the projection that its rows went through.
        settings: everything that the rows depend on besides the data.
        metrics: the metrics that its rows are in; one, the identity, unless an optimizer was preconditioned.
        weights: finds the run's checkpoints, in files or in the bank.
        versions: what software made the bank, for people.
        notes: on the model and the data that it was built with.
        examples: shows training examples beside scores: a bank that was just built knows its data set, of an opened one
            set ``bank.examples = Examples(train_set)``.

    Raises:
        BankError: there is no bank, or one of another version, or one whose metadata are damaged; says what was found.
    """

    examples = KnownExamples()

    def __init__(self, path: str | Path) -> None:
        self.store = open_store(path)
        self.path: Path | str = self.store.folder or self.store.location()
        self.settings, self.versions, moved, self.notes = read_root(self.store)
        list_objects(self.store)  # refuses links
        self.sketch = _sketch(self.path, self.settings)
        self.metrics = Metrics(self.store, self.settings)
        self.weights = Weights(self.store, self.settings, moved)
        self.reload()

    def reload(self) -> None:
        """Look again which parts there are, and which of them are sealed."""
        parts_of = [find_parts(self.store, self.settings, s) for s in range(len(self.trajectory.stages))]
        self.stages: tuple[StageBank, ...] = tuple(
            StageBank(self.settings, s, parts, self, self.store) for s, parts in enumerate(parts_of)
        )
        for part in self.parts:
            part.check_seal()
        self._seals = [part.sealed() for part in self.parts]
        self.__dict__.pop("ids", None)

    def __reduce__(self) -> tuple[Any, ...]:
        place = os.path.abspath(self.path) if isinstance(self.path, Path) else self.path
        return (_reopened, (place, self.fingerprint)) if self.finalized else (open_bank, (place,))

    def __repr__(self) -> str:
        rows = " + ".join(f"{s.n} {s.name!r} rows x {s.counted_rows()}" for s in self.stages)
        state = "" if self.finalized else ", unfinished"
        return f"Bank({str(self.path)!r}: {rows}, k={self.sketch.dim}, {self.storage}{state})"

    def _repr_html_(self) -> str:
        size = sum(({**self.nbytes(), "fits": self.fits.nbytes()}).values())
        pairs: list[tuple[object, object]] = [("task", self.task_spec.get("name"))]
        for stage in self.stages:
            steps = ", ".join(map(str, stage.record.steps))
            rows = "whole segments up to" if stage.captured else "checkpoints at"
            pairs.append((f"stage {stage.name}", f"{stage.n:,} examples, {rows} steps {steps}"))
        pairs += [
            ("sketch", f"{self.sketch.kind}, {self.sketch.dim} numbers an example, as {self.storage}"),
            ("size", bytes_in_words(size)),
        ]
        return facts(f"Bank {self.path}" + ("" if self.finalized else " (unfinished)"), pairs)

    # What it is ------------------------------------------------------------------------------------------------

    @property
    def parameter_choice(self) -> str:
        """Which parameters are attributed, and how many were left out, for people."""
        return self.notes.parameter_choice

    @property
    def task_spec(self) -> dict[str, Any]:
        """``Task.spec()`` of the task that it was built with."""
        return self.settings.task

    @property
    def trajectory(self) -> RunRecord:
        """The record of the run."""
        return self.settings.trajectory

    @property
    def space_spec(self) -> dict[str, Any]:
        """``ParameterSpace.spec()`` of the attributed parameters."""
        return self.settings.parameters

    @property
    def parameter_weights(self) -> dict[str, float]:
        """What the gradients of each attributed parameter were multiplied by."""
        names = self.space_spec["names"]
        return dict(zip(names, self.space_spec.get("weights") or [1.0] * len(names), strict=True))

    @property
    def captured(self) -> bool:
        """Whether rows are of whole segments: of a ``Recorder(capture=)``, or :func:`source_proj.condense`."""
        return any(stage.capture is not None for stage in self.trajectory.stages)

    @property
    def storage(self) -> str:
        """How rows are stored: the name of a codec, as ``storage=`` of :func:`source_proj.build` has it."""
        return self.settings.storage

    @property
    def gradients(self) -> str:
        """The gradient method that was asked for."""
        return self.settings.gradients

    @property
    def autocast(self) -> str | None:
        """The autocast type of the forward passes."""
        return self.settings.autocast

    @property
    def parts(self) -> list[Part]:
        """The parts of all stages, in order."""
        return [part for stage in self.stages for part in stage.parts]

    @property
    def n_rows(self) -> int:
        """Number of training examples of all stages."""
        return sum(stage.n for stage in self.stages)

    @cached_property
    def ids(self) -> list[Any]:
        """Ids of all training examples; pairs (stage name, id) where there are several stages."""
        if len(self.stages) == 1:
            return self.stages[0].ids
        return [(stage.name, row_id) for stage in self.stages for row_id in stage.ids]

    @property
    def finalized(self) -> bool:
        """Whether every part is complete and sealed."""
        return all(seal is not None for seal in self._seals)

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of all that the bank holds but paths, software versions and weights' copies.

        Raises:
            BankError: the bank is not finalized.
        """
        self.require_finalized()
        return fingerprint_of([seal for seal in self._seals if seal is not None])

    def missing(self) -> list[str]:
        """Say in words which shards are not committed yet, as it is on disk now."""
        return [text for part in self.parts for text in part.missing()]

    def require_finalized(self) -> None:
        """Refuse to go on with an unfinished bank.

        Raises:
            BankError: it is not finalized; lists the missing shards.
        """
        if self.finalized:
            return
        missing = self.missing()
        if missing:
            appended = [part.location for part in self.parts if part.spec.start and part.sealed() is None]
            verb = f"append again (or remove {appended[0]} to give it up)" if appended else "build again"
            raise BankError(
                f"the bank {self.path} is unfinished: it lacks {listed(missing)}. Call {verb} with the same arguments "
                "to go on with it"
            )
        remedy = "call its finalize(), or run source-proj finalize"
        raise BankError(f"all shards of the bank {self.path} are there, but it is not finalized: {remedy}")

    # Checkpoints -----------------------------------------------------------------------------------------------

    def stage_index(self, stage: int | str) -> int:
        """Place of a stage that is given by its name, or by its place.

        Raises:
            ValueError: there is no such stage.
        """
        names = [each.name for each in self.stages]
        if isinstance(stage, str) and stage in names:
            return names.index(stage)
        if isinstance(stage, bool) or not isinstance(stage, int) or not 0 <= stage < len(names):
            raise ValueError(f"stage must be one of the bank's stages {names}, or an index into them, got {stage!r}")
        return stage

    def checkpoint(self, stage: int | str = -1, index: int = -1) -> Checkpoint:
        """A checkpoint of a stage, from its file or from the copy inside the bank.

        Raises:
            IndexError: there is no such stage or checkpoint.
            MismatchError: its file is missing, or changed since the bank was begun.
        """
        return self.weights.checkpoint(self.stage_index(stage) if isinstance(stage, str) else stage, index)

    def query_points(self, stage: int = -1) -> list[Checkpoint]:
        """Where a mean over a stage's checkpoints is taken of queries; raises as :meth:`checkpoint`."""
        return self.weights.query_points(stage)

    def final_checkpoint(self) -> Checkpoint:
        """The weights at the end of training; raises as :meth:`checkpoint`."""
        return self.weights.final()

    # Verbs -----------------------------------------------------------------------------------------------------

    def finalize(self) -> None:
        """Declare the bank complete, after all workers are done; does nothing to a finalized one.

        Raises:
            BankError: shards are missing; lists them.
            MismatchError: the data differed between checkpoints.
        """
        self.seal(self.parts)

    def seal(self, parts: Sequence[Part]) -> None:
        """Declare some parts complete; see :meth:`finalize`."""
        for part in parts:
            part.seal()
        self.reload()
        done = [""] if self.finalized else [f"{part.name}/" for part in parts]
        for key in self.store.leftovers():
            if key.startswith(tuple(done)) and not key.startswith(("fits/", AT_WORK)):  # others may be at work on those
                self.store.delete(key)
        if self.finalized:
            sweep_builders(self.store)
        self.fits.remove_stale()

    def append(
        self,
        model: nn.Module,
        task: Task,
        train_set: Any,
        *,
        stage: int | str = -1,
        ids: Sequence[Any] | None = None,
        batch_size: int = 64,
        device: torch.device | str | None = None,
        shard: tuple[int, int] | None = None,
        shard_rows: int | None = None,
        progress: Progress = True,
    ) -> int:
        """Add examples to a stage's training set, at the end of its rows; changes the fingerprint.

        The new rows are a part of their own; nothing that is there is rewritten. A killed append is resumed by calling
        it again with the same arguments, and the bank cannot be scored until it is complete.

        A script that appends may be run again. With ids that are just those of one earlier append, the data are only
        compared. Without ids, the same examples in the same batches as those of any earlier append are taken for a
        repetition, and nothing is added; give ids of their own to add them twice.

        Args:
            model: a module of the architecture that the bank was built with.
            task: the bank's task.
            train_set: the new examples: map-style data set or DataLoader. Columns of a table may have any order.
            stage: name or index of the stage; negative ones count from the last.
            ids: their ids in order, none of them in the stage yet; default: goes on counting.
            batch_size: examples a batch; a DataLoader brings its own.
            device: where the model runs; default: where it is.
            shard: (i, n) to do the i-th of n workers' share; then call :meth:`finalize` once all are done.
            shard_rows: rows a shard.
            progress: show a progress bar after two seconds, and a line if nothing was added.

        Returns:
            The number of rows that were added: that of the examples, or 0 if they were there already.

        Raises:
            BankError: the bank is unfinished or captured, or cannot be written.
            MismatchError: the task, the model or the checkpoints are not the bank's, or an unfinished append was of
                other data.
            TypeError, ValueError: an id is there already, or an argument is of another type or out of range.
            GradientError: a gradient is not finite; names the ids.
        """
        self.reload()
        if self.captured:
            raise BankError(f"the rows of {self.path} are of whole segments of training: none can be appended")
        count = len(self.stages)
        place = self.stage_index(stage + count if isinstance(stage, int) and -count <= stage < 0 else stage)
        try:
            part = append_rows(
                self.store,
                self.settings,
                model,
                task,
                self.metrics,
                train_set,
                notes=self.notes,
                stage=place,
                parts=self.stages[place].parts,
                checkpoint=self.checkpoint,
                ids=ids,
                batch_size=batch_size,
                device=device,
                shard=shard,
                shard_rows=shard_rows,
                progress=progress,
            )
        finally:
            self.reload()
        added = part.spec.n if part.sealed() is None else 0
        if not added and progress is True:
            known = printable(f"these {part.spec.n} examples are in {part.location} already")
            remedy = "give ids of their own to add them twice, by bank.append(ids=...)"
            tqdm.write(f"nothing appended: {known}; {remedy}", file=sys.stderr)
        if shard is None:
            placement_of(model).lockstep.from_leader(lambda: self.seal([part]))
            self.reload()
        return added

    @property
    def fits(self) -> FitCache:
        """What was computed from the bank and is kept in it: spectra, and the matrices that queries are scored by."""
        return FitCache(self.store.folder, self.fingerprint if self.finalized else None)

    def clear_fits(self) -> int:
        """Delete all fits that can be, and return the bytes that these took; they are made again when needed."""
        return self.fits.clear()

    def verify(self) -> VerifyReport:
        """Read every byte of the bank and say what is wrong where; see :func:`verify`."""
        return verify(self.path)

    def nbytes(self) -> dict[str, int]:
        """Bytes on disk by kind; "fits" are what was computed from the bank and kept beside it."""
        names = (
            "rows scales derivatives sampled_fisher batch_hashes audits marks ids weights crossings metrics curvature"
        )
        kinds = dict.fromkeys([*names.split(), "metadata", "fits", "temporary"], 0)
        kind = {key: kind_of(key) for key in self.store.list()} | dict.fromkeys(self.store.leftovers(), "temporary")
        for key, name in kind.items():
            info = self.store.stat(key)
            kinds[name] += 0 if info is None else info.size
        return kinds


def open_bank(path: str | Path) -> Bank:
    """Open a bank for reading; it may lie on a read-only disk, or in a bucket: "s3://bucket/bank".

    Raises:
        BankError: there is no bank, or one of another version, or one whose metadata are damaged; says what was found.
    """
    return Bank(path)


@lru_cache(maxsize=16)  # a worker has many tasks on few banks
def _reopened(path: str, fingerprint: str) -> Bank:
    bank = Bank(path)
    if bank.fingerprint != fingerprint:
        raise MismatchError(
            f"the bank {path} is another one here than where it was sent from ({bank.fingerprint[:12]} and "
            f"{fingerprint[:12]}): all workers must see the same bank, and nothing may be appended meanwhile"
        )
    return bank


def _sketch(path: Path | str, settings: Settings) -> Sketch:
    try:
        return Sketch.from_spec(settings.sketch)
    except (ValueError, TypeError, KeyError) as error:
        raise BankError(f"the sketch of the bank {path} cannot be made here: {error}") from error
