"""Recording a run from inside any training loop, in three lines."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from source_proj._errors import MismatchError
from source_proj._io.loading import load_tensors, require_loadable
from source_proj._io.locks import FolderLock
from source_proj._io.outputs import local_path
from source_proj._io.printable import counted
from source_proj.trajectory.checkpoint import matched_state
from source_proj.trajectory.counts import checked_count
from source_proj.trajectory.optimizers import Options, Updates
from source_proj.trajectory.optimizers.describe import describe_live, held_names, read_groups, second_moments, steps_of
from source_proj.trajectory.options import ReadOptions
from source_proj.trajectory.recording.arguments import require_options, require_training, still_trained
from source_proj.trajectory.recording.companion import Companion, Stateful, kept_content
from source_proj.trajectory.recording.own_steps import WeightsWatch, called_weakly
from source_proj.trajectory.recording.progress import Progress, Seen, skips_step, update_runs, updates_of_call
from source_proj.trajectory.recording.run_files import (
    RecordedCheckpoint,
    RecordedRun,
    capture_name,
    check_file,
    describe_state,
    moments_name,
    remove_unnamed,
    require_same_run,
    resume_name,
    weights_name,
    write_tensors,
)
from source_proj.trajectory.recording.schedule_watch import ScheduleWatch
from source_proj.trajectory.stages import Stage
from source_proj.trajectory.trajectory import Trajectory

__all__ = ["Recorder"]


class Recorder:
    """Records checkpoints, and the learning rate of every step, while a model is trained.

    Call :meth:`step` once after every ``optimizer.step()``, before or after a scheduler's: learning rate and momentum
    are read while the optimizer steps. If it did not (a GradScaler may skip one), the step is noted as skipped.

    A checkpoint counts once everything is on the disk, so a run may be killed at any instant: the same program then
    goes on from the last checkpoint, with the model, the optimizer and torch's random states as they were. Where
    batches follow from the step's number, or from torch's random state, it ends with the very weights of an
    uninterrupted run. Schedulers, GradScalers and the like are brought back too if given as ``also``; call
    :meth:`step` last in the loop then, so that they have done their part when their state is taken.

    A step that raises, because the disk is full or somebody pressed Ctrl-C, still counts; its checkpoint is there whole
    or not at all, and training may go on. One Recorder writes to a directory at a time, from its making until
    :meth:`trajectory`, :meth:`close` or its end; after :meth:`trajectory` it may go on as long as no other did.

    Args:
        model: the model that is trained; with several processes, record on one of them, the unwrapped model.
        optimizer: a :class:`torch.optim.SGD`, one set of options for all its parameter groups; or Adam, AdamW or
            RMSprop, whose groups may differ in learning rate and weight decay, and whose second moments are kept with
            each checkpoint. Learning rate and momentum (β₁) may change at every step.
        dir: directory of this run, made if need be. One stage, one directory.
        every: record after every so many optimizer steps.
        at: record after these numbers of optimizer steps; both may be given. With neither, only
            :meth:`trajectory` records.
        stage: the stage's name.
        also: what else has a ``state_dict()`` and must go on, such as a learning-rate scheduler.
        max_grad_norm: what gradients are clipped to by :func:`torch.nn.utils.clip_grad_norm_`, whose result
            :meth:`step` then wants: a clipped update goes less far, and counts as less time.
        segment_ends: numbers of optimizer steps at which a segment ends, each recorded, where a companion counts by
            segments. The last one ends with training, and is not among them.
        companion: what else is kept with each checkpoint.

    Raises:
        TypeError: the model or the optimizer is none, as where they are swapped, or ``stage`` is no name, or ``at``,
            ``segment_ends`` or ``also`` is none of several.
        TypeError: the state of a thing in ``also`` is not made of tensors and plain values.
        ValueError: the optimizer is another one, maximizes, has parameter groups that differ in what they must not, or
            trains no parameter of the model; ``every`` or ``at`` is out of range; ``dir`` is a URL.
        MismatchError: the directory holds another run, or another Recorder writes to it.

    Example:
        >>> import tempfile
        >>> model, data = nn.Linear(3, 1), torch.randn(8, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> directory = tempfile.mkdtemp()
        >>> recorder = Recorder(model, optimizer, directory, every=5)  # the first line
        >>> for step in range(recorder.restore(), 20):  # the second
        ...     optimizer.zero_grad()
        ...     loss = model(data).square().mean()
        ...     loss.backward()
        ...     _ = optimizer.step()
        ...     recorder.step()  # the third
        >>> recorder.trajectory(segments=2)
        Trajectory(train: 4 checkpoints, 2 segments)
        >>> Trajectory.from_recorder(directory, segments=2).final.step
        20
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        dir: str | Path,
        every: int | None = None,
        at: Iterable[int] | None = None,
        stage: str = "train",
        also: Sequence[Stateful] = (),
        max_grad_norm: float | None = None,
        segment_ends: Iterable[int] = (),
        companion: Companion | None = None,
    ) -> None:
        optimizer = require_training(model, optimizer)
        require_options(stage, also, max_grad_norm, at=at, segment_ends=segment_ends)
        self.dir = local_path(dir).absolute()
        self._model = model
        self._optimizer = optimizer
        self._every = None if every is None else checked_count("every, in optimizer steps,", every, 1)
        self._ends = frozenset(checked_count("segment_ends, in optimizer steps,", step, 1) for step in segment_ends)
        self._at = self._ends | {checked_count("at, in optimizer steps,", step, 1) for step in at or ()}
        self._companion = companion
        self._max_norm = max_grad_norm
        self._also = tuple(also)
        for thing in self._also:
            require_loadable(thing.state_dict(), f"the state of {type(thing).__name__} (in also=)")
        self._held: Sequence[str] = tuple(held_names(optimizer, model))
        fresh = RecordedRun(stage, describe_live(optimizer, model), describe_state(model), tuple(self._held))
        self._lock = FolderLock(self.dir, "recorder.lock")
        self._progress = Progress(self._open(fresh), [], 0)
        self._goes_on = not self._progress.run.checkpoints  # False until restore() where there is something to restore
        self._seen: list[Seen] = []  # the optimizer's steps since the last of ours
        self._call: tuple[float | Tensor | None] | None = None  # norm of a step() that has begun, and not ended
        self._unsure = False  # whether a checkpoint is being written, or was when something interrupted
        self._watch, self._weights_watch = ScheduleWatch(self._also), WeightsWatch(optimizer)
        hook = optimizer.register_step_post_hook(called_weakly(self._see))
        self._end = weakref.finalize(self, _end, hook, self._lock)

    def __repr__(self) -> str:
        run, steps = self._progress.run, self._progress.steps
        when = f"every {self._every} steps" if self._every is not None else f"at {len(self._at)} steps"
        taken = counted(len(run.checkpoints), "checkpoint")
        return f"Recorder({str(self.dir)!r}: {steps} steps, {taken} so far, {when})"

    @property
    def steps(self) -> int:
        """Optimizer steps taken so far, recorded or not."""
        return self._progress.steps

    def step(self, grad_norm: float | Tensor | None = None) -> None:
        """Count one optimizer step, and record a checkpoint if one is due.

        Where this was interrupted or raised an OSError, the step counts: call it again, or just go on training.

        Args:
            grad_norm: norm of the gradient before it was clipped, as ``clip_grad_norm_`` returns it; wanted with
                ``max_grad_norm`` alone.

        Raises:
            TypeError: there is a norm and no ``max_grad_norm``, or the other way round.
            MismatchError: the optimizer's options changed, it stepped more than once since the last call, another
                optimizer moves its weights, the directory holds checkpoints and :meth:`restore` was not called, a
                scheduler in ``also`` stepped after the Recorder, or another Recorder writes to the directory.
            OSError: the checkpoint could not be written.
            ValueError: the parameter groups have become different; or, with a checkpoint, a norm is NaN.
        """
        self._require_ready(grad_norm)
        norm = grad_norm.detach() if isinstance(grad_norm, Tensor) else grad_norm
        interrupted, self._call = self._call, (norm,)
        self._hold()
        # Nothing new since an interrupted call: this one is its repetition, for what that could not end.
        progress = self._counted([*(interrupted or ()), norm], skipped=interrupted is None)
        self._watch.require_in_time(progress.steps)
        for last in progress.pending[-1:]:
            self._weights_watch.count(progress.steps, made=last.made)
        due = progress.steps in self._at or (self._every is not None and progress.steps % self._every == 0)
        if due and progress.pending:
            self._write_checkpoint()
        self._call = None

    def _require_ready(self, grad_norm: float | Tensor | None) -> None:
        """Refuse a step before anything is counted."""
        if (grad_norm is None) != (self._max_norm is None):
            given, missing = ("max_grad_norm=", "grad_norm=") if grad_norm is None else ("grad_norm=", "max_grad_norm=")
            raise TypeError(
                f"{given} was given without {missing}: clipping is recorded by Recorder(max_grad_norm=c) and "
                "step(grad_norm=clip_grad_norm_(parameters, c))"
            )
        if not self._goes_on:
            raise MismatchError(
                f"{str(self.dir)!r} holds a run of {self._progress.run.last_step} steps: to train anew, remove it; to "
                "go on with it, call restore() before training"
            )

    def restore(self) -> int:
        """Bring model, optimizer and random states back to the last checkpoint; steps after it are forgotten.

        The optimizer's learning rate, too, becomes what it was then, whatever it was made with now.

        Returns:
            The number of steps taken until then, which is the number of the update to go on with; 0 if nothing was
            recorded (then nothing is touched).

        Raises:
            MismatchError: a recorded file was changed, or another Recorder writes to the directory.
        """
        self._hold()
        run, seen = self._settled().run, self._progress.last_seen
        if run.checkpoints:
            self._load(run)
        elif self._companion is not None:
            self._companion.restart(None)
        remove_unnamed(self.dir, run)  # what a kill left, where there is no checkpoint to come
        self._seen, self._call = [], None
        self._progress = Progress(run, [], seen)
        self._watch.begin()
        self._weights_watch.begin()
        self._goes_on = True
        return run.last_step

    def stage(self, **options: Unpack[ReadOptions]) -> Stage:
        """Give the recorded stage, the present weights its last checkpoint, and let others write to the directory.

        Args:
            **options: ``segments``, ``preconditioner``, ``loss_reduction``, ``batch_size``, ``accumulation``, as in
                :class:`Stage`.

        Raises:
            ValueError: no step was taken yet.
            MismatchError: another optimizer moved the weights since the last checkpoint.
        """
        if self._weights_watch.left_out(self._seen) or self._settled().pending or self._call is not None:
            self._hold()
            self._weights_watch.require_alone(self.steps)
            self._counted(list(self._call or ()), skipped=False)
            self._call = None
            if self._progress.pending:
                self._write_checkpoint()
        self._lock.release()
        return Stage.from_recorder(self.dir, **options)

    def trajectory(self, **options: Unpack[ReadOptions]) -> Trajectory:
        """Give the trajectory of this one stage, see :meth:`stage`."""
        return Trajectory.from_stages([self.stage(**options)])

    def close(self) -> None:
        """Stop recording: what came after the last checkpoint is forgotten, and others may write to the directory."""
        self._end()

    def _options(self) -> Sequence[Options]:
        return read_groups(self._optimizer, self._model)

    def _see(self, optimizer: torch.optim.Optimizer) -> None:
        if skips_step(optimizer):
            self._weights_watch.step_skipped()
            return
        if len(self._seen) < 3:  # of more, only their being too many matters; a recorder may be idle for a whole stage
            last = self._seen[-1].number if self._seen else self._progress.last_seen
            self._seen.append(Seen(last + 1, self._options()))
        self._watch.optimizer_stepped()

    def _open(self, fresh: RecordedRun) -> RecordedRun:
        """Go on with the directory's run if it is this one, or begin one."""
        if self.dir.exists() and not self.dir.is_dir():
            raise ValueError(f"{str(self.dir)!r} is a file: give a directory")
        self.dir.mkdir(parents=True, exist_ok=True)
        RecordedRun.read(self.dir)  # a foreign directory is refused before anything is written to it
        self._acquire()
        try:
            run = RecordedRun.read(self.dir)
            if run is None:
                fresh.optimizer.step_factors(Updates([1.0], [1], steps_of(self._optimizer.state_dict())))
                # At once, so that the checkpoints to come have an owner.
                fresh.write(self.dir)
                return fresh
            require_same_run(self.dir, run, fresh)
        except BaseException:
            self._lock.release()
            raise
        return run

    def _acquire(self) -> None:
        if not self._lock.acquire():
            raise MismatchError(
                f"another Recorder writes to {str(self.dir)!r}: give each its own directory, or end the other one by "
                "its close(), trajectory(), or with its process"
            )

    def _hold(self) -> None:
        """Write on, or write again after :meth:`stage` let others do so."""
        if not self._end.alive:
            remedy = "call trajectory(), bank() or captured() before close(), or make another one"
            raise MismatchError(f"{self!r} was closed, and steps after its last checkpoint are forgotten: {remedy}")
        if self._lock.held:
            return
        self._acquire()
        if RecordedRun.read(self.dir) != self._progress.run:
            self._lock.release()
            raise MismatchError(
                f"another Recorder went on with the run in {str(self.dir)!r} since this one gave its trajectory: make "
                "a new Recorder, and restore()"
            )

    def _settled(self) -> Progress:
        """The progress, as the disk has it where an interruption came while a checkpoint was written."""
        progress = self._progress
        if self._unsure:
            run = RecordedRun.read(self.dir) or progress.run
            done = run.last_step - progress.run.last_step
            if done:
                progress = Progress(run, progress.pending[done:], progress.pending[done - 1].seen)
                self._progress = progress
            self._unsure = False
        return progress

    def _counted(self, norms: Sequence[float | Tensor | None], skipped: bool) -> Progress:
        """Count the optimizer's steps since the last call; where there is none, one that was skipped, if it was."""
        progress = self._settled()
        seen = [step for step in self._seen if step.number > progress.last_seen]
        if skipped and not seen:
            self._watch.step_skipped()
        if seen or skipped:
            progress.pending.extend(updates_of_call(progress, seen, norms, self._max_norm))  # at one stroke
        self._seen = []
        return progress

    def _write_checkpoint(self) -> None:
        progress = self._progress
        step, updates = progress.steps, update_runs(progress, self._max_norm)
        contents: dict[str, dict[str, Any]] = {
            weights_name(step): {name: value.detach().cpu() for name, value in self._model.state_dict().items()},
            resume_name(step): {
                "optimizer": self._optimizer.state_dict(),
                "also": [thing.state_dict() for thing in self._also],
                "cpu_rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            },
        }
        if progress.run.optimizer.preconditioned:
            contents[moments_name(step)] = second_moments(self._optimizer, self._model)
        if self._companion is not None:
            contents[capture_name(step)] = self._companion.content()
        self._unsure = True
        hashes = dict(zip(contents, write_tensors({self.dir / n: c for n, c in contents.items()}), strict=True))
        weights, resume = hashes[weights_name(step)], hashes[resume_name(step)]
        moments, captured = hashes.get(moments_name(step)), hashes.get(capture_name(step))
        checkpoint = RecordedCheckpoint(step, weights, moments, updates, captured, step in self._ends, progress.skipped)
        self._held = still_trained(self._held, held_names(self._optimizer, self._model), step)
        trained = dict.fromkeys([*progress.run.trained, *self._held])
        checkpoints = (*progress.run.checkpoints, checkpoint)
        run = replace(progress.run, trained=tuple(trained), checkpoints=checkpoints, resume=resume)
        run.write(self.dir)
        self._progress = Progress(run, [], progress.last_seen)
        self._unsure = False
        self._watch.checkpoint_written()
        if self._companion is not None and checkpoint.ends_segment:
            self._companion.restart(None)
        remove_unnamed(self.dir, run)

    def _load(self, run: RecordedRun) -> None:
        """Bring everything back to the last checkpoint; nothing is touched where something does not fit."""
        last = run.checkpoints[-1].open(self.dir)
        state = matched_state(last.load(), self._model, repr(last))
        file = self.dir / resume_name(run.last_step)
        check_file(file, run.resume or "")
        resume = load_tensors(file, "record anew in an empty directory")
        if self._companion is not None:
            self._companion.restart(kept_content(self.dir, run.checkpoints[-1]))
        try:
            its_states = list(resume["also"])
            if len(its_states) != len(self._also):
                raise ValueError(f"{len(its_states)} things were recorded as also=, and {len(self._also)} are given")
            for thing, its_state in zip(self._also, its_states, strict=True):
                thing.load_state_dict(its_state)
            self._optimizer.load_state_dict(resume["optimizer"])
            torch.set_rng_state(resume["cpu_rng"])
            if len(resume["cuda_rng"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(resume["cuda_rng"])
        except Exception as error:  # whatever optimizers, schedulers and torch raise about a state that is not theirs
            raise MismatchError(
                f"{str(file)!r} does not fit what is trained here ({type(error).__name__}: {error}): give the things "
                "that were recorded, or record anew in an empty directory"
            ) from error
        self._model.load_state_dict(state)


def _end(hook: RemovableHandle, lock: FolderLock) -> None:
    hook.remove()
    lock.release()
