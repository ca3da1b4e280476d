"""Optimizers that divide gradients by their size, resolved: which metric each checkpoint is in, which decay it has."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from source_proj._errors import MismatchError
from source_proj.trajectory.checkpoint import Checkpoint
from source_proj.trajectory.described import require_described
from source_proj.trajectory.layouts import listed
from source_proj.trajectory.moved import left_alone, moved_parameters, points_of
from source_proj.trajectory.optimizers import Moments, PreconditionedOptimizer, is_untouched, moments
from source_proj.trajectory.record import FACTORED, PER_SEGMENT, RunRecord, StageRecord
from source_proj.trajectory.scale import Coordinates, Scale, best_factors
from source_proj.trajectory.stages import Stage
from source_proj.trajectory.unmoved import warn_of_copies, warn_without_rate

__all__ = ["ResolvedRun", "resolve_run"]

_NAMED = 3  # parameters spelled out in a remedy
_DIGITS = 12  # of numbers in a record: sums may round differently elsewhere, and records are compared


class ResolvedRun(NamedTuple):
    """A run's record, and the scales that it names.

    Attributes:
        record: what a bank keeps of the trajectory.
        scales: P^½ of each metric but the identity, by its hash.
    """

    record: RunRecord
    scales: dict[str, Scale]


class _Metrics:
    """The metrics of a run in order of their first use, the scale P^½ of each; None for the identity."""

    def __init__(self) -> None:
        self.hashes: list[str | None] = []
        self.scales: dict[str, Scale] = {}

    def index(self, scale: Scale | None) -> int:
        digest = None if scale is None else scale.hash
        if digest not in self.hashes:
            self.hashes.append(digest)
        if scale is not None and digest is not None:
            self.scales[digest] = scale
        return self.hashes.index(digest)


def resolve_run(stages: Sequence[Stage], model: nn.Module, space: Coordinates) -> ResolvedRun:
    """Read the optimizer states of a run, and say which metric each checkpoint is in; see `Trajectory.resolve`."""
    metrics = _Metrics()
    still = left_alone(stages, model)
    records = tuple(_resolved(stage, model, space, metrics, own) for stage, own in zip(stages, still, strict=True))
    warn_without_rate(stages)
    return ResolvedRun(RunRecord(records, tuple(metrics.hashes)), metrics.scales)


def _resolved(
    stage: Stage, model: nn.Module, space: Coordinates, metrics: _Metrics, still: frozenset[str]
) -> StageRecord:
    """A stage's record; parameters that stood still in it are none of its metric."""
    record = stage.describe()
    warn_of_copies(stage)
    # Its decay is divided by the loss scale; its groups may be of the model within a wrapper, or around it.
    optimizer = record.optimizer.named_for([name for name, _ in model.named_parameters()])
    record = replace(record, optimizer=optimizer)
    mode, count = stage.preconditioner, len(stage.checkpoints)
    if still.issuperset(space.names):  # of nothing that is attributed, the optimizer's states say nothing either
        mode = "none"
    else:
        require_described(stage)
    if not isinstance(optimizer, PreconditionedOptimizer):
        return replace(record, metrics=(metrics.index(_without(space, still)),) * count)
    if mode == "none":
        decays = (_plain_decay(optimizer, space, still),) * count
        return replace(record, decays=decays, metrics=(metrics.index(_without(space, still)),) * count)
    reader = _Reader(stage, optimizer, model, space, still)
    if mode == "scalar":
        scalars, own_decays = _scalars(reader)
        record = replace(record, preconditioner="scalar", scalars=tuple(scalars), decays=tuple(own_decays))
        own = [metrics.index(_without(space, still))] * count
    else:
        groups = stage.segment_indices if mode in PER_SEGMENT else [list(range(count))]
        found = [(group, *_metric(reader, group)) for group in groups]
        own = [metrics.index(scale) for group, scale, _ in found for _ in group]
        spread = tuple(decay for group, _, decay in found for _ in group)
        record = replace(record, preconditioner=mode, decays=spread)
    reader.require_all_moved()
    return replace(record, metrics=tuple(own))


