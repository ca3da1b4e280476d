"""A callback for the Trainer of transformers that records what the Trainer does not keep."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from source_proj._io.outputs import local_path
from source_proj.bank import Bank
from source_proj.bank.capture import Capture, CapturedStage, write_captured
from source_proj.bank.capture.sums import Memory
from source_proj.integrations.callback_log import CallbackLog, callback_stage
from source_proj.integrations.callback_settings import RunSettings
from source_proj.sketch import Sketch
from source_proj.task import Task
from source_proj.trajectory import PreconditionerMode, Segments, Trajectory, weights_stamp
from source_proj.trajectory.counts import checked_count
from source_proj.trajectory.optimizers.describe import describe_live
from source_proj.trajectory.recording.arguments import innermost
from source_proj.trajectory.recording.progress import skips_step
from source_proj.trajectory.recording.run_files import clip_factor

__all__ = ["RecorderCallback"]


class RecorderCallback:
    """Records the learning rate and the gradient norm of every optimizer step, and checkpoints with optimizer state.

    ``Trainer(..., callbacks=[RecorderCallback(dir)])``; afterwards ``Trajectory.from_hf_trainer(dir)`` reads the
    directory. Steps that a GradScaler skips are written down as such: they take no time, and the optimizer does not
    number them. Where gradients of one process are no whole (several processes), norms are taken from the Trainer's
    log, which then has to be written at every step (``logging_steps=1``). A run that is resumed goes on in the same
    directory; one that begins anew wants an empty one.

    Args:
        dir: directory of this run, made if need be.
        every: record a checkpoint after every so many optimizer steps.
        at: record checkpoints after these numbers of optimizer steps; both may be given. With neither, one is recorded
            whenever the Trainer saves one. The end of training is recorded in any case.
        capture: a sketch, to capture the rows of a bank too, as :class:`source_proj.Recorder` does; :meth:`bank` gives
            it. Train on an :class:`source_proj.IndexedDataset`, with ``remove_unused_columns=False`` so that the
            collator gets to see its "index", and in one process. A run can be resumed from its last two checkpoints.
        task: what is trained on; needed with ``capture``.
        parameters: as for the Recorder, as are ``examples``, ``segment_ends``, ``memory`` and ``draw_every``.
        parameter_weights: numbers by glob that gradients are multiplied by, of an earlier bank; default: 1.
        examples: number of training examples.
        segment_ends: optimizer steps at which a captured segment ends.
        memory: "ram" or "disk".
        draw_every: draw labels for the sampled Fisher at one step in so many; 0 for never.
        accumulation: micro-batches whose gradients are summed undivided before a step, 1 where they are averaged.
            Default: as the Trainer does with the model's own loss; it does not tell of another one
            (``compute_loss_func``, an overridden ``compute_loss``).

    Raises:
        TypeError: ``capture`` is given without ``task``.
        ValueError: ``every`` or ``at`` is out of range, or ``dir`` is a URL.
    """

    def __init__(
        self,
        dir: str | Path,
        every: int | None = None,
        at: Iterable[int] | None = None,
        *,
        capture: Sketch | None = None,
        task: Task | None = None,
        parameters: Sequence[str] | None = None,
        parameter_weights: Mapping[str, float] | str | None = None,
        examples: int | None = None,
        segment_ends: Iterable[int] = (),
        memory: Memory = "ram",
        draw_every: int | None = None,
        accumulation: int | None = None,
    ) -> None:
        self.dir = local_path(dir).absolute()
        if (capture is None) != (task is None):
            raise TypeError("capture= and task= go together: give capture=Sketch(...) and task=CausalLM(), say")
        self._ends = frozenset(checked_count("segment_ends, in optimizer steps,", step, 1) for step in segment_ends)
        self._sketch, self._task = capture, task
        self._options: dict[str, Any] = {
            "parameters": parameters,
            "parameter_weights": parameter_weights,
            "examples": examples,
            "memory": memory,
            "draw_every": draw_every,
        }
        self._accumulation = None if accumulation is None else checked_count("accumulation", accumulation, 1)
        self._capture: Capture | None = None
        self._model: nn.Module | None = None
        self._max_norm = 0.0
        self._every = None if every is None else checked_count("every, in optimizer steps,", every, 1)
        self._given_at = frozenset(checked_count("at, in optimizer steps,", step, 1) for step in at or ())
        self._at = self._given_at | self._ends
        self._log: CallbackLog | None = None
        self._removable: list[Any] = []
        self._squares: dict[int, Tensor] = {}  # by parameter: squared norm of its gradient, before clipping
        self._rate: float | None = None  # of the update that the optimizer made since the last step of ours
        self._momentum: float | None = None  # at that step, or at the last one that was taken
        self._norm: float | None = None
        self._weights: int | None = None  # after the last step

    def __getattr__(self, name: str) -> Callable[..., None]:
        # The Trainer tells its callbacks of every event. Those that do not matter are taken here, so that transformers
        # need not be imported for its base class, which does the same.
        if name.startswith("on_"):
            return _ignored
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def trajectory(self, segments: Segments = 1) -> Trajectory:
        """Give what was recorded as a trajectory of one stage."""
        return Trajectory.from_stages([callback_stage(self.dir, segments)])

    def bank(
        self,
        path: str | Path | None = None,
        *,
        after: Sequence[CapturedStage] = (),
        stage: str = "train",
        storage: str | None = None,
        ids: Sequence[Any] | None = None,
        autocast: str | None = None,
        preconditioner: PreconditionerMode = "scalar",
    ) -> Bank:
        """Give the bank of what was captured, once training has ended; see :meth:`source_proj.Recorder.bank`.

        Raises:
            TypeError: nothing was captured.
        """
        model, capture = self._require_captured()
        own = self.captured(stage=stage, ids=ids, preconditioner=preconditioner)
        folder = self.dir / "bank" if path is None else path
        return write_captured(model, capture, [*after, own], folder, storage=storage, autocast=autocast)

    def captured(
        self,
        *,
        stage: str = "train",
        ids: Sequence[Any] | None = None,
        preconditioner: PreconditionerMode = "scalar",
    ) -> CapturedStage:
        """Give what was captured, for :meth:`bank` of a later stage; see :meth:`source_proj.Recorder.captured`.

        Raises:
            TypeError: nothing was captured.
        """
        self._require_captured()
        log = CallbackLog.open(self.dir)
        groups: list[list[int]] = [[]]
        last: list[int] = []
        steps = sorted(log.checkpoints)
        for place, step in enumerate(steps):
            groups[-1].append(place)
            if place + 1 == len(steps) or (step in log.captures and log.captures[step][1]):
                last.append(step)
                groups.append([])
        recorded = callback_stage(self.dir, groups[:-1], stage, preconditioner=preconditioner)
        return CapturedStage.of(recorded, [log.captured(step) for step in last], self._options["examples"], ids)

    def _require_captured(self) -> tuple[nn.Module, Capture]:
        if self._capture is None or self._model is None:
            raise TypeError("nothing was captured: give RecorderCallback(capture=Sketch(...), task=...), and train")
        return self._model, self._capture

    def on_train_begin(self, args: Any, state: Any, *_: Any, model: nn.Module, optimizer: Any, **__: Any) -> None:
        """Open the directory, and listen to gradients and to the optimizer.

        Raises:
            ValueError: the optimizer is none that is described, so that its steps could not be read later.
            MismatchError: the run goes on from a step that the directory does not know, or with another loss; or it
                begins anew, and the directory holds a run.
        """
        if not state.is_world_process_zero:
            return
        inner = innermost(optimizer)
        describe_live(inner, model)
        self._momentum = inner.param_groups[0].get("momentum")
        given_up = self._log is not None  # as by auto_find_batch_size, which begins again after running out of memory
        self._release()
        step, settings = int(state.global_step), RunSettings.of(args, model, self._accumulation)
        self._log = CallbackLog.begin(self.dir, step, settings, given_up=given_up)
        self._removable = [inner.register_step_post_hook(self._see_step)]
        if self._sketch is not None and self._task is not None:
            self._begin_capture(args, step, model, optimizer, self._sketch, self._task)
        if args.world_size == 1 and args.max_grad_norm:
            self._removable += [
                p.register_post_accumulate_grad_hook(self._see_gradient) for p in model.parameters() if p.requires_grad
            ]

    def on_pre_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
        """Take the norm of the whole gradient as it was before clipping."""
        if self._squares:
            total = torch.stack([square.to("cpu") for square in self._squares.values()]).sum().sqrt()
            scaler = getattr(optimizer, "scaler", None)
            self._norm = float(total) / (float(scaler.get_scale()) if scaler is not None else 1.0)
            self._squares.clear()

    def on_step_end(
        self, _args: Any, state: Any, control: Any, *_: Any, model: nn.Module, optimizer: Any, **__: Any
    ) -> None:
        """Write down the step, and a checkpoint if one is due, or the end."""
        if self._log is None:
            return
        step = int(state.global_step)
        self._log.add_step(step, self._rate, self._norm, self._momentum)
        if self._capture is not None:
            self._capture.add_step(self._rate or 0.0, None, None, self._clip_factor)
        self._rate, self._norm, self._weights = None, None, weights_stamp(model.parameters())
        # The end is recorded here: `load_best_model_at_end` brings other weights before `on_train_end`.
        ends = step >= state.max_steps or bool(getattr(control, "should_training_stop", False))
        if ends or step in self._at or (self._every is not None and step % self._every == 0):
            self._keep_capture(step)
            self._log.add_checkpoint(step, model, innermost(optimizer))

    def on_log(self, _args: Any, state: Any, *_: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
        """Take the norm that the Trainer logged."""
        if self._log is not None and logs and "grad_norm" in logs:
            self._log.add_norm(int(state.global_step), float(logs["grad_norm"]))

    def on_save(self, _args: Any, state: Any, *_: Any, model: nn.Module, optimizer: Any, **__: Any) -> None:
        """Record a checkpoint where the Trainer saves one, if nothing else was asked for."""
        self._keep_capture(int(state.global_step))
        if self._log is not None and self._every is None and not self._given_at:
            self._log.add_checkpoint(int(state.global_step), model, innermost(optimizer))

    def on_train_end(self, _args: Any, state: Any, *_: Any, model: nn.Module, optimizer: Any, **__: Any) -> None:
        """Record the end, and listen no more.

        Warns:
            UserWarning: the weights are no longer those of the last step, and a checkpoint of it was not due.
        """
        self._keep_capture(int(state.global_step))
        if self._log is not None and int(state.global_step) not in self._log.checkpoints:
            if self._weights in (None, weights_stamp(model.parameters())):
                self._log.add_checkpoint(int(state.global_step), model, innermost(optimizer))
            else:
                warnings.warn(
                    f"the weights after training are not those of its last step, {state.global_step}, as with "
                    "load_best_model_at_end: what was recorded ends at the last checkpoint before. Give every= or at= "
                    "so that the last step has one",
                    UserWarning,
                    stacklevel=2,
                )
        self._release()

    def _release(self) -> None:
        """Listen no more."""
        if self._capture is not None:
            self._capture.close()
        for handle in self._removable:
            handle.remove()
        self._removable, self._log = [], None
        self._squares.clear()

    def _begin_capture(
        self, args: Any, step: int, model: nn.Module, optimizer: Any, sketch: Sketch, task: Task
    ) -> None:
        """Capture from here on, with the sums of the step that the run goes on from.

        Raises:
            ValueError: there are several processes.
        """
        if args.world_size > 1:
            raise ValueError(
                f"capture= of a Trainer counts on one process, got {args.world_size}: write the loop with sp.Recorder, "
                "which adds up what its processes captured"
            )
        log = CallbackLog.open(self.dir)
        self._model, self._max_norm = model, float(args.max_grad_norm or 0.0)
        self._capture = Capture(
            model,
            innermost(optimizer),
            sketch,
            task,
            self.dir,
            scaler=getattr(optimizer, "scaler", None),
            clipped=self._max_norm > 0,
            **self._options,
        )
        ended = step in log.captures and log.captures[step][1]
        self._capture.restart(None if step == 0 or ended else log.captured(step))

    def _keep_capture(self, step: int) -> None:
        if self._capture is not None and self._log is not None and step not in self._log.captures:
            ends = step in self._ends
            self._log.add_capture(step, self._capture.content(), ends_segment=ends)
            if ends:
                self._capture.restart(None)

    def _clip_factor(self) -> float:
        return clip_factor(self._norm, self._max_norm) if self._norm is not None and self._max_norm else 1.0

    def _see_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._rate = None if skips_step(optimizer) else float(optimizer.param_groups[0]["lr"])
        self._momentum = optimizer.param_groups[0].get("momentum")

    def _see_gradient(self, parameter: Tensor) -> None:
        # Of every micro-batch, each time with what was accumulated before: the last one counts.
        if parameter.grad is not None:
            self._squares[id(parameter)] = parameter.grad.detach().float().square().sum()


def _ignored(*_: object, **__: object) -> None:
    """An event that needs no answer."""
