"""Recording a run from inside any training loop, in three lines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from source_proj._errors import MismatchError
from source_proj.trajectory.checkpoint import matched_state
from source_proj.trajectory.optimizers import Optimizer, Options
from source_proj.trajectory.optimizers.describe import describe_groups, read_groups, second_moments
from source_proj.trajectory.recording.run_files import (
    Record,
    RecordedCheckpoint,
    Update,
    check_hash,
    clip_factor,
    describe_state,
    moments_name,
    resume_name,
    weights_name,
    write_tensors,
)
from source_proj.trajectory.segments import Segments
from source_proj.trajectory.stages import MetricKind, Stage
from source_proj.trajectory.state_files import hash_file
from source_proj.trajectory.trajectory import Trajectory

__all__ = ["Recorder", "Stateful"]


class Stateful(Protocol):
    """Anything whose state can be taken and brought back."""

    def state_dict(self) -> Any:
        """Give the state."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Take the state."""


class Recorder:
    """Records checkpoints, and the learning rate of every step, while a model is trained.

    Call :meth:`step` once after every ``optimizer.step()``, before or after a scheduler's: the learning rate is read
    while the optimizer steps. If it did not step (a GradScaler may skip one), the rate counts as 0.

    A checkpoint counts once everything is on the disk, so a run may be killed at any instant: the same program then
    goes on from the last checkpoint, with the model, the optimizer and torch's random states as they were. Where
    batches follow from the step's number, or from torch's random state, it ends with the very weights of an
    uninterrupted run. Schedulers, GradScalers and the like are brought back too if given as ``also``; call
    :meth:`step` last in the loop then, so that they have done their part when their state is taken.

    Args:
        model: the model that is trained; with several processes, record on one of them, the unwrapped model.
        optimizer: a :class:`torch.optim.SGD`, one set of options for all its parameter groups; or Adam, AdamW or
            RMSprop, whose groups may differ in learning rate and weight decay, and whose second moments are kept with
            each checkpoint.
        dir: directory of this run, made if need be. One stage, one directory.
        every: record after every so many optimizer steps.
        at: record after these numbers of optimizer steps; both may be given. With neither, only
            :meth:`trajectory` records.
        stage: the stage's name.
        also: what else has a ``state_dict()`` and must go on, such as a learning-rate scheduler.
        max_grad_norm: what gradients are clipped to by :func:`torch.nn.utils.clip_grad_norm_`, whose result
            :meth:`step` then wants: a clipped update goes less far, and counts as less time.

    Raises:
        TypeError: the state of a thing in ``also`` is not made of tensors and plain values.
        ValueError: the optimizer is another one, maximizes, has parameter groups that differ in what they must not, or
            trains no parameter of the model; ``every`` or ``at`` is out of range.
        MismatchError: the directory holds another run.

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
    ) -> None:
        self.dir = Path(dir).absolute()
        self._model = model
        self._optimizer = optimizer
        self._every = every
        self._at = frozenset(at or ())
        for value in ([] if every is None else [every]) + sorted(self._at):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"every and at count optimizer steps, from 1 on, got {value!r}")
        if max_grad_norm is not None and not 0 < max_grad_norm < math.inf:
            raise ValueError(f"max_grad_norm must be positive, got {max_grad_norm!r}; leave it out without clipping")
        self._max_norm = max_grad_norm
        self._also = tuple(also)
        _check_restorable(self._also)
        _check_trains(optimizer, model)
        self._record = self._open(Record(stage, self._describe(self._options()), describe_state(model)))
        self._seen: list[Sequence[Options]] = []  # the groups at each of the optimizer's steps since the last of ours
        optimizer.register_step_post_hook(self._see)
        self._steps = self._record.last_step
        self._pending: list[tuple[float, float | Tensor | None]] = []  # rates and norms since the last checkpoint
        self._goes_on = not self._record.checkpoints  # False until restore() where there is something to restore

    @property
    def steps(self) -> int:
        """Optimizer steps taken so far, recorded or not."""
        return self._steps

    def step(self, grad_norm: float | Tensor | None = None) -> None:
        """Count one optimizer step, and record a checkpoint if one is due.

        Args:
            grad_norm: norm of the gradient before it was clipped, as ``clip_grad_norm_`` returns it; wanted with
                ``max_grad_norm`` alone.

        Raises:
            TypeError: there is a norm and no ``max_grad_norm``, or the other way round.
            MismatchError: the optimizer's options changed, it stepped more than once since the last call, or the
                directory holds checkpoints and :meth:`restore` was not called.
            ValueError: the parameter groups have become different; or, with a checkpoint, a norm is NaN.
        """
        if (grad_norm is None) != (self._max_norm is None):
            given, missing = ("max_grad_norm=", "grad_norm=") if grad_norm is None else ("grad_norm=", "max_grad_norm=")
            raise TypeError(
                f"{given} was given without {missing}: clipping is recorded by Recorder(max_grad_norm=c) and "
                "step(grad_norm=clip_grad_norm_(parameters, c))"
            )
        if not self._goes_on:
            raise MismatchError(
                f"{str(self.dir)!r} holds a run of {self._record.last_step} steps: call restore() before training to "
                "go on with it, or give an empty directory"
            )
        options = self._seen[0] if self._seen else self._options()
        rate = float(options[0]["lr"]) if self._seen else 0.0
        if len(self._seen) > 1:
            raise MismatchError(
                f"the optimizer stepped more than once since the recorder's step {self.steps}: "
                "call the recorder's step() after each"
            )
        self._seen.clear()
        settings = self._describe(options, self._record.optimizer)
        if settings != self._record.optimizer:
            raise MismatchError(
                f"the optimizer was {self._record.optimizer}, and is {settings} at step {self.steps + 1}: only the "
                "learning rate may change during a stage; record another stage from here"
            )
        self._steps += 1
        self._pending.append((rate, grad_norm.detach() if isinstance(grad_norm, Tensor) else grad_norm))
        if self.steps in self._at or (self._every is not None and self.steps % self._every == 0):
            self._write_checkpoint()

    def restore(self) -> int:
        """Bring model, optimizer and random states back to the last checkpoint; steps after it are forgotten.

        The optimizer's learning rate, too, becomes what it was then, whatever it was made with now.

        Returns:
            The number of steps taken until then, which is the number of the update to go on with; 0 if nothing was
            recorded (then nothing is touched).

        Raises:
            MismatchError: a recorded file was changed.
        """
        self._goes_on = True
        self._pending, self._steps = [], self._record.last_step
        self._seen.clear()
        if self._record.resume is None:
            return 0
        file, digest = self._record.resume
        last = self._record.checkpoints[-1].open(self.dir)
        state = matched_state(last.load(), self._model, repr(last))
        check_hash(self.dir / file, digest, hash_file(self.dir / file))
        resume = torch.load(self.dir / file, map_location="cpu", weights_only=True)
        if len(resume["also"]) != len(self._also):
            raise MismatchError(f"{len(resume['also'])} things were recorded as also=, and {len(self._also)} are given")
        for thing, its_state in zip(self._also, resume["also"], strict=True):
            thing.load_state_dict(its_state)
        self._model.load_state_dict(state)
        self._optimizer.load_state_dict(resume["optimizer"])
        torch.set_rng_state(resume["cpu_rng"])
        if len(resume["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(resume["cuda_rng"])
        return self._record.last_step

    def stage(
        self,
        segments: Segments = 1,
        loss_reduction: str = "mean",
        batch_size: int | None = None,
        accumulation: int = 1,
        metric: MetricKind = "scalar",
    ) -> Stage:
        """Give the recorded stage, the present weights its last checkpoint; arguments as in :class:`Stage`.

        Raises:
            ValueError: no step was taken yet.
        """
        if self._pending:
            self._write_checkpoint()
        return Stage.from_recorder(self.dir, segments, loss_reduction, batch_size, accumulation, metric)

    def trajectory(
        self,
        segments: Segments = 1,
        loss_reduction: str = "mean",
        batch_size: int | None = None,
        accumulation: int = 1,
        metric: MetricKind = "scalar",
    ) -> Trajectory:
        """Give the trajectory of this one stage, see :meth:`stage`."""
        return Trajectory.from_stages([self.stage(segments, loss_reduction, batch_size, accumulation, metric)])

    def _options(self) -> Sequence[Options]:
        return read_groups(self._optimizer, self._model)

    def _describe(self, groups: Sequence[Options], before: Optimizer | None = None) -> Optimizer:
        return describe_groups(self._optimizer, groups, before)

    def _see(self, *_: object) -> None:
        if len(self._seen) < 2:  # of more, only their being too many matters; a recorder may be idle for a whole stage
            self._seen.append(self._options())

    def _open(self, fresh: Record) -> Record:
        """Go on with the directory's record if it is of this run, or begin one."""
        if self.dir.exists() and not self.dir.is_dir():
            raise ValueError(f"{str(self.dir)!r} is a file: give a directory")
        self.dir.mkdir(parents=True, exist_ok=True)
        found = Record.read(self.dir)
        if found is None:
            # At once, so that the checkpoints to come have an owner.
            fresh.write(self.dir)
            return fresh
        differing = [n for n in (*found.state, *fresh.state) if found.state.get(n) != fresh.state.get(n)]
        if differing:
            name = differing[0]
            raise MismatchError(
                f"{str(self.dir)!r} holds a run of another model: {name} is {found.state.get(name, 'absent')} there "
                f"and {fresh.state.get(name, 'absent')} here; give an empty directory"
            )
        for what in ("stage", "optimizer"):
            there, here = getattr(found, what), getattr(fresh, what)
            if there != here:
                raise MismatchError(
                    f"{str(self.dir)!r} holds a run whose {what} is {there!r}, not {here!r}: give an empty directory"
                )
        return found

    def _updates(self) -> list[Update]:
        """What is pending, norms turned into the factors by which clip_grad_norm_ multiplies; waits for a GPU."""
        if self._max_norm is None:
            return [(rate, 1.0) for rate, _ in self._pending]
        norms = [float(norm or 0.0) for _, norm in self._pending]
        for index, norm in enumerate(norms):
            if math.isnan(norm) and self._pending[index][0]:
                step = self.steps - len(norms) + index + 1
                raise ValueError(f"the gradient's norm at step {step} is NaN, and so is every weight after that step")
        return [
            (rate, clip_factor(norm, self._max_norm) if rate else 1.0)
            for (rate, _), norm in zip(self._pending, norms, strict=True)
        ]

    def _write_checkpoint(self) -> None:
        step, updates = self.steps, self._updates()
        state = {name: value.detach().cpu() for name, value in self._model.state_dict().items()}
        resume = {
            "optimizer": self._optimizer.state_dict(),
            "also": [thing.state_dict() for thing in self._also],
            "cpu_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        weights_hash = write_tensors(self.dir / weights_name(step), state)
        resume_hash = write_tensors(self.dir / resume_name(step), resume)
        moments: tuple[str, str] | None = None
        if self._record.optimizer.preconditioned:
            content = second_moments(self._optimizer, self._model)
            moments = moments_name(step), write_tensors(self.dir / moments_name(step), content)
        checkpoint = RecordedCheckpoint(step, weights_name(step), weights_hash, updates, moments)
        self._record.checkpoints.append(checkpoint)
        self._record.resume = (resume_name(step), resume_hash)
        self._record.write(self.dir)
        self._pending = []
        for name in self._record.superseded():
            (self.dir / name).unlink(missing_ok=True)


def _check_restorable(things: Sequence[Stateful]) -> None:
    """Find out now, and not after a kill, whether a state can be read back without running foreign code."""
    for thing in things:
        file = BytesIO()
        torch.save(thing.state_dict(), file)
        try:
            torch.load(BytesIO(file.getvalue()), weights_only=True)
        except UnpicklingError as error:
            raise TypeError(
                f"the state of {type(thing).__name__} (in also=) holds more than tensors and plain values: {error}"
            ) from error


def _check_trains(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(
            f"the optimizer trains no parameter of the model {type(model).__name__}: give the model it was made for"
        )
