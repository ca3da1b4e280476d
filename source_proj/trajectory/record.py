"""The record of a run: what a bank keeps of a trajectory, typed, and written as JSON.

:meth:`Trajectory.resolve` makes it once, with every checkpoint hashed, the learning rate integrated and the optimizers'
states read; from then on nothing changes it. Times, decays and metrics of segments follow from it for every cut of a
stage into segments.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

from source_proj._io.json_records import read_record, write_record
from source_proj.trajectory.optimizers import Optimizer
from source_proj.trajectory.segments import Segments, split_segments

__all__ = [
    "FACTORED",
    "PER_SEGMENT",
    "CaptureRecord",
    "CapturedCurvature",
    "CheckpointRef",
    "PreconditionerMode",
    "RunRecord",
    "SegmentRecord",
    "StageRecord",
    "read_optimizer",
]

PreconditionerMode = Literal["shared", "per_segment", "factored", "factored_per_segment", "scalar", "none"]
"""What becomes of a preconditioner; see :class:`Stage`."""

CapturedCurvature = Literal["empirical_fisher", "sampled_fisher", "gauss_newton"]
"""Of what Ĥ was made while a stage trained: of its gradients, or of those of labels drawn from the model."""

FACTORED: frozenset[PreconditionerMode] = frozenset({"factored", "factored_per_segment"})
_BY_COORDINATE: frozenset[PreconditionerMode] = frozenset({"shared", "per_segment"})
"""With two vectors in place of P of each matrix."""

PER_SEGMENT: frozenset[PreconditionerMode] = frozenset({"per_segment", "factored_per_segment"})
"""With a P for each segment."""

_SHA256 = re.compile("[0-9a-f]{64}")


def read_optimizer(description: object) -> Optimizer:
    """An optimizer from its name and its fields, as JSON gave them.

    Raises:
        ValueError: it is of no known kind, or an entry is missing, unknown or of the wrong type.
    """
    if not isinstance(description, Mapping):
        raise ValueError(f"must be an object, got {description!r}")
    kinds = Optimizer.known
    name, options = description.get("name"), {key: value for key, value in description.items() if key != "name"}
    if not isinstance(name, str) or name not in kinds:
        raise ValueError(f"its name is {name!r}, and known optimizers are {', '.join(kinds)}")
    optimizer: Optimizer = read_record(kinds[name], options, name)
    return optimizer


def write_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's name and its fields, as JSON gives them back."""
    return {"name": type(optimizer).__name__, **write_record(optimizer)}


@dataclass(frozen=True)
class CheckpointRef:
    """Which weights: where they lie, and what they hash to.

    Args:
        step: optimizer steps taken until then.
        path: absolute path of the file; None for weights that were given as a dict.
        hash: :meth:`Checkpoint.hash`.

    Raises:
        ValueError: a value is out of its range.
    """

    step: int
    path: str | None
    hash: str

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ValueError(f"step must be at least 0, got {self.step}")
        _check_hash("hash", self.hash)


@dataclass(frozen=True)
class CaptureRecord:
    """Of a stage whose rows were captured while it trained, one a segment: what is not at the ends of segments.

    Args:
        query_points: all weights that were recorded; queries are differentiated there.
        curvature: of each segment, the hash of its Ĥ (:func:`hash_float32`).
        kind: which curvature that is.

    Raises:
        ValueError: there is no such weights, or a hash is none.
    """

    query_points: tuple[CheckpointRef, ...]
    curvature: tuple[str, ...]
    kind: CapturedCurvature

    def __post_init__(self) -> None:
        if not self.query_points:
            raise ValueError("query_points is empty, and queries are differentiated at one point at least")
        for place, digest in enumerate(self.curvature):
            _check_hash(f"curvature[{place}]", digest)