def _without(space: Coordinates, still: frozenset[str]) -> Scale | None:
    """P of ones and, for parameters that stood still, zeros; factored, for gradients that need not be formed."""
    if still.isdisjoint(space.names):
        return None
    sizes = [Scale.kept(shape, factored=True) for shape in space.shapes]
    ones = [name not in still for name in space.names]
    values = torch.tensor(ones, dtype=torch.float32, device="cpu").repeat_interleave(
        torch.tensor(sizes, device="cpu", dtype=torch.int64)
    )
    return Scale(values, space, factored=True)


def _with_state(stage: Stage, checkpoints: Sequence[Checkpoint], what: str) -> list[Checkpoint]:
    with_state = [checkpoint for checkpoint in checkpoints if not _is_initial(stage, checkpoint)]
    if not with_state:
        raise MismatchError(
            f"{what} consists of the initial weights alone, where no optimizer has a second moment yet: join it with "
            "later checkpoints, or take preconditioner='none'"
        )
    return with_state


def _is_initial(stage: Stage, checkpoint: Checkpoint) -> bool:
    """Whether no update was made before a checkpoint, at step 0 or after steps that were skipped."""
    if checkpoint.optimizer_state is None:
        return checkpoint.step == 0
    return stage.lr_integrals[stage.checkpoints.index(checkpoint)] == 0 and is_untouched(checkpoint)


def _metric(reader: _Reader, group: Sequence[int]) -> tuple[Scale, float]:
    """The square root of the mean P, factored or not, and the one number λ̄ that stands for weight decay."""
    stage, space = reader.stage, reader.space
    p, v, decay = reader.zeros(3)
    checkpoints = [stage.checkpoints[c] for c in group]
    with_state = _with_state(stage, checkpoints, f"the segment of {checkpoints}")
    for checkpoint, divisor in zip(with_state, _divisors(stage, with_state), strict=True):
        for place, own in reader.moments(checkpoint):
            p[place] += own.preconditioner.flatten() / divisor
            v[place] += own.second.flatten() / len(with_state)
            decay[place] += own.decay.flatten() / divisor
    if not p.any():
        raise MismatchError(f"the optimizer states of {checkpoints} move none of the attributed parameters")
    decay_mean = _mean(decay, p * v)
    if stage.preconditioner not in FACTORED:
        return Scale(p.sqrt().float(), space), decay_mean
    return Scale(torch.cat(list(_factored(p, v, space))).sqrt().float(), space, factored=True), decay_mean


def _factored(p: Tensor, v: Tensor, space: Coordinates) -> Iterator[Tensor]:
    """P of each parameter: the two factors of each matrix one after the other, vectors whole."""
    for name, shape in zip(space.names, space.shapes, strict=True):
        begin = space.offsets[name]
        own = slice(begin, begin + prod(shape))
        if len(shape) < 2:
            yield p[own]
        else:
            yield from best_factors(p[own].view(shape[0], prod(shape[1:])), v[own].view(shape[0], prod(shape[1:])))


def _divisors(stage: Stage, checkpoints: Sequence[Checkpoint]) -> list[float]:
    """What P at each checkpoint is divided by in the mean: their number, or by the time up to each."""
    times = stage.interval_times
    own = [] if times is None else [times[stage.checkpoints.index(checkpoint)] for checkpoint in checkpoints]
    if not any(own):  # also where no update moved anything
        return [float(len(checkpoints))] * len(checkpoints)
    return [sum(own) / time if time > 0 else math.inf for time in own]


