"""Optimizers that divide gradients by their size, resolved: which metric each checkpoint is in, which decay it has."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from source_proj._errors import MismatchError
from source_proj._io.hashing import hash_float32
from source_proj.trajectory.checkpoint import Checkpoint
from source_proj.trajectory.optimizers import Moments, PreconditionedOptimizer, moments
from source_proj.trajectory.record import RunRecord, StageRecord
from source_proj.trajectory.stages import Stage

__all__ = ["Coordinates", "ResolvedRun", "resolve_run"]

_DIGITS = 12  # of numbers in a record: sums may round differently elsewhere, and records are compared


class Coordinates(Protocol):
    """The attributed parameters laid end to end, as :class:`source_proj.gradients.ParameterSpace` has them."""

    @property
    def names(self) -> tuple[str, ...]:
        """Full parameter names."""

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """One shape per name."""

    @property
    def offsets(self) -> Mapping[str, int]:
        """First coordinate of each parameter."""

    @property
    def size(self) -> int:
        """Number d of coordinates."""


class ResolvedRun(NamedTuple):
    """A run's record, and the diagonals that it names.

    Attributes:
        record: what a bank keeps of the trajectory.
        diagonals: diagonal of P^½ ``(d,)`` float32, by its hash.
    """

    record: RunRecord
    diagonals: dict[str, Tensor]


class _Metrics:
    """The metrics of a run in order of their first use, the diagonal of P^½ for each; None for the identity."""

    def __init__(self) -> None:
        self.hashes: list[str | None] = []
        self.diagonals: dict[str, Tensor] = {}

    def index(self, diagonal: Tensor | None) -> int:
        digest = None if diagonal is None else hash_float32(diagonal)
        if digest not in self.hashes:
            self.hashes.append(digest)
        if diagonal is not None and digest is not None:
            self.diagonals[digest] = diagonal
        return self.hashes.index(digest)


def resolve_run(stages: Sequence[Stage], model: nn.Module, space: Coordinates) -> ResolvedRun:
    """Read the optimizer states of a run, and say which metric each checkpoint is in; see `Trajectory.resolve`."""
    metrics = _Metrics()
    records = tuple(_resolved(stage, model, space, metrics) for stage in stages)
    return ResolvedRun(RunRecord(records, tuple(metrics.hashes)), metrics.diagonals)


def _resolved(stage: Stage, model: nn.Module, space: Coordinates, metrics: _Metrics) -> StageRecord:
    record = stage.describe()
    optimizer = record.optimizer  # the decay divided by the loss scale
    mode, count = stage.preconditioner, len(stage.checkpoints)
    if isinstance(optimizer, PreconditionedOptimizer) and mode in ("shared", "per_segment"):
        record = replace(record, preconditioner=mode)
        groups = stage.segment_indices if mode == "per_segment" else [list(range(count))]
        own: list[int] = []
        decays: list[float] = []
        for group in groups:
            diagonal, decay = _metric(stage, group, optimizer, model, space)
            own += [metrics.index(diagonal)] * len(group)
            decays += [decay] * len(group)
        return replace(record, metrics=tuple(own), decays=tuple(decays))
    if isinstance(optimizer, PreconditionedOptimizer):
        if mode == "scalar":
            scalars, decays = _scalars(stage, optimizer, model, space)
            record = replace(record, preconditioner="scalar", scalars=tuple(scalars), decays=tuple(decays))
        else:
            record = replace(record, decays=(_plain_decay(optimizer, space),) * count)
    return replace(record, metrics=(metrics.index(None),) * count)


def _with_state(checkpoints: Sequence[Checkpoint], what: str) -> list[Checkpoint]:
    with_state = [c for c in checkpoints if c.step > 0 or c.optimizer_state is not None]
    if not with_state:
        raise MismatchError(
            f"{what} consists of the initial weights alone, where no optimizer has a second moment yet: join it with "
            "later checkpoints, or take preconditioner='none'"
        )
    return with_state


def _metric(
    stage: Stage, group: Sequence[int], optimizer: PreconditionedOptimizer, model: nn.Module, space: Coordinates
) -> tuple[Tensor, float]:
    """The square root of the mean P, and the one number λ̄ that stands for weight decay."""
    p, v, decay = (torch.zeros(space.size, dtype=torch.float64) for _ in range(3))
    checkpoints = [stage.checkpoints[c] for c in group]
    with_state = _with_state(checkpoints, f"the segment of {checkpoints}")
    for checkpoint, divisor in zip(with_state, _divisors(stage, with_state), strict=True):
        plain = stage.plain_shares[stage.checkpoints.index(checkpoint)]
        for place, own in _moments(checkpoint, optimizer, model, space, plain):
            p[place] += own.preconditioner.flatten() / divisor
            v[place] += own.second.flatten() / len(with_state)
            decay[place] += own.decay.flatten() / divisor
    if not p.any():
        raise MismatchError(f"the optimizer states of {checkpoints} move none of the attributed parameters")
    return p.sqrt().float(), _mean(decay, p * v)


def _divisors(stage: Stage, checkpoints: Sequence[Checkpoint]) -> list[float]:
    """What P at each checkpoint is divided by in the mean: their number, or by the time up to each."""
    times = stage.interval_times
    if times is None:
        return [float(len(checkpoints))] * len(checkpoints)
    own = [times[stage.checkpoints.index(checkpoint)] for checkpoint in checkpoints]
    return [sum(own) / time if time > 0 else math.inf for time in own]


def _scalars(
    stage: Stage, optimizer: PreconditionedOptimizer, model: nn.Module, space: Coordinates
) -> tuple[list[float], list[float]]:
    """One number p = Σ P v̂ / Σ v̂ a checkpoint, and its decay.

    p H has the trace of P^½ H P^½ where v̂ is H's diagonal.
    """
    numbers: dict[int, tuple[float, float]] = {}
    for checkpoint in _with_state(stage.checkpoints, f"stage {stage.name!r}"):
        plain = stage.plain_shares[stage.checkpoints.index(checkpoint)]
        p, v, decay = (torch.zeros(space.size, dtype=torch.float64) for _ in range(3))
        for place, own in _moments(checkpoint, optimizer, model, space, plain):
            p[place], v[place], decay[place] = (part.flatten() for part in own)
        if not p.any():
            raise MismatchError(f"the optimizer state of {checkpoint} moves none of the attributed parameters")
        numbers[checkpoint.step] = (_mean(p, v), _mean(decay, v))
    first = next(iter(numbers.values()))  # also for the initial weights, if they are a checkpoint
    filled = [numbers.get(checkpoint.step, first) for checkpoint in stage.checkpoints]
    return [number for number, _ in filled], [decay for _, decay in filled]


def _plain_decay(optimizer: PreconditionedOptimizer, space: Coordinates) -> float:
    """Weight decay without second moments: the mean over coordinates."""
    sizes = torch.tensor([float(prod(shape)) for shape in space.shapes], dtype=torch.float64)
    groups = [optimizer.group(name) for name in space.names]
    decays = [group.lr_scale * float(group.weight_decay or 0.0) for group in groups]
    return _mean(torch.tensor(decays, dtype=torch.float64), sizes)


def _moments(
    checkpoint: Checkpoint, optimizer: PreconditionedOptimizer, model: nn.Module, space: Coordinates, plain: float
) -> Iterator[tuple[slice, Moments]]:
    """The moments of the attributed parameters, and where their coordinates are."""
    for name, own in moments(checkpoint, optimizer, model, plain):
        if name in space.offsets:
            begin = space.offsets[name]
            yield slice(begin, begin + own.second.numel()), own


def _mean(values: Tensor, weights: Tensor) -> float:
    """Σ w x / Σ w, rounded; exact where all values with a weight are equal."""
    weighted = values[weights > 0]
    if weighted.numel() == 0:
        return 0.0
    if bool((weighted == weighted[0]).all()):
        return float(weighted[0])
    return float(f"{float((values * weights).sum() / weights.sum()):.{_DIGITS}g}")
