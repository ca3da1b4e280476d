"""A whole training run: one stage after another."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from source_proj.trajectory.checkpoint import Checkpoint
from source_proj.trajectory.optimizers import SGD, Optimizer
from source_proj.trajectory.segments import Segments
from source_proj.trajectory.stages import MetricKind, Schedule, Stage

__all__ = ["Trajectory"]


class Trajectory:
    """A training run: one stage or several, each with checkpoints, an optimizer and segments.

    This constructor makes a run of one stage, named "train"; the arguments are those of :class:`Stage`.

    Example:
        >>> import torch
        >>> weights = torch.zeros(3)
        >>> run = Trajectory([Checkpoint({"w": weights}, step, lr=0.1) for step in (10, 20, 30, 40)], segments=2)
        >>> run.stages[0].segment_indices
        [[0, 1], [2, 3]]
        >>> [round(integral, 6) for integral in run.stages[0].lr_integrals]
        [1.0, 2.0, 3.0, 4.0]
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        optimizer: Optimizer = SGD(),  # noqa: B008 (frozen)
        segments: Segments = 1,
        lr_schedule: Schedule | None = None,
        start_step: int = 0,
        loss_reduction: str = "mean",
        batch_size: int | None = None,
        accumulation: int = 1,
        metric: MetricKind = "scalar",
        clip_factors: Schedule | None = None,
    ) -> None:
        stage = Stage(
            "train",
            checkpoints,
            optimizer,
            segments,
            lr_schedule,
            start_step,
            loss_reduction,
            batch_size,
            accumulation,
            metric=metric,
            clip_factors=clip_factors,
        )
        self.stages: tuple[Stage, ...] = (stage,)

    @classmethod
    def from_stages(cls, stages: Sequence[Stage]) -> Trajectory:
        """Put stages together, in order of time. Each counts its steps from its own ``start_step``.

        Raises:
            ValueError: there is no stage, or two have one name.
        """
        names = [stage.name for stage in stages]
        if not names:
            raise ValueError("a trajectory needs at least one stage, got none")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two stages are named {name!r}: names must differ, got {names}")
        trajectory = cls.__new__(cls)
        trajectory.stages = tuple(stages)
        return trajectory

    @classmethod
    def from_recorder(
        cls,
        dir: str | Path,
        segments: Segments = 1,
        loss_reduction: str = "mean",
        batch_size: int | None = None,
        accumulation: int = 1,
        metric: MetricKind = "scalar",
    ) -> Trajectory:
        """Read back what a :class:`Recorder` wrote, without the model; see :meth:`Stage.from_recorder`."""
        return cls.from_stages([Stage.from_recorder(dir, segments, loss_reduction, batch_size, accumulation, metric)])

    @classmethod
    def from_hf_trainer(
        cls, dir: str | Path, segments: Segments = 1, stage: str = "train", **options: Any
    ) -> Trajectory:
        """Read the ``output_dir`` of a Trainer of transformers.

        Args:
            dir: the directory with folders ``checkpoint-N``.
            segments: as in :class:`Stage`.
            stage: the stage's name.
            **options: ``model``, ``optimizer``, ``learning_rate``, ``schedule``, ``warmup_steps``, ``max_grad_norm``,
                ``steps``, ``metric``; see :func:`source_proj.integrations.hf_trainer_stage`.

        Raises:
            ValueError: something cannot be inferred; the message names the argument to give.
            MismatchError: the files, or an argument and the files, contradict each other.
        """
        return cls.from_stages([_integration("hf_trainer_stage")(dir, segments, stage, **options)])

    @classmethod
    def from_lightning(
        cls, dir: str | Path, segments: Segments = 1, stage: str = "train", **options: Any
    ) -> Trajectory:
        """Read the ``.ckpt`` files that Lightning left in a directory.

        Args:
            dir: the directory with the files, or one above it.
            segments: as in :class:`Stage`.
            stage: the stage's name.
            **options: ``prefix``, ``optimizer``, ``schedule``, ``clip_factors``, ``metrics``, ``steps``, ``unpickle``,
                ``metric``; see :func:`source_proj.integrations.lightning_stage`.

        Raises:
            ValueError: something cannot be inferred; the message names the argument to give.
            MismatchError: the files, or an argument and the files, contradict each other.
        """
        return cls.from_stages([_integration("lightning_stage")(dir, segments, stage, **options)])

    def __repr__(self) -> str:
        parts = (f"{s.name}: {len(s.checkpoints)} checkpoints, {len(s.segment_indices)} segments" for s in self.stages)
        return f"Trajectory({'; '.join(parts)})"

    @property
    def final(self) -> Checkpoint:
        """The weights at the end of the last stage: the model that queries are asked of."""
        last = self.stages[-1]
        return last.final or last.checkpoints[-1]

    def average_parameters(self) -> Trajectory:
        """Fast-Source (Bae et al. 2024, arXiv 2405.12186): one pass a segment, at its averaged parameters.

        Every segment keeps its steps and its time scale, and :attr:`final` stays the true final weights.
        """
        return Trajectory.from_stages([stage.average_parameters() for stage in self.stages])

    def spec(self) -> dict[str, Any]:
        """Describe the trajectory in JSON-able terms; equal specs mean equal runs."""
        return {"stages": [stage.spec() for stage in self.stages]}


def _integration(name: str) -> Any:
    """A function of the room of integrations, which stands above this one: loaded by name, when it is called."""
    return getattr(import_module("source_proj.integrations"), name)
