"""A callback for the Trainer of transformers that records what the Trainer does not keep."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from source_proj.integrations.callback_log import CallbackLog, callback_stage
from source_proj.trajectory import Segments, Trajectory
from source_proj.trajectory.counts import checked_count
from source_proj.trajectory.optimizers.describe import describe_live

__all__ = ["RecorderCallback"]


class RecorderCallback:
    """Records the learning rate and the gradient norm of every optimizer step, and checkpoints with optimizer state.

    ``Trainer(..., callbacks=[RecorderCallback(dir)])``; afterwards ``Trajectory.from_hf_trainer(dir)`` reads the
    directory. Steps that a GradScaler skips count with a learning rate of 0. Where gradients of one process are no
    whole (several processes), norms are taken from the Trainer's log, which then has to be written at every step
    (``logging_steps=1``). A run that is resumed goes on in the same directory.

    Args:
        dir: directory of this run, made if need be.
        every: record a checkpoint after every so many optimizer steps.
        at: record checkpoints after these numbers of optimizer steps; both may be given. With neither, one is recorded
            whenever the Trainer saves one. The end of training is recorded in any case.

    Raises:
        ValueError: ``every`` or ``at`` is out of range.
    """

    def __init__(self, dir: str | Path, every: int | None = None, at: Iterable[int] | None = None) -> None:
        self.dir = Path(dir).absolute()
        self._every = None if every is None else checked_count("every, in optimizer steps,", every, 1)
        self._at = frozenset(checked_count("at, in optimizer steps,", step, 1) for step in at or ())
        self._log: CallbackLog | None = None
        self._removable: list[Any] = []
        self._squares: dict[int, Tensor] = {}  # by parameter: squared norm of its gradient, before clipping
        self._rate = 0.0  # of the step that the optimizer took since the last one of ours
        self._momentum: float | None = None  # at that step, or at the last one that was taken
        self._norm: float | None = None

    def __getattr__(self, name: str) -> Callable[..., None]:
        # The Trainer tells its callbacks of every event. Those that do not matter are taken here, so that transformers
        # need not be imported for its base class, which does the same.
        if name.startswith("on_"):
            return _ignored
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def trajectory(self, segments: Segments = 1) -> Trajectory:
        """Give what was recorded as a trajectory of one stage."""
        return Trajectory.from_stages([callback_stage(self.dir, segments)])

    def on_train_begin(self, args: Any, state: Any, *_: Any, model: nn.Module, optimizer: Any, **__: Any) -> None:
        """Open the directory, and listen to gradients and to the optimizer.

        Raises:
            ValueError: the optimizer is none that is described, so that its steps could not be read later.
            MismatchError: the run goes on from a step that the directory does not know.
        """
        if not state.is_world_process_zero:
            return
        inner = _innermost(optimizer)
        describe_live(inner, model)
        self._momentum = inner.param_groups[0].get("momentum")
        self._log = CallbackLog.begin(self.dir, int(state.global_step), float(args.max_grad_norm or 0.0))
        self._removable = [inner.register_step_post_hook(self._see_step)]
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

    def on_step_end(self, _args: Any, state: Any, *_: Any, model: nn.Module, optimizer: Any, **__: Any) -> None:
        """Write down the step, and a checkpoint if one is due."""
        if self._log is None:
            return
        step = int(state.global_step)
        self._log.add_step(step, self._rate, self._norm, self._momentum)
        self._rate, self._norm = 0.0, None
        if step in self._at or (self._every is not None and step % self._every == 0):
            self._log.add_checkpoint(step, model, _innermost(optimizer))

    def on_log(self, _args: Any, state: Any, *_: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
        """Take the norm that the Trainer logged."""
        if self._log is not None and logs and "grad_norm" in logs:
            self._log.add_norm(int(state.global_step), float(logs["grad_norm"]))

    def on_save(self, _args: Any, state: Any, *_: Any, model: nn.Module, optimizer: Any, **__: Any) -> None:
        """Record a checkpoint where the Trainer saves one, if nothing else was asked for."""
        if self._log is not None and self._every is None and not self._at:
            self._log.add_checkpoint(int(state.global_step), model, _innermost(optimizer))

    def on_train_end(self, _args: Any, state: Any, *_: Any, model: nn.Module, optimizer: Any, **__: Any) -> None:
        """Record the end, and listen no more."""
        if self._log is not None:
            self._log.add_checkpoint(int(state.global_step), model, _innermost(optimizer))
        for handle in self._removable:
            handle.remove()
        self._removable, self._log = [], None

    def _see_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._rate = float(optimizer.param_groups[0]["lr"])
        self._momentum = optimizer.param_groups[0].get("momentum")

    def _see_gradient(self, parameter: Tensor) -> None:
        # Of every micro-batch, each time with what was accumulated before: the last one counts.
        if parameter.grad is not None:
            self._squares[id(parameter)] = parameter.grad.detach().float().square().sum()


def _ignored(*_: object, **__: object) -> None:
    """An event that needs no answer."""


def _innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer within accelerate's wrappers."""
    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "accelerator_state"):
        optimizer = getattr(optimizer, "optimizer")  # noqa: B009
    return optimizer