@dataclass(frozen=True)
class SegmentRecord:
    """A segment of a stage, by whatever cut.

    Args:
        checkpoints: indices of its checkpoints within the stage.
        time: its time scale s, the learning rate integrated over its steps, times what the optimizer makes of a
            gradient.
        decay: weight decay λ per unit of that time: over the segment, weights decay by exp(-λ s) in all.
        metric: index, in the run's ``metrics``, of the metric that its checkpoints' rows are in.
    """

    checkpoints: tuple[int, ...]
    time: float
    decay: float
    metric: int


@dataclass(frozen=True)
class StageRecord:
    """What a bank keeps of a :class:`Stage`.

    Args:
        name: the stage's name.
        optimizer: how gradients became steps, its weight decay that for the mean loss.
        preconditioner: what becomes of the preconditioner; "none" where there is none.
        loss_scale: :attr:`Stage.loss_scale`.
        start_step: step count at which the stage began.
        checkpoints: in order of their steps.
        final: the weights at the end.
        segments: checkpoint indices of each segment.
        lr_integrals: Σ lr · loss_scale · clip from the stage's start to each checkpoint; the time factor of each step
            included where it changed between steps.
        lr_sums: the same without clip; None where nothing was clipped.
        time_factor: what the integrals are times to be times: the optimizer's, or 1 where they include it.
        scalars: the number in place of P at each checkpoint; None unless ``preconditioner="scalar"``.
        decays: λ at each checkpoint per unit of Σ lr, where it is not the optimizer's one weight decay.
        metrics: index, in the run's ``metrics``, of each checkpoint's metric.
        capture: where rows were captured while the stage trained, a checkpoint for each segment: see
            :meth:`captured`.

    Raises:
        ValueError: lengths differ, or a value is out of its range; names the entry.
    """

    name: str
    optimizer: Optimizer = field(metadata={"write": write_optimizer, "read": read_optimizer})
    preconditioner: PreconditionerMode
    loss_scale: float
    start_step: int
    checkpoints: tuple[CheckpointRef, ...]
    final: CheckpointRef
    segments: tuple[tuple[int, ...], ...]
    lr_integrals: tuple[float, ...]
    lr_sums: tuple[float, ...] | None
    time_factor: float
    scalars: tuple[float, ...] | None
    decays: tuple[float, ...] | None
    metrics: tuple[int, ...]
    capture: CaptureRecord | None = None

    def __post_init__(self) -> None:
        self._check_lengths()
        self._check_numbers()
        split_segments(len(self.checkpoints), self.segments)
        for before, after in pairwise([self.start_step, *self.steps]):
            if after < before or (after == before and before != self.start_step):
                raise ValueError(f"checkpoints are at the steps {list(self.steps)} from step {self.start_step} on")
        if self.final.step != self.steps[-1]:
            raise ValueError(f"final is at step {self.final.step}, and the last of checkpoints at {self.steps[-1]}")
        if (self.scalars is not None) != (self.preconditioner == "scalar"):
            raise ValueError(f"preconditioner is {self.preconditioner!r}, and scalars is {self.scalars}")

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps of the checkpoints."""
        return tuple(checkpoint.step for checkpoint in self.checkpoints)

    @property
    def query_points(self) -> tuple[CheckpointRef, ...]:
        """Weights at which queries are differentiated where the mean over the stage is taken."""
        return self.checkpoints if self.capture is None else self.capture.query_points

    def cut(self, segments: Segments | None = None) -> tuple[SegmentRecord, ...]:
        r"""Cut the stage into segments, with their times and decays.

        A segment's time is :math:`s_l = \sum_t η_t` times the time factor. Where a number stands for the
        preconditioner, each interval between checkpoints counts times the number of the checkpoint that ends it. Its
        decay is the optimizer's, unless it differs between parameters, the gradient was clipped (the decay was not),
        or ``scalars`` measure the time.

        Args:
            segments: their number, or checkpoint indices of each; default: as the run was cut.

        Raises:
            ValueError: they are no partition of the checkpoints in order, or join checkpoints of different metrics.
        """
        groups = split_segments(len(self.checkpoints), self.segments if segments is None else segments)
        times = self._times(groups)
        return tuple(
            SegmentRecord(tuple(group), time, decay, self._metric(group))
            for group, time, decay in zip(groups, times, self._decays(groups, times), strict=True)
        )

    def captured(self, curvature: Sequence[str], kind: CapturedCurvature) -> StageRecord:
        """The record of the same stage with one checkpoint a segment, its last, whose rows are those of the segment.

        Times and decays of the segments stay as they are.

        Args:
            curvature: the hash of each segment's Ĥ.
            kind: which curvature that is.
        """
        own = self.cut()
        ends = [segment.checkpoints[-1] for segment in own]
        integrals, sums = (
            [values[end] for end in ends] for values in (self.lr_integrals, self.lr_sums or self.lr_integrals)
        )
        times, spans = self._steps_of(integrals), self._steps_of(sums)
        scalars = decays = None
        if self.scalars is not None:
            scalars = tuple(_ratio(s.time, self.time_factor * time) for s, time in zip(own, times, strict=True))
        if self.scalars is not None or self.decays is not None or self.lr_sums is not None:
            decays = tuple(
                _ratio(s.decay * s.time, self.time_factor * span) for s, span in zip(own, spans, strict=True)
            )
        return replace(
            self,
            checkpoints=tuple(self.checkpoints[end] for end in ends),
            segments=tuple((place,) for place in range(len(ends))),
            lr_integrals=tuple(integrals),
            lr_sums=None if self.lr_sums is None else tuple(sums),
            scalars=scalars,
            decays=decays,
            metrics=tuple(self.metrics[end] for end in ends),
            capture=CaptureRecord(self.checkpoints, tuple(curvature), kind),
        )

    @staticmethod
    def _steps_of(integrals: Sequence[float]) -> list[float]:
        return [end - begin for begin, end in pairwise([0.0, *integrals])]

    def _metric(self, group: Sequence[int]) -> int:
        metrics = sorted({self.metrics[checkpoint] for checkpoint in group})
        if len(metrics) > 1:
            raise ValueError(
                f"the segment {list(group)} of stage {self.name!r} joins checkpoints whose rows are in different "
                f"metrics, {metrics}: keep the bank's segments {[list(own) for own in self.segments]} or cut them "
                f"further, or build with preconditioner={'factored' if self.preconditioner in FACTORED else 'shared'!r}"
            )
        return metrics[0]

    def _times(self, groups: Sequence[Sequence[int]]) -> list[float]:
        if self.scalars is not None:
            return [self.time_factor * sum(_weighted(self.lr_integrals, self.scalars, group)) for group in groups]
        ends = [0.0, *(self.lr_integrals[group[-1]] for group in groups)]
        return [self.time_factor * (end - begin) for begin, end in pairwise(ends)]

    def _decays(self, groups: Sequence[Sequence[int]], times: Sequence[float]) -> list[float]:
        decay = float(self.optimizer.weight_decay)
        if self.decays is self.scalars is self.lr_sums is None:
            return [decay] * len(groups)
        decays = self.decays or (decay,) * len(self.checkpoints)
        sums = self.lr_sums or self.lr_integrals
        totals = [self.time_factor * sum(_weighted(sums, decays, group)) for group in groups]
        return [total / time if time > 0 else 0.0 for total, time in zip(totals, times, strict=True)]

    def _check_lengths(self) -> None:
        count = len(self.checkpoints)
        if not count:
            raise ValueError("checkpoints is empty, and a stage has at least one")
        for name in ("lr_integrals", "lr_sums", "scalars", "decays", "metrics"):
            values = getattr(self, name)
            if values is not None and len(values) != count:
                raise ValueError(f"{name} has {len(values)} entries for {count} checkpoints")
        if self.capture is not None and not len(self.capture.curvature) == len(self.segments) == count:
            raise ValueError(
                f"capture has {len(self.capture.curvature)} entries of curvature for {len(self.segments)} segments and "
                f"{count} checkpoints, and a captured stage has one of each for every segment"
            )

    def _check_numbers(self) -> None:
        for name in ("lr_integrals", "lr_sums", "scalars", "decays", "metrics"):
            values = getattr(self, name) or ()
            if min(values, default=0) < 0:
                raise ValueError(f"{name} must be at least 0, got {min(values)}")
        for name in ("lr_integrals", "lr_sums"):
            if any(before > after for before, after in pairwise(getattr(self, name) or ())):
                raise ValueError(f"{name} must not fall, got {list(getattr(self, name))}")
        for name in ("loss_scale", "time_factor"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.start_step < 0:
            raise ValueError(f"start_step must be at least 0, got {self.start_step}")


@dataclass(frozen=True)
class RunRecord:
    """What a bank keeps of a :class:`Trajectory`.

    Args:
        stages: in order of training.
        metrics: the metrics that rows are in, by the hash of P^½ (:class:`Scale`); None for the identity.

    Raises:
        ValueError: there is no stage, names or metrics repeat, or a checkpoint's metric is not listed.
    """

    stages: tuple[StageRecord, ...]
    metrics: tuple[str | None, ...]

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"stages must be at least one, of different names, got {names}")
        if not self.metrics or len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"metrics must be at least one, and differ, got {list(self.metrics)}")
        for place, digest in enumerate(self.metrics):
            if digest is not None:
                _check_hash(f"metrics[{place}]", digest)
        for place, stage in enumerate(self.stages):
            if max(stage.metrics) >= len(self.metrics):
                raise ValueError(
                    f"stages[{place}].metrics names metric {max(stage.metrics)}, and metrics has {len(self.metrics)}"
                )

    @property
    def final(self) -> CheckpointRef:
        """The weights that queries are asked of."""
        return self.stages[-1].final

    @property
    def scales(self) -> list[str]:
        """Hashes of the metrics that are no identity."""
        return [digest for digest in self.metrics if digest is not None]

    def is_factored(self, metric: int) -> bool:
        """Whether a metric's P has two vectors in place of each matrix, as also one that only leaves parameters out."""
        return any(s.preconditioner not in _BY_COORDINATE and metric in s.metrics for s in self.stages)

    @property
    def curvatures(self) -> list[str]:
        """Hashes of the curvature of all captured segments, each once."""
        captures = [stage.capture for stage in self.stages if stage.capture is not None]
        return list(dict.fromkeys(digest for capture in captures for digest in capture.curvature))

    @property
    def checkpoints(self) -> list[CheckpointRef]:
        """The weights of all checkpoints and stage ends, each hash once."""
        all_of_them = [ref for stage in self.stages for ref in (*stage.checkpoints, stage.final, *stage.query_points)]
        return list({ref.hash: ref for ref in all_of_them}.values())

    def crossed_metrics(self, stage: int, checkpoint: int) -> list[int]:
        """Metrics of earlier checkpoints that are not a checkpoint's own: it has rows in them too."""
        earlier = [metric for before in self.stages[:stage] for metric in before.metrics]
        own = self.stages[stage].metrics
        return sorted({*earlier, *own[:checkpoint]} - {own[checkpoint]})

    def to_json(self) -> dict[str, Any]:
        """The record as JSON has it."""
        return write_record(self)

    @classmethod
    def from_json(cls, content: object, name: str = "trajectory") -> RunRecord:
        """Read :meth:`to_json` back.

        Raises:
            ValueError: an entry is missing, unknown, of the wrong type or out of its range; names it.
        """
        return read_record(cls, content, name)


def _check_hash(name: str, digest: str) -> None:
    if not _SHA256.fullmatch(digest):
        raise ValueError(f"{name} must be 64 hexadecimal digits, got {digest!r}")


def _weighted(integrals: Sequence[float], weights: Sequence[float], group: Sequence[int]) -> list[float]:
    """Each checkpoint's weight times the learning rate integrated since the checkpoint before."""
    return [weights[c] * (integrals[c] - (integrals[c - 1] if c else 0.0)) for c in group]


def _ratio(value: float, divisor: float) -> float:
    return value / divisor if divisor > 0 else 0.0
