"""One stage of training: its checkpoints in segments, with the learning rate integrated over every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Unpack, get_args

import torch

from source_proj._errors import MismatchError, MissingFileError
from source_proj._io.outputs import from_home
from source_proj.trajectory.checkpoint import Checkpoint
from source_proj.trajectory.counts import checked_count
from source_proj.trajectory.made import Count, MadeUpdates
from source_proj.trajectory.optimizers import SGD, Optimizer, Updates, updates_counted
from source_proj.trajectory.options import ReadOptions, Schedule
from source_proj.trajectory.record import CheckpointRef, PreconditionerMode, StageRecord
from source_proj.trajectory.recording.run_files import RecordedRun
from source_proj.trajectory.schedules import schedule_function
from source_proj.trajectory.segments import Segments, split_segments

__all__ = ["Stage"]


@dataclass(frozen=True, eq=False)
class Stage:
    r"""One stage of training: its checkpoints, its optimizer, its segments.

    A segment covers the optimizer steps after the end of the one before it, up to the step of its last checkpoint;
    its time scale is :math:`s_l = \sum η_t` over those steps, times the optimizer's ``time_factor``. The sum runs over
    the real steps, not over the learning rates that happen to hold at checkpoints.

    Steps are *optimizer* steps. When gradients of several micro-batches are accumulated, what matters is how they were
    combined. Averaged (each loss divided by their number, as most trainers do): nothing needs saying, leave
    ``accumulation=1``. Summed undivided: give their number as ``accumulation``. Likewise ``loss_reduction="sum"`` means
    that the loss was summed over a batch of ``batch_size``. Both scale the gradient of the mean loss, and therefore the
    learning rate, by :attr:`loss_scale`; the weight decay, which they do not scale, counts divided by it.

    Args:
        name: the stage's name, unique in a trajectory.
        checkpoints: at least one, in order of their steps.
        optimizer: how gradients became steps.
        segments: number of segments, checkpoints split as equally as possible; or lists of checkpoint indices.
        lr_schedule: learning rate of every update. A function gets the update's number in the stage's own count: the
            update that leads from step t to t + 1 is number t. A sequence has one entry for each update from
            ``start_step`` to the last checkpoint. Without it, all checkpoints must name one same ``lr``. Where it is
            given, the checkpoints' ``lr`` is not used.
        start_step: step count at which the stage began.
        loss_reduction: "mean" or "sum" over the batch.
        batch_size: examples in a micro-batch; needed for "sum".
        accumulation: micro-batches whose gradients were summed, undivided, before a step.
        final: the weights at the end, if other than the last checkpoint's (as for averaged parameters).
        preconditioner: what becomes of P of :class:`Adam` or :class:`RMSprop`, a mean over checkpoints.
            ``"scalar"``: a number in place of P, which scales the time and keeps what P does to the trace of the
            Hessian, Σ P v̂ / Σ v̂. ``"shared"``: one P for the stage. ``"per_segment"``: one for each segment, the
            formula to the letter, and the bank holds rows for going from one to the other. ``"factored"`` and
            ``"factored_per_segment"``: the same with an outer product of two vectors in place of P of each matrix
            (first axis, all others), as Adafactor has of v̂, so that a layer's gradient is sketched without being formed
            and a metric is as small as its vectors; other parameters keep their P. ``"none"``: P is ignored,
            and no optimizer state is read; the time scale is then of unknown size. SGD has none in any case. The
            number is the default: gradients in the metric of P spread over more coordinates and want a larger sketch,
            and with one of some thousands the number predicts retraining better on most tasks
            (examples/paper/LABORATORY.md, j).
        clip_factors: what gradient clipping multiplied each update's gradient by, in [0, 1]; given like
            ``lr_schedule``. Weight decay is not clipped.
        time_factors: the optimizer's ``time_factor`` at each update, where it changed on the way (a momentum that goes
            in cycles); given like ``lr_schedule``. Default: the optimizer's one.
        trained: names of the parameters that the optimizer held; None where that is not known. See
            :func:`trained_parameters`. What one stage trained stands still in another that did not.
        label_smoothing: of the loss that was trained with; None where that is not known.
        skipped: numbers of the updates that were not made, as a GradScaler skips some, in the stage's own count. They
            take no time, and the optimizer does not number them. None where that is not known: of the updates of rate
            0, as many count as skipped as the optimizer's own counts at checkpoints say.

    Raises:
        TypeError: an argument is of another kind, as where torch's own optimizer is given.
        ValueError: anything that does not add up; the message names the value.
    """

    name: str
    checkpoints: Sequence[Checkpoint]
    optimizer: Optimizer = SGD()  # noqa: RUF009 (frozen)
    segments: Segments = 1
    lr_schedule: Schedule | None = None
    start_step: int = 0
    loss_reduction: str = "mean"
    batch_size: int | None = None
    accumulation: int = 1
    final: Checkpoint | None = None
    preconditioner: PreconditionerMode = "scalar"
    clip_factors: Schedule | None = None
    time_factors: Schedule | None = None
    trained: Sequence[str] | None = None
    label_smoothing: float | None = None
    skipped: Sequence[int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "checkpoints", self._checked_points())
        self._check_kinds()
        self._check_loss()
        self._check_steps()
        self._check_skipped()
        modes = get_args(PreconditionerMode)
        if self.preconditioner not in modes:
            raise ValueError(f"preconditioner must be one of {', '.join(modes)}, got {self.preconditioner!r}")
        # Cut and integrated once, here, so that a mistake shows where it was made.
        object.__setattr__(self, "_groups", split_segments(len(self.checkpoints), self.segments))
        object.__setattr__(self, "_own_factors", self._step_factors())
        object.__setattr__(self, "_integrals", self._integrate())
        ends = [self.start_step, *(self.checkpoints[group[-1]].step for group in self.segment_indices)]
        for number, (begin, end) in enumerate(pairwise(ends)):
            if begin == end:
                raise ValueError(
                    f"segment {number} of stage {self.name!r} has no optimizer step: it begins and ends at step {end}. "
                    "Join it with the next one, or leave its checkpoint out"
                )

    @property
    def loss_scale(self) -> float:
        """Gradient that went into a step, in units of the mean loss's: batch size for "sum", times accumulation."""
        batch = self.batch_size if self.loss_reduction == "sum" and self.batch_size else 1
        return float(batch * self.accumulation)

    @property
    def segment_indices(self) -> list[list[int]]:
        """Checkpoint indices of each segment."""
        groups: list[list[int]] = self.__dict__["_groups"]
        return [list(group) for group in groups]

    @property
    def lr_integrals(self) -> list[float]:
        """Σ lr · loss_scale · clip over the steps from the stage's start to each checkpoint.

        Times ``time_factors`` where they are given; else without the optimizer's own.
        """
        return list(self.__dict__["_integrals"])

    @classmethod
    def from_recorder(cls, dir: str | Path, **options: Unpack[ReadOptions]) -> Stage:
        """Read back what a :class:`Recorder` wrote, without the model.

        Args:
            dir: the Recorder's directory.
            **options: ``segments``, ``preconditioner``, ``loss_reduction``, ``batch_size``, ``accumulation``.

        Raises:
            MissingFileError: no run was recorded there, or a checkpoint file has gone.
            MismatchError: the directory is foreign, a file of it was changed, or no checkpoint was recorded yet.
        """
        directory = from_home(dir).absolute()
        run = RecordedRun.read(directory)
        if run is None:
            raise MissingFileError(f"no run was recorded in {str(directory)!r}: give the directory of a Recorder")
        if not run.checkpoints:
            raise MismatchError(f"the run in {str(directory)!r} has no checkpoint yet: take a step, then record it")
        return cls(
            run.stage,
            [checkpoint.open(directory) for checkpoint in run.checkpoints],
            run.optimizer,
            lr_schedule=run.rates(),
            clip_factors=run.clip_factors(),
            time_factors=run.time_factors(),
            trained=run.trained,
            skipped=run.skipped(),
            **options,
        )

    def average_parameters(self) -> Stage:
        """Fast-Source's stage: one checkpoint a segment, its parameters the mean over the segment's checkpoints.

        Floating-point buffers are averaged too, others taken from the segment's last checkpoint. Times and the final
        weights stay as they are; a preconditioner is read at the segment's last checkpoint. See
        :meth:`Trajectory.average_parameters`.
        """
        groups = self.segment_indices
        averaged = [_average([self.checkpoints[i] for i in group]) for group in groups]
        made: MadeUpdates | None = self.__dict__.get("_made")  # told by the states of all checkpoints
        return replace(
            self,
            checkpoints=averaged,
            segments=len(averaged),
            final=self.final or self.checkpoints[-1],
            skipped=self.skipped if made is None else [self.start_step + place for place in made.skipped],
        )

    def describe(self) -> StageRecord:
        """The stage's record as far as it is known without a model: no preconditioner is read.

        The optimizer's weight decay is stated for the mean loss, that is, divided by :attr:`loss_scale`.
        """
        optimizer = self.optimizer.with_decay_divided(self.loss_scale)
        return StageRecord(
            name=self.name,
            optimizer=optimizer,
            preconditioner="none",
            loss_scale=self.loss_scale,
            start_step=self.start_step,
            checkpoints=tuple(map(_reference, self.checkpoints)),
            final=_reference(self.final or self.checkpoints[-1]),
            segments=tuple(map(tuple, self.segment_indices)),
            lr_integrals=tuple(self.lr_integrals),
            lr_sums=self._decay_integrals(),
            time_factor=optimizer.time_factor if self.time_factors is None else 1.0,
            scalars=None,
            decays=None,
            metrics=(0,) * len(self.checkpoints),
        )

    def _decay_integrals(self) -> tuple[float, ...] | None:
        """What weight decay is integrated over, where it is not what gradients are: no clip, and perhaps no factor."""
        stepped = self.optimizer.decays_with_steps
        if self.clip_factors is None and (stepped or self.__dict__["_own_factors"] is None):
            return None
        return tuple(self._integrate(clipped=False, stepped=stepped))

    def _checked_points(self) -> tuple[Checkpoint, ...]:
        if isinstance(self.checkpoints, Checkpoint):
            raise TypeError(f"checkpoints must be a list, got one: give [{self.checkpoints!r}]")
        points = tuple(self.checkpoints)  # of a generator, too, which gives them once
        for point in points:
            if isinstance(point, Stage):
                raise TypeError(
                    f"checkpoints holds the stage {point.name!r}: put stages together by Trajectory.from_stages([...])"
                )
            if not isinstance(point, Checkpoint):
                raise TypeError(f"checkpoints must be Checkpoint(state, step) each, got a {type(point).__name__}")
        return points

    def _check_kinds(self) -> None:
        name: object = self.name
        optimizer: object = self.optimizer
        if not isinstance(name, str):
            raise TypeError(f"a stage's name must be a string, got {name!r}: give {str(name)!r}")
        if not isinstance(optimizer, Optimizer):
            known = ", ".join(f"sp.{name}" for name in Optimizer.known)
            given = optimizer if isinstance(optimizer, str | type) else type(optimizer)
            raise TypeError(
                f"optimizer must describe how gradients became steps, as sp.SGD(momentum=0.9) does (one of {known}), "
                f"got {given!r}; a Recorder reads torch's own optimizers by itself"
            )

    def _check_loss(self) -> None:
        if self.loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction must be 'mean' or 'sum', got {self.loss_reduction!r}")
        if self.loss_reduction == "sum" and self.batch_size is None:
            raise ValueError("loss_reduction='sum' needs batch_size, the number of examples that were summed")
        for name, least in (("batch_size", 1), ("accumulation", 1), ("start_step", 0)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, checked_count(name, getattr(self, name), least))

    def _check_steps(self) -> None:
        if not self.checkpoints:
            raise ValueError(f"stage {self.name!r} has no checkpoint: give at least one")
        steps = [c.step for c in self.checkpoints]
        if steps[0] < self.start_step:
            raise ValueError(f"checkpoint at step {steps[0]} lies before start_step={self.start_step}")
        for before, after in pairwise(steps):
            if before >= after:
                raise ValueError(
                    f"checkpoints of stage {self.name!r} must be in order of their steps, but {after} follows {before}"
                )
        if self.final is not None and self.final.step != steps[-1]:
            raise ValueError(
                f"final is at step {self.final.step}, the last checkpoint at {steps[-1]}: the final weights end the "
                "last segment, so add them to checkpoints"
            )

    def _check_skipped(self) -> None:
        if self.skipped is None:
            return
        own = tuple(checked_count("skipped, numbers of updates,", number, self.start_step) for number in self.skipped)
        if own and max(own) >= self.checkpoints[-1].step:
            raise ValueError(
                f"skipped has update {max(own)}, and stage {self.name!r} ends at step {self.checkpoints[-1].step}: the "
                "update that leads from step t to t + 1 is number t"
            )
        object.__setattr__(self, "skipped", own)

    @property
    def interval_times(self) -> list[float] | None:
        """Time from checkpoint to checkpoint, which weighs P at the latter; None where P has no step of its own."""
        if self.__dict__["_own_factors"] is None:
            return None
        return [end - begin for begin, end in pairwise([0.0, *self.lr_integrals])]

    @property
    def plain_shares(self) -> list[float]:
        """Of the time since the checkpoint before each, the share of updates that the optimizer makes without P."""
        steps = [c.step for c in self.checkpoints]
        plain, made = self.optimizer.plain_updates, self.__dict__.get("_made")
        if not plain or made is None or made.before >= plain:
            return [0.0] * len(steps)
        numbers = made.numbers()
        whole = self._update_times(clipped=True, stepped=True)
        intervals = [range(begin, end) for begin, end in pairwise([self.start_step, *steps])]
        totals = [math.fsum(whole(t) for t in interval) for interval in intervals]
        early = [
            math.fsum(whole(t) for t in interval if numbers[t - self.start_step] <= plain) for interval in intervals
        ]
        return [part / total if total else 0.0 for part, total in zip(early, totals, strict=True)]

    def _integrate(self, clipped: bool = True, stepped: bool = True) -> list[float]:
        steps = [c.step for c in self.checkpoints]
        time = self._update_times(clipped, stepped)
        parts = [
            math.fsum(time(t) for t in range(begin, end)) for begin, end in pairwise([self.start_step, *steps])
        ]  # fsum: correctly rounded, so the same on every platform
        return [self.loss_scale * total for total in accumulate(parts)]

    def _update_times(self, clipped: bool, stepped: bool) -> Callable[[int], float]:
        """Learning rate of an update, times all factors of that update."""
        steps = [c.step for c in self.checkpoints]
        rate = self._rate(steps[-1])
        factors = [self._function("clip_factors", steps[-1], 1.0)] if clipped and self.clip_factors is not None else []
        if self.time_factors is not None:
            factors.append(self._function("time_factors", steps[-1], math.inf))
        own: Sequence[float] | None = self.__dict__["_own_factors"] if stepped else None
        if own is not None:
            factors.append(lambda t: own[t - self.start_step])
        skipped = frozenset(self.skipped or ())
        return lambda t: 0.0 if t in skipped else math.prod((factor(t) for factor in factors), start=rate(t))

    def _step_factors(self) -> list[float] | None:
        """What the optimizer makes of each update, where that depends on the step."""
        if self.optimizer.step_factors(Updates([1.0], [1])) is None:
            return None  # before a schedule is asked for every rate a second time, and states are read
        begin, steps = self.start_step, [c.step for c in self.checkpoints]
        rate = self._rate(steps[-1])
        rates = [rate(t) for t in range(begin, steps[-1])]
        made = self._updates_made(rates)
        object.__setattr__(self, "_made", made)
        updates = made.updates(rates, (step - begin for step in steps))
        factors = self.optimizer.step_factors(updates) if updates.rates else None
        return made.spread(factors or ()) if rates else None

    def _updates_made(self, rates: Sequence[float]) -> MadeUpdates:
        """Which updates the optimizer made, and how many before the stage."""
        begin = self.start_step
        with_state = [c for c in self.checkpoints if c.step > begin and c.optimizer_state is not None]
        counts = [Count(c.step - begin, own) for c in with_state if (own := updates_counted(c))]
        made = MadeUpdates.of(rates, None if self.skipped is None else [t - begin for t in self.skipped], counts)
        for first, second in pairwise(counts):
            if made.begun_anew(first, second):
                raise ValueError(
                    f"the optimizer's state was begun anew between steps {begin + first.steps} and "
                    f"{begin + second.steps} of stage {self.name!r}, and {type(self.optimizer).__name__} steps by how "
                    "many steps it made before: make what follows a stage of its own"
                )
        return made

    def _rate(self, last_step: int) -> Callable[[int], float]:
        """Return the learning rate as a checked function of the update's number."""
        if self.lr_schedule is not None:
            return self._function("lr_schedule", last_step, math.inf)
        rates = {c.lr for c in self.checkpoints}
        if len(rates) > 1 or None in rates:
            schedule = "of rates that change, lr_schedule: a function of the step, or one value per optimizer step"
            raise ValueError(f"{self._without_rate()}; {schedule}")
        (constant,) = rates
        return lambda _: constant  # type: ignore[return-value]

    def _without_rate(self) -> str:
        """Say where checkpoints name no learning rate, or several, and what to give."""
        first = next((c for c in self.checkpoints if c.lr is None), None)
        if first is None:
            return f"checkpoints of stage {self.name!r} give the learning rates {[c.lr for c in self.checkpoints]}"
        what = "state" if first.path is None else repr(str(first.path))
        return f"{first} gives no learning rate: give it to each checkpoint, Checkpoint({what}, {first.step}, lr=0.1)"

    def _function(self, name: str, last_step: int, largest: float) -> Callable[[int], float]:
        """Return a schedule as a checked function of the update's number."""
        which = f"{name} of stage {self.name!r}"
        return schedule_function(which, getattr(self, name), range(self.start_step, last_step), largest)


def _reference(checkpoint: Checkpoint) -> CheckpointRef:
    path = None if checkpoint.path is None else str(checkpoint.path)
    return CheckpointRef(checkpoint.step, path, checkpoint.hash())


def _average(checkpoints: Sequence[Checkpoint]) -> Checkpoint:
    """Mean of the floating-point entries, summed in float64, one checkpoint in memory at a time."""
    last = checkpoints[-1]
    if len(checkpoints) == 1:
        return last
    total: dict[str, torch.Tensor] = {}
    for checkpoint in checkpoints:
        state = checkpoint.load()
        for name, value in state.items():
            if value.is_floating_point():
                total[name] = total[name] + value.double() if name in total else value.double()
    mean = {
        name: (total[name] / len(checkpoints)).to(value.dtype) if name in total else value
        for name, value in state.items()
    }
    return Checkpoint(mean, last.step, last.lr, last.optimizer_state)