def _scalars(reader: _Reader) -> tuple[list[float], list[float]]:
    """One number p = Σ P v̂ / Σ v̂ a checkpoint, and its decay.

    p H has the trace of P^½ H P^½ where v̂ is H's diagonal.
    """
    stage = reader.stage
    numbers: dict[int, tuple[float, float]] = {}
    for checkpoint in _with_state(stage, stage.checkpoints, f"stage {stage.name!r}"):
        p, v, decay = reader.zeros(3)
        for place, own in reader.moments(checkpoint):
            p[place], v[place], decay[place] = (part.flatten() for part in own)
        if not p.any():
            raise MismatchError(f"the optimizer state of {checkpoint} moves none of the attributed parameters")
        numbers[checkpoint.step] = (_mean(p, v), _mean(decay, v))
    first = next(iter(numbers.values()))  # also for the initial weights, if they are a checkpoint
    filled = [numbers.get(checkpoint.step, first) for checkpoint in stage.checkpoints]
    return [number for number, _ in filled], [decay for _, decay in filled]


def _plain_decay(optimizer: PreconditionedOptimizer, space: Coordinates, still: frozenset[str]) -> float:
    """Weight decay without second moments: the mean over coordinates."""
    counts = [prod(shape) * (name not in still) for name, shape in zip(space.names, space.shapes, strict=True)]
    sizes = torch.tensor(counts, dtype=torch.float64, device="cpu")
    groups = [optimizer.group(name) for name in space.names]
    decays = [group.lr_scale * float(group.weight_decay or 0.0) for group in groups]
    return _mean(torch.tensor(decays, dtype=torch.float64, device="cpu"), sizes)


class _Reader:
    """The moments of the attributed parameters, and of which there were any.

    Args:
        stage: whose states they are.
        optimizer: how gradients became steps, its decay that for the mean loss.
        model: the model that was trained.
        space: the attributed parameters.
        still: those that stood still.
    """

    def __init__(
        self,
        stage: Stage,
        optimizer: PreconditionedOptimizer,
        model: nn.Module,
        space: Coordinates,
        still: frozenset[str],
    ) -> None:
        self.stage, self.optimizer, self.model, self.space, self.still = stage, optimizer, model, space, still
        self._seen: set[str] = set()

    def zeros(self, count: int) -> list[Tensor]:
        """Vectors with a place for each attributed coordinate."""
        return [torch.zeros(self.space.size, dtype=torch.float64, device="cpu") for _ in range(count)]

    def moments(self, checkpoint: Checkpoint) -> Iterator[tuple[slice, Moments]]:
        """Those at a checkpoint, and where their coordinates are."""
        plain = self.stage.plain_shares[self.stage.checkpoints.index(checkpoint)]
        for name, own in moments(checkpoint, self.optimizer, self.model, plain):
            if name in self.space.offsets and name not in self.still:
                self._seen.add(name)
                begin = self.space.offsets[name]
                yield slice(begin, begin + own.second.numel()), own

    def require_all_moved(self) -> None:
        """Refuse parameters that moved, and of which no state has a second moment: P would be 0 there.

        Raises:
            MismatchError: there are some, as where a second optimizer trained them; names them.
        """
        unseen = [name for name in self.space.names if name not in self._seen and name not in self.still]
        moved = moved_parameters(points_of(self.stage), self.model) if unseen else None
        others = [name for name in unseen if name in (moved or ())]
        if others:
            raise MismatchError(
                f"{listed('parameters', others)} moved between the checkpoints of stage {self.stage.name!r}, and the "
                "optimizer's states have no second moments of them: did another optimizer train them? Give states "
                f"that hold all, or leave them out by parameters={[f'!{name}' for name in others[:_NAMED]]}"
            )


def _mean(values: Tensor, weights: Tensor) -> float:
    """Σ w x / Σ w, rounded; exact where all values with a weight are equal."""
    weighted = values[weights > 0]
    if weighted.numel() == 0:
        return 0.0
    if bool((weighted == weighted[0]).all()):
        return float(weighted[0])
    return float(f"{float((values * weights).sum() / weights.sum()):.{_DIGITS}g}")
