"""The recorder that also captures: checkpoints, learning rates, and the rows of a bank, from one training run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from source_proj._errors import MismatchError
from source_proj._io.loading import load_tensors
from source_proj._io.outputs import local_path
from source_proj.bank.bank import Bank
from source_proj.bank.capture import processes
from source_proj.bank.capture.capture import Capture
from source_proj.bank.capture.sums import Memory
from source_proj.bank.capture.write import CapturedStage, write_captured
from source_proj.sketch import Sketch
from source_proj.task import Task
from source_proj.trajectory import Recorder as RunRecorder
from source_proj.trajectory import Stage, Stateful, weights_stamp
from source_proj.trajectory.counts import checked_count
from source_proj.trajectory.options import ReadOptions
from source_proj.trajectory.recording.arguments import require_training
from source_proj.trajectory.recording.progress import Progress, update_runs
from source_proj.trajectory.recording.run_files import (
    RecordedCheckpoint,
    RecordedRun,
    capture_name,
    check_file,
    clip_factor,
)

__all__ = ["Recorder"]


class Recorder(RunRecorder):
    r"""Records a run while it trains, and with ``capture=`` its bank too.

    Call :meth:`step` after each step of the optimizer. It notes the learning rate and whether gradients were clipped,
    and after every so many steps keeps a checkpoint; a run that was killed goes on from :meth:`restore`. What was
    recorded is the :meth:`trajectory` that :func:`source_proj.build` takes (:class:`source_proj.trajectory.Recorder`).

    **Capture.** A training step has all that a row is made of: what each layer saw, and the gradient of its output.
    Hooks on the model's layers sketch each example's loss gradient while the loop's own backward pass runs, and
    :meth:`step` adds it to the example's row of the current segment, times the step's learning rate, and to the
    segment's Ĥ. After training :meth:`bank` gives a bank that took no pass over the data: a row for each example and
    segment, an average over all steps that saw the example, with the mean of the empirical Fisher over these steps as
    its curvature, or of a language model of the sampled Fisher over some of them. Checkpoints are needed for queries
    alone, and may be few.

    Rows are gradients as training had them, at that step's weights, with its dropout and augmentation, and before
    clipping. They are sums over micro-batches where these are accumulated, and are divided by a GradScaler's scale
    where it is given in ``also``. The law Σ rows = R p.grad is asserted before the optimizer steps, at the first steps
    and at one in 32: a step whose gradient is not that of the captured passes is refused by name. So is batch
    normalisation in training mode, which mixes examples. Passes in evaluation mode, or without gradients, are not
    captured. The loss must be a mean or a sum over examples, weighted or not: one that compares the examples of a batch
    with each other gives rows that are no example's own, which nothing here can see. Compiled models are refused.

    Sums of a segment are written with each checkpoint, as one with it, so that rows and model stay in step however
    often a run is killed. They take N x k float32 in memory, or on the disk, and k x k for Ĥ.

    With :mod:`torch.distributed`, make a Recorder of the same arguments in every process, of the module within
    DistributedDataParallel, and call :meth:`restore`, :meth:`step` and :meth:`bank` in all of them. Each captures its
    own examples; sums are added up at checkpoints by the first process, which alone writes. Random states that
    :meth:`restore` brings back are the first one's.

    Args:
        model: as for the Recorder of the trajectory, as are ``optimizer``, ``dir``, ``every``, ``at``, ``stage``,
            ``also`` and ``max_grad_norm``.
        optimizer: its optimizer.
        dir: directory of this run.
        every: record a checkpoint after every so many optimizer steps.
        at: record after these numbers of optimizer steps.
        stage: the stage's name.
        also: what else has a ``state_dict()`` and must go on; a GradScaler, whose scale rows are divided by.
        max_grad_norm: what gradients are clipped to.
        capture: the projection of the rows; None to record checkpoints alone.
        task: what is trained on; needed with ``capture``.
        parameters: globs of the parameters to attribute through, "!glob" to leave out; default: those that the
            optimizer holds.
        parameter_weights: numbers by glob that gradients are multiplied by, such as ``bank.parameter_weights`` of a
            bank of an earlier run: no agreement can be measured before there are checkpoints. Default: 1.
        examples: number of training examples; default: one more than the largest id that is seen.
        segment_ends: numbers of optimizer steps at which a segment ends and the next one's rows begin; default: one
            segment.
        memory: "ram", or "disk" for sums in a file that is mapped into memory.
        draw_every: at one step in so many, 1 or more, go back once more through the pass for labels drawn from the
            model's prediction, so that Ĥ is the sampled Fisher; 0 for the empirical one, which takes no pass. Default:
            for :class:`CausalLM`, whose Ĥ that makes much better, where labels are among the model's arguments, 2 until
            a segment has k such gradients, 4 until it has four times as many, then 8; else 0.

    Raises:
        GradientError: rows can't be captured of this model; says why.
        TypeError, ValueError, MismatchError: an argument is of another type, out of range, or belongs to ``capture``.

    Example:
        >>> import tempfile
        >>> import source_proj as sp
        >>> model, inputs, labels = nn.Linear(4, 3), torch.randn(10, 4), torch.randint(3, (10,))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> directory = tempfile.mkdtemp()
        >>> capture = {"capture": sp.Sketch(8), "task": sp.Classification()}
        >>> recorder = Recorder(model, optimizer, directory, every=5, **capture)
        >>> for step in range(recorder.restore(), 20):
        ...     ids = torch.randperm(10)[:5]
        ...     optimizer.zero_grad()
        ...     nn.functional.cross_entropy(model(inputs[ids]), labels[ids]).backward()
        ...     _ = optimizer.step()
        ...     recorder.step(ids=ids)
        >>> bank = recorder.bank()
        >>> bank.stages[0], len(bank.query_points())
        (StageBank('train': 10 rows x 1 whole segment), 4)
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
        *,
        capture: Sketch | None = None,
        task: Task | None = None,
        parameters: Sequence[str] | None = None,
        parameter_weights: Mapping[str, float] | str | None = None,
        examples: int | None = None,
        segment_ends: Iterable[int] = (),
        memory: Memory = "ram",
        draw_every: int | None = None,
    ) -> None:
        ends = list(segment_ends)
        own = {
            "task": task, "parameters": parameters, "parameter_weights": parameter_weights, "examples": examples,
            "segment_ends": ends or None, "draw_every": draw_every,
        }  # fmt: skip
        given = [name for name, value in own.items() if value is not None]
        if capture is None and given:
            raise TypeError(f"{given[0]}= belongs to capture=, which was not given: give capture=Sketch(...)")
        if capture is not None and task is None:
            raise TypeError("capture= needs task=, what the model is trained on, such as Classification()")
        self._examples = None if examples is None else checked_count("examples", examples, 1)
        self._follows = capture is not None and not processes.is_first()
        self._weights = 0
        self._capture: Capture | None = None
        if capture is not None and task is not None:
            optimizer = require_training(model, optimizer)
            folder = local_path(dir).absolute()
            scalers = [thing for thing in also if isinstance(thing, GradScaler)]
            self._capture = Capture(
                model, optimizer, capture, task, folder, parameters=parameters, parameter_weights=parameter_weights,
                examples=self._examples, memory=memory, scaler=scalers[0] if scalers else None,
                clipped=max_grad_norm is not None, draw_every=draw_every,
            )  # fmt: skip
        try:
            super().__init__(
                model, optimizer, dir, every, at, stage, also, max_grad_norm, segment_ends=ends, companion=self._capture
            )
        except BaseException:
            if self._capture is not None:
                self._capture.close()
            raise

    def step(self, grad_norm: float | Tensor | None = None, *, ids: Any = None, batch: Any = None) -> None:
        """Count one optimizer step, add what was captured of it, and record a checkpoint if one is due.

        Args:
            grad_norm: norm of the gradient before it was clipped; wanted with ``max_grad_norm`` alone.
            ids: which examples the step was of: their places in the training set, in the order of the batch; of
                several micro-batches, one after the other. Not needed where batches hold an "index" that goes to the
                model (:class:`source_proj.IndexedDataset` of mappings).
            batch: the step's batch as the task takes it; wanted by tasks that weigh examples in the empirical Fisher
                (a language model's tokens, sample weights), where the labels are no arguments of the model.

        Raises:
            GradientError: nothing was captured of the step, or a row is not finite.
            MismatchError: ids are not as many as examples, or the gradient was not that of the captured passes; and as
                :meth:`source_proj.trajectory.Recorder.step`, for what else is raised.
            TypeError: ids are missing, or given without ``capture``.
        """
        self._require_ready(grad_norm)
        capture = self._capture
        if capture is None and (ids is not None or batch is not None):
            raise TypeError("ids= and batch= belong to a Recorder with capture=Sketch(...)")
        if capture is not None:
            seen = [step for step in self._seen if step.number > self._progress.last_seen]
            if len(seen) > 1:
                raise MismatchError(
                    "the optimizer stepped more than once since the last call, and rows of an earlier step are lost: "
                    "call step() after each, or restore()"
                )
            if seen or self._call is None:  # else this repeats a call that could not end
                rate = float(seen[0].options[0]["lr"]) if seen else 0.0
                capture.add_step(rate, ids, batch, partial(self._clip_factor, grad_norm))
        if capture is not None:
            self._weights = weights_stamp(self._model.parameters())
        super().step(grad_norm)

    def restore(self) -> int:
        """Bring model, optimizer, random states and captured sums back to the last checkpoint.

        Returns:
            The number of steps taken until then; see :meth:`source_proj.trajectory.Recorder.restore`.
        """
        if not self._follows:
            super().restore()
        if self._capture is not None:
            self._capture.begin_session()
            if processes.count() > 1:
                self._restore_together()
        return self._progress.run.last_step

    def stage(self, **options: Unpack[ReadOptions]) -> Stage:
        """Give the recorded stage; with ``capture``, its segments are those that were captured by default."""
        if self._capture is not None:
            if any(step.number > self._progress.last_seen for step in self._seen):
                raise MismatchError("the optimizer's last step was not captured: call step(ids=...) after it")
            if self._settled().pending:
                self._hold()
                if weights_stamp(self._model.parameters()) != self._weights:
                    raise MismatchError(
                        f"the weights were changed after the last step of stage {self._progress.run.stage!r}, so that "
                        "its end is lost: call trajectory(), bank() or captured() before they are trained on or "
                        "loaded, and change them before step() if that is part of it"
                    )
                self._write_checkpoint()
            options.setdefault("segments", self._groups())
            processes.wait()
        return super().stage(**options)

    def bank(
        self,
        path: str | Path | None = None,
        *,
        after: Sequence[CapturedStage] = (),
        storage: str | None = None,
        ids: Sequence[Any] | None = None,
        autocast: str | None = None,
        **options: Unpack[ReadOptions],
    ) -> Bank:
        """Give the bank of all that was captured; training may go on afterwards, and give another one.

        Args:
            path: the bank's folder; default: "bank" in this run's directory.
            after: what Recorders of earlier stages captured, in order, by their :meth:`captured`: the network was
                trained on other data before. Attributed are then the examples of every stage.
            storage: how rows are stored, by the name of a codec; default: by k, see :func:`source_proj.build`.
            ids: ids of the examples, in order of their places; default: the places themselves.
            autocast: "bfloat16" or "float16" for the forward passes of queries.
            **options: ``preconditioner`` ("scalar" or "none"), ``loss_reduction``, ``batch_size``, ``accumulation``, as
                in :class:`Stage`.

        Raises:
            TypeError: this Recorder has no ``capture``, or ``segments`` is given.
            BankError, MismatchError: another bank is there, it cannot be written, or earlier stages were captured by
                other sketches, tasks or parameters.
            ValueError: no step was taken yet, the preconditioner is another, or two stages have one name.
        """
        own = self.captured(ids=ids, **options)
        folder = self.dir / "bank" if path is None else path
        if not self._follows and self._capture is not None:
            write_captured(self._model, self._capture, [*after, own], folder, storage=storage, autocast=autocast)
        processes.wait()
        return Bank(folder)

    def captured(self, *, ids: Sequence[Any] | None = None, **options: Unpack[ReadOptions]) -> CapturedStage:
        """Give what was captured of this stage, for :meth:`bank` of the Recorder of a later one.

        The Recorders of one model follow each other: call this at the end of a stage, which records its last step, then
        :meth:`close`, and make the next one.

        Args:
            ids: ids of the examples, in order of their places; default: the places themselves.
            **options: as for :meth:`bank`.

        Raises:
            TypeError: this Recorder has no ``capture``, or ``segments`` is given.
            ValueError: no step was taken yet, or the preconditioner is another.

        Example:
            >>> import tempfile
            >>> import source_proj as sp
            >>> model, directory = nn.Linear(4, 3), tempfile.mkdtemp()
            >>> def train(stage, size, after=()):
            ...     inputs, labels = torch.randn(size, 4), torch.randint(3, (size,))
            ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            ...     recorder = Recorder(
            ...         model, optimizer, f"{directory}/{stage}", stage=stage,
            ...         capture=sp.Sketch(8), task=sp.Classification(),
            ...     )
            ...     optimizer.zero_grad()
            ...     nn.functional.cross_entropy(model(inputs), labels).backward()
            ...     _ = optimizer.step()
            ...     recorder.step(ids=range(size))
            ...     return recorder
            >>> first = train("first", 10)
            >>> before = first.captured()
            >>> first.close()
            >>> train("second", 6).bank(after=[before]).stages
            (StageBank('first': 10 rows x 1 whole segment), StageBank('second': 6 rows x 1 whole segment))
        """
        if self._capture is None:
            raise TypeError("a Recorder without capture= has no bank: give capture=Sketch(...), or call build()")
        if "segments" in options:
            raise TypeError("segments are those that were captured: give Recorder(segment_ends=...), not segments=")
        stage = self.stage(**options)
        if self._follows:
            return CapturedStage.of(stage, (), 0, None)
        run = RecordedRun.read(self.dir)
        last = [group[-1] for group in self._groups()]
        ends = [] if run is None else [run.checkpoints[place] for place in last]
        return CapturedStage.of(stage, [_content(self.dir, end) for end in ends], self._examples, ids)

    def close(self) -> None:
        """Stop recording and capturing; see :meth:`source_proj.trajectory.Recorder.close`."""
        if self._capture is not None:
            self._capture.close()
        super().close()

    def _groups(self) -> list[list[int]]:
        """Which checkpoints are in each captured segment."""
        groups: list[list[int]] = [[]]
        checkpoints = self._progress.run.checkpoints
        for place, checkpoint in enumerate(checkpoints):
            groups[-1].append(place)
            if checkpoint.ends_segment and place + 1 < len(checkpoints):
                groups.append([])
        return groups

    def _clip_factor(self, grad_norm: float | Tensor | None) -> float:
        if grad_norm is None or self._max_norm is None:
            return 1.0
        return clip_factor(float(grad_norm), self._max_norm)

    # Several processes: those that follow the first keep nothing on the disk ------------------------------------

    def _open(self, fresh: RecordedRun) -> RecordedRun:
        return fresh if self._follows else super()._open(fresh)

    def _hold(self) -> None:
        if not self._follows:
            super()._hold()

    def _write_checkpoint(self) -> None:
        if self._capture is not None:
            self._capture.merge()
        if not self._follows:
            super()._write_checkpoint()
            return
        progress, ends = self._progress, self._progress.steps in self._ends
        updates = update_runs(progress, self._max_norm)
        checkpoint = RecordedCheckpoint(progress.steps, "", None, updates, None, ends, progress.skipped)
        run = replace(progress.run, checkpoints=(*progress.run.checkpoints, checkpoint), resume="")
        self._progress = Progress(run, [], progress.last_seen)

    def _restore_together(self) -> None:
        """Bring the processes that follow to where the first one is."""
        state = processes.from_first(
            None
            if self._follows
            else {
                "run": self._progress.run,
                "model": self._model.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "also": [thing.state_dict() for thing in self._also],
                "draws": None if self._capture is None else self._capture.draws.content(),
            }
        )
        if self._follows and self._capture is not None:
            self._model.load_state_dict(state["model"])
            self._optimizer.load_state_dict(state["optimizer"])
            for thing, its_state in zip(self._also, state["also"], strict=True):
                thing.load_state_dict(its_state)
            self._capture.restart(None)
            self._capture.draws.restart(state["draws"])
            self._capture.forget_passes()
            self._seen, self._call = [], None
            self._progress = Progress(state["run"], [], self._progress.last_seen)
            self._watch.begin()


def _content(folder: Path, end: RecordedCheckpoint) -> dict[str, Any]:
    """What was captured until the end of a segment.

    Raises:
        MissingFileError, MismatchError: the file has gone, or is not the one that was written.
    """
    file = folder / capture_name(end.step)
    content: dict[str, Any] = load_tensors(file, "record anew in an empty directory", mapped=True)
    check_file(file, end.capture or "")
    return content
