"""Capture while training: from the passes of a training loop to the sums of its segments."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from source_proj._errors import GradientError, MismatchError
from source_proj.bank.build.parameters import spec_of
from source_proj.bank.capture import processes
from source_proj.bank.capture.draws import DrawnLabels
from source_proj.bank.capture.law import LawOfStep, checked_law
from source_proj.bank.capture.places import places_of
from source_proj.bank.capture.sums import Memory, SegmentSums
from source_proj.gradients import ParameterSpace, nonfinite_examples
from source_proj.gradients.proof import drawn
from source_proj.gradients.training import TrainingPass, TrainingPath
from source_proj.sketch import Sketch
from source_proj.sketch.columns import kept_blocks
from source_proj.task import Task
from source_proj.task.base import per_example
from source_proj.trajectory.recording.progress import scale_left

__all__ = ["Capture"]

_ALWAYS, _SAMPLED = 3, 32  # steps that are audited: so many at first, and then one in so many


class Capture:
    """Captures sketched loss gradients of every example at every step that an optimizer takes.

    The rows of each step are held to the law Σ_b row_b = R p.grad (times what clipping made of it): at the first steps,
    after each resume too, and at one in 32 from then on, before the optimizer uses the gradient.

    Args:
        model: the module that is trained.
        optimizer: its optimizer.
        sketch: the projection.
        task: what is trained on; says what weighs rows in the empirical Fisher.
        folder: where sums lie that are kept on the disk.
        parameters: globs of the parameters to attribute through; default: those that the optimizer holds.
        parameter_weights: numbers by glob that their gradients are multiplied by; default: 1.
        examples: number of training examples N; default: one more than the largest index seen.
        memory: "ram" or "disk", for N x k float32 sums.
        scaler: what scales the loss, where something does.
        clipped: whether gradients may be clipped by their norm before a step.
        draw_every: draw labels at one step in so many, 0 for never; see :class:`DrawnLabels`.

    Attributes:
        space: the attributed parameters.
        draws: when labels are drawn, and of which passes they were.

    Raises:
        GradientError: rows can't be captured of this model; says why.
        TypeError: an argument is of another type.
        ValueError: the task divides by a number that is not told yet, or another argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        sketch: Sketch,
        task: Task,
        folder: Path,
        *,
        parameters: Sequence[str] | None = None,
        parameter_weights: Mapping[str, float] | str | None = None,
        examples: int | None = None,
        memory: Memory = "ram",
        scaler: GradScaler | None = None,
        clipped: bool = False,
        draw_every: int | None = None,
    ) -> None:
        if not isinstance(sketch, Sketch) or not isinstance(task, Task):
            raise TypeError(
                f"capture= must be a Sketch and task= a Task, got {type(sketch).__name__} and {type(task).__name__}"
            )
        if task.needs_normalizer:
            raise ValueError(
                f"{task!r} divides losses by a mean over the training set, which no step knows: give it as normalizer="
            )
        self.sketch, self.task = sketch, task
        self.space = _held_space(model, optimizer, parameters)
        if parameter_weights == "none":
            parameter_weights = None
        if parameter_weights is not None and not isinstance(parameter_weights, Mapping):
            raise TypeError(
                "parameter_weights of a capture are numbers by glob, such as bank.parameter_weights of an earlier "
                f"run, as nothing can be measured before training; got {parameter_weights!r}"
            )
        if parameter_weights:
            self.space = self.space.weighted(parameter_weights, model)
        self._examples, self._scaler, self._clipped = examples, scaler, clipped
        self._parameters = self.space.parameters(model)
        self._model, self._optimizer, self._choice = model, optimizer, parameters
        self._usual = self._seen = 1  # passes of a step, and those that had come when the optimizer stepped
        self._needs_batch = _needs_batch(task)
        self.draws = DrawnLabels(task, draw_every, sketch.dim, sketch.seed, scaler)
        self._path = TrainingPath(model, self.space, sketch)
        device = next(iter(self._parameters.values())).device
        self._sums = SegmentSums(kept_blocks(sketch), examples, memory, folder, device)
        self._audits: Counter[str] = Counter()
        self._worst = 0.0
        self._steps = 0  # of the optimizer since `begin_session`
        self._law: LawOfStep | None = None
        self._scale, self._size = 1.0, 0.0
        reference = weakref.WeakMethod(self._before_step)

        def before_step(_: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            alive = reference()
            if alive is not None:
                closed = any(map(callable, (*args[1:], kwargs.get("closure"))))  # the first is the optimizer
                alive(closed)

        self._handles = [optimizer.register_step_pre_hook(before_step)]
        if processes.count() > 1:
            self._handles.append(model.register_forward_pre_hook(processes.refuse_join))
        self.forget_passes()

    def close(self) -> None:
        """Capture no more."""
        for handle in self._handles:
            handle.remove()
        self._path.close()

    # Steps -----------------------------------------------------------------------------------------------------

    def add_step(self, rate: float, ids: Any, batch: Any, clip_factor: Callable[[], float]) -> None:
        """Add the passes since the last step to the sums of the segment.

        Args:
            rate: the step's learning rate; of a step that was skipped, 0.
            ids: which examples the passes were of, in their order; None where the batches said so.
            batch: the batch as the task takes it, where it weighs rows in the empirical Fisher.
            clip_factor: says what clipping multiplied the gradient by; asked where the step is audited.

        Raises:
            GradientError: nothing was captured, or a row is not finite.
            MismatchError: ids are not as many as examples, or the gradient was multiplied by another factor.
            TypeError: ids are none.
            ValueError: an id is out of range, or the task needs the batch and none was given.
        """
        passes, law = [each for each in self._path.passes if each.reached], self._law
        factors = None
        if rate > 0:
            if len(passes) > self._seen:
                raise GradientError(_CLOSURE)
            if law is not None:
                law.require_factor(clip_factor())
            index = places_of(passes, ids, self._examples)
            rows = torch.cat([each.rows for each in passes]) * (self._size / self._scale)
            bad = nonfinite_examples(rows)
            if bad:
                raise GradientError(f"the loss gradients of ids {[int(index[b]) for b in bad][:10]} are not finite")
            factors, share = self._factors(passes, rows, batch)
            self._sums.add(index, rows, rate, factors, share, len(passes))
            if law is not None:
                self._audits.update(audited_batches=1, audited_examples=len(index))
                self._worst = max(self._worst, law.error)
            self._audits.update(examples=len(index))
        self.draws.count_step(0 if factors is None else len(factors))
        self.forget_passes()

    def forget_passes(self) -> None:
        """Let passes go that no step was made of."""
        self._path.clear()
        self._law = None
        self._path.watched = _is_audited(self._steps)
        self._path.sampler = self.draws if self.draws.due else None

    def _before_step(self, closed: bool = False) -> None:
        """Hold the rows to the law before the optimizer uses the gradient; ``closed`` if it was given a closure."""
        if self._path.interrupted:
            self.forget_passes()
            raise GradientError(_INTERRUPTED)
        self._require_all_captured()
        passes = [each for each in self._path.passes if each.reached]
        self._scale = 1.0 if self._scaler is None else float(self._scaler.get_scale())
        left = scale_left(self._optimizer)
        if left != 1.0 and self._scaler is None:
            raise GradientError(
                f"the gradients of the fused {type(self._optimizer).__name__} are still multiplied by {left:.6g}, the "
                "scale of a GradScaler that is not in also=: give it, Recorder(..., also=[scaler]), or rows would be "
                "as many times too long"
            )
        self._steps += 1
        self._seen = len(passes)
        # Gradients are means over processes, of however many examples each. Where there are more passes than at other
        # steps, some may be of a gradient that was zeroed; one process sees it for all, which audit together.
        self._size, unusual = processes.means(sum(each.size for each in passes), self._seen != self._usual)
        if closed and not passes:
            raise GradientError(_CLOSURE)
        if not passes:
            if any(p.grad is not None and bool(p.grad.any()) for p in self._parameters.values()):
                raise GradientError(
                    "the optimizer steps, and no pass of the model was captured since its last step: call the module "
                    "itself, in training mode (model.train(); single modules may be in evaluation mode), not compiled"
                )
            return
        if self._path.watched or unusual:
            gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
            self._law = checked_law(
                passes, gradients, self.sketch, self.space, self._scale, left=left, clipped=self._clipped
            )
            self._usual = len(passes)

    def _require_all_captured(self) -> None:
        """Refuse parameters that are trained and not captured, or captured and not trained.

        Raises:
            GradientError: one was frozen since, the optimizer holds one with a gradient that was not there, or a group
                of captured ones has a learning rate of 0 beside others.
        """
        frozen = [name for name, p in self._parameters.items() if not p.requires_grad]
        if frozen:
            raise GradientError(
                f"{frozen[:5]} were frozen since capture began: make a Recorder of a stage of its own when parameters "
                f"are frozen, or leave them out by parameters={[f'!{name}' for name in frozen[:5]]}"
            )
        groups = self._optimizer.param_groups
        if self._choice is None:
            own = {id(p) for p in self._parameters.values()}
            held = {id(p) for group in groups for p in group["params"] if p.requires_grad and p.grad is not None}
            unknown = held - own  # seldom any: a walk through the model at each step would cost
            names = [name for name, p in self._model.named_parameters() if id(p) in unknown] if unknown else []
            if names:
                raise GradientError(
                    f"{names[:5]} are trained, and were not when capture began: make a Recorder, of a stage of its "
                    "own, when parameters are added or unfrozen, or leave them out by parameters=[...]"
                )
        if any(float(group["lr"]) > 0 for group in groups):
            still = {id(p) for group in groups if float(group["lr"]) == 0 for p in group["params"]}
            names = [name for name, p in self._parameters.items() if id(p) in still]
            if names:
                raise GradientError(
                    f"{names[:5]} have a learning rate of 0 while others are trained, so that nothing is learnt "
                    f"through them: leave them out by parameters={[f'!{name}' for name in names[:5]]}"
                )

    def _factors(self, passes: Sequence[TrainingPass], rows: Tensor, batch: Any) -> tuple[Tensor | None, int]:
        """What the step adds to Ĥ, and for how many steps it stands.

        Rows of drawn labels, where it has them; or the rows themselves, as their empirical Fisher.
        """
        if self.draws.kind == "empirical_fisher":
            weight = self._fisher_weight(passes, batch)
            if weight is not None:
                rows = rows * per_example(weight, "fisher_weight", len(rows)).to(rows)[:, None]
            return rows, 1
        drawn = [each.sampled * (each.size / self._scale) for each in passes if each.sampled is not None]
        if not drawn:
            return None, 1
        factors = torch.cat(drawn)
        bad = nonfinite_examples(factors)
        if bad and self._scaler is None:
            raise GradientError(
                f"the gradients of labels drawn for {bad[:10]} of the step's examples are not finite: train in float32 "
                "or bfloat16, or say draw_every=0"
            )
        if bad:  # halves that were scaled too far
            factors = factors[torch.isfinite(factors).all(dim=1)]
        return factors if len(factors) else None, self.draws.interval

    def _fisher_weight(self, passes: Sequence[TrainingPass], batch: Any) -> Tensor | None:
        if not self._needs_batch:
            return None
        batches = [each.batch for each in passes if each.batch is not None] if batch is None else [batch]
        if batch is None and len(batches) < len(passes):
            raise ValueError(
                f"the empirical Fisher of {self.task!r} weighs examples by what their batch holds: give the whole "
                "step's batch, step(batch=...), as the task takes it (a Trainer gives it with the model's arguments, "
                "but for label_smoothing_factor and compute_loss_func)"
            )
        weights = [self.task.fisher_weight(each) for each in batches]
        return None if None in weights else torch.cat(weights)  # type: ignore[arg-type]

    # What is kept ----------------------------------------------------------------------------------------------

    def content(self) -> dict[str, Any]:
        """What is kept with a checkpoint: the sums of its segment so far, and what they are of."""
        audit = {**{name: self._audits[name] for name in _COUNTED}, "worst_error": self._worst}
        return {**self._sums.content(), **self.draws.content(), "audit": audit, "identity": self.identity()}

    def restart(self, content: dict[str, Any] | None) -> None:
        """Go on from what was kept; with None, begin a segment.

        Raises:
            MismatchError: it was captured by another sketch, task or parameters.
        """
        self._audits.clear()
        self._worst = 0.0
        self.draws.restart(content)
        if content is None:
            self._sums.clear()
        else:
            # Rows are freed of passes, and curvature is flat, since.
            if "passes" not in content or content["curvature"].ndim > 1:
                raise MismatchError(
                    "the capture was recorded by an older version, and cannot be gone on with: record the run anew in "
                    "another directory"
                )
            own, there = self.identity(), content["identity"]
            for name, value in own.items():
                if there[name] != value:
                    raise MismatchError(f"the {name} of the recorded capture is {there[name]!r}, got {value!r}")
            self._sums.load(content)
            self._audits.update({name: content["audit"][name] for name in _COUNTED})
            self._worst = content["audit"]["worst_error"]
        self.forget_passes()

    def begin_session(self) -> None:
        """Audit the coming steps, as the first ones of a process."""
        self._steps = 0
        self.forget_passes()

    def merge(self) -> None:
        """Add up what the processes of a distributed run captured, on the first of them; the others begin anew."""
        self._sums.merge(processes.sum_to_first, processes.largest)

    def identity(self) -> dict[str, Any]:
        """What rows depend on besides model and data."""
        return {"sketch": self.sketch.spec(), "task": self.task.spec(), "parameters": spec_of(self.space, {})}


_CLOSURE = (
    "a pass came after the optimizer began its step, as by optimizer.step(closure), or before recorder.step(): no rows "
    "can be held to its gradient. Call backward(), optimizer.step() and recorder.step() one after the other"
)
_INTERRUPTED = (
    "a forward pass of the model did not end (it was interrupted), and the passes since were taken for a part of it: "
    "repeat this step from zero_grad() on, or restore()"
)
_COUNTED = ("examples", "audited_batches", "audited_examples")


def _is_audited(step: int) -> bool:
    """Whether a step is held to the law, by a draw: every n-th could always miss what a loop does in turns."""
    return step < _ALWAYS or drawn("step", step) % _SAMPLED == 0


def _held_space(model: nn.Module, optimizer: torch.optim.Optimizer, parameters: Sequence[str] | None) -> ParameterSpace:
    """The chosen parameters, of those that the optimizer holds."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    names = [name for name, p in model.named_parameters() if id(p) in held]
    if parameters is None:
        return ParameterSpace.of_names(model, names)
    chosen = ParameterSpace.from_model(model, parameters)
    if all(pattern.startswith("!") for pattern in parameters):  # all but these, of those that are trained
        return ParameterSpace.of_names(model, [name for name in chosen.names if name in names])
    foreign = [name for name in chosen.names if name not in names]
    if foreign:
        raise ValueError(
            f"parameters={list(parameters)} name {foreign[:5]}, which the optimizer doesn't train: leave them out"
        )
    return chosen


def _needs_batch(task: Task) -> bool:
    """Whether the task weighs rows in the empirical Fisher by what a batch holds."""
    try:
        return task.fisher_weight(None) is not None
    except (TypeError, ValueError, AttributeError):
        return True
