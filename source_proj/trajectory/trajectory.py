"""A whole training run: one stage after another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from source_proj._io.html import facts
from source_proj.trajectory.checkpoint import Checkpoint
from source_proj.trajectory.optimizers import SGD, Optimizer
from source_proj.trajectory.options import ReadOptions, Schedule, StageOptions
from source_proj.trajectory.preconditioning import ResolvedRun, resolve_run
from source_proj.trajectory.readers import stage_reader
from source_proj.trajectory.record import PreconditionerMode
from source_proj.trajectory.scale import Coordinates
from source_proj.trajectory.segments import Segments
from source_proj.trajectory.stages import Stage

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
        preconditioner: PreconditionerMode = "scalar",
        **options: Unpack[StageOptions],
    ) -> None:
        stage = Stage(
            "train",
            checkpoints,
            optimizer,
            segments,
            lr_schedule,
            preconditioner=preconditioner,
            **options,
        )
        self.stages: tuple[Stage, ...] = (stage,)

    @classmethod
    def from_stages(cls, stages: Iterable[Stage]) -> Trajectory:
        """Put stages together, in order of time. Each counts its steps from its own ``start_step``.

        Raises:
            TypeError: one of them is no stage.
            ValueError: there is no stage, or two have one name.
        """
        if isinstance(stages, Stage):
            raise TypeError(f"stages must be a list, got the stage {stages.name!r}: give [stage]")
        stages = tuple(stages)  # of a generator, too, which gives them once
        for stage in stages:
            if not isinstance(stage, Stage):
                raise TypeError(
                    f"stages must be a Stage each, got a {type(stage).__name__}: a Recorder gives its own by stage(), "
                    "a Trajectory has them as .stages"
                )
        names = [stage.name for stage in stages]
        if not names:
            raise ValueError("a trajectory needs at least one stage, got none")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two stages are named {name!r}: names must differ, got {names}")
        trajectory = cls.__new__(cls)
        trajectory.stages = stages
        return trajectory

    @classmethod
    def from_recorder(cls, dir: str | Path, **options: Unpack[ReadOptions]) -> Trajectory:
        """Read back what a :class:`Recorder` wrote, without the model; see :meth:`Stage.from_recorder`."""
        return cls.from_stages([Stage.from_recorder(dir, **options)])

    @classmethod
    def from_hf_trainer(
        cls, dir: str | Path, segments: Segments = 1, stage: str = "train", **options: Any
    ) -> Trajectory:
        """Read the ``output_dir`` of a Trainer of transformers.

        Args:
            dir: the directory with folders ``checkpoint-N``.
            segments: as in :class:`Stage`.
            stage: the stage's name.
            **options: ``model``, ``optimizer``, ``learning_rate``, ``schedule``, ``warmup_steps``,
                ``schedule_options``, ``max_grad_norm``, ``steps``, ``accumulation``, ``preconditioner``; see
                :func:`source_proj.integrations.hf_trainer_stage`.

        Raises:
            ValueError: something cannot be inferred; the message names the argument to give.
            MismatchError: the files, or an argument and the files, contradict each other.
        """
        return cls.from_stages([stage_reader("hf_trainer")(dir, segments, stage, **options)])

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
                ``weights``, ``preconditioner``; see :func:`source_proj.integrations.lightning_stage`.

        Raises:
            ValueError: something cannot be inferred; the message names the argument to give.
            MismatchError: the files, or an argument and the files, contradict each other.
        """
        return cls.from_stages([stage_reader("lightning")(dir, segments, stage, **options)])

    def __repr__(self) -> str:
        parts = (
            f"{s.name}: {_counted(len(s.checkpoints), 'checkpoint')}, {_counted(len(s.segment_indices), 'segment')}"
            for s in self.stages
        )
        return f"Trajectory({'; '.join(parts)})"

    def _repr_html_(self) -> str:
        def described(stage: Stage) -> str:
            steps = ", ".join(str(checkpoint.step) for checkpoint in stage.checkpoints)
            return (
                f"checkpoints at steps {steps}; {_counted(len(stage.segment_indices), 'segment')}; {stage.optimizer!r}"
            )

        return facts("Trajectory", [(f"stage {stage.name}", described(stage)) for stage in self.stages])

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints of all stages, each stage's followed by the weights at its end where these are others."""
        ended = [[*stage.checkpoints, *([] if stage.final is None else [stage.final])] for stage in self.stages]
        return [checkpoint for own in ended for checkpoint in own]

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

    def resolve(self, model: nn.Module, space: Coordinates) -> ResolvedRun:
        """Read all that a bank keeps of the run: hashes, integrated learning rates, and optimizer states.

        For a segment's (or stage's) checkpoints, P is the mean of their preconditioners (Adam's bias-corrected at each
        one's own step); a checkpoint of step 0, which has no second moment, does not count.

        Args:
            model: gives the order of parameters, which an optimizer's state follows.
            space: the attributed parameters, such as :meth:`source_proj.gradients.ParameterSpace.from_model` gives.

        Raises:
            MismatchError: a state is missing or does not fit.
        """
        return resolve_run(self.stages, model, space)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
