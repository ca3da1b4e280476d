"""Study (o): members of an ensemble that take no training, against runs, sketches and dimensions.

A member is a recorded run as a bank of its own sees it: with noise on its weights (SWAG, Maddox et al. 2019,
https://arxiv.org/abs/1902.02476), or with hidden units left out (as Deng et al. 2024, https://arxiv.org/abs/2405.17293,
do for TRAK). Its rows and its passes are those of one more run; what it saves is that run's training.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from _bench import Bench
from _methods import features_of
from _problem import Problem
from torch import Tensor, nn
from torch.utils.data import default_collate

import source_proj as sp
from source_proj.evaluate import GroundTruth

__all__ = ["Mask", "Member", "cheap_members", "displaced", "every_other", "masked", "noise"]

Variant = tuple[str, list[np.ndarray], GroundTruth, list[np.ndarray]]


class Member(NamedTuple):
    """What a bank of an ensemble is built from, and its queries are asked of."""

    model: nn.Module
    trajectory: sp.Trajectory


Kind = Callable[[Problem, sp.Trajectory, int], Member]
"""A member of (task, run, seed)."""


class Line(NamedTuple):
    """A line of the study: how many members of which kind, and the share of a run's checkpoints that each has."""

    name: str
    members: int
    kind: Kind | None = None  # None: runs that were trained
    share: float = 1.0


def cheap_members(bench: Bench) -> Iterator[Variant]:
    """(o) Noise on the weights, or dropout masks, in the place of runs; all lines in as many bytes as the first.

    Members with half of the checkpoints each also take as many passes in all; those with all of them take a run's
    passes each. Large models are asked for the main lines alone.
    """
    own = _Ensembles(bench)
    first = own.of_each_run(_unchanged, 1, bench.dim)
    yield f"1 run, k = {bench.dim:,}", first, bench.truth, first
    for name, count, kind, share in [*_MAIN, *(_FURTHER if bench.size <= _SMALL else [])]:
        dim = round(bench.dim / (count * share))
        part = (lambda kind: kind) if share == 1 else _thinned
        scores = own.of_runs(count, dim, part(_unchanged)) if kind is None else own.of_each_run(part(kind), count, dim)
        yield f"{name}, k = {dim:,}", scores, bench.truth, first


class _Ensembles(NamedTuple):
    """Scores by ``Source([bank, ...])``; a bank is gone when its scores are there."""

    bench: Bench

    def of_each_run(self, kind: Kind, count: int, dim: int) -> list[np.ndarray]:
        """Of each run, scores by ``count`` of its members."""
        return [self._scores([(run, number) for number in range(count)], kind, dim) for run in range(self.bench.runs)]

    def of_runs(self, count: int, dim: int, kind: Kind) -> list[np.ndarray]:
        """Scores by ``count`` runs together, one member each, for each such group of runs."""
        runs = max(count, self.bench.runs)
        several = _Ensembles(replace(self.bench, runs=runs))
        groups = [range(start, start + count) for start in range(0, runs - count + 1, count)]
        return [several._scores([(run, 0) for run in group], kind, dim) for group in groups]

    def _scores(self, members: Sequence[tuple[int, int]], kind: Kind, dim: int) -> np.ndarray:
        problem, banks, features = self.bench.problem, [], []
        with tempfile.TemporaryDirectory(dir=self.bench.folder) as folder:
            for run, number in members:
                seed = 10 * run + number
                member = kind(problem, self.bench.trajectories[run], seed)
                # A copy: what was computed of queries at a path is kept with the problem.
                asked = replace(problem, make_model=partial(deepcopy, member.model))
                bank = replace(self.bench, problem=asked).build(
                    member.trajectory, f"{folder}/{seed}", sp.Sketch(dim, seed=seed), progress=False
                )
                banks.append(bank)
                features.append(features_of(bank, asked))
            source = sp.Source(banks, query_gradient="mean", cache=False, progress=False)
            return np.asarray(source.score(features))[:, : problem.n]


def _unchanged(problem: Problem, run: sp.Trajectory, _seed: int) -> Member:
    return Member(problem.make_model(), run)


def _noisy(
    problem: Problem, run: sp.Trajectory, seed: int, *, scale: float, low_rank: bool = True, anew: bool = False
) -> Member:
    model = problem.make_model()
    return Member(model, displaced(run, model, seed, scale=scale, low_rank=low_rank, anew=anew))


def _dropped(problem: Problem, run: sp.Trajectory, seed: int, *, share: float) -> Member:
    model, query = problem.make_model(), default_collate([problem.queries[0]])
    return Member(masked(model, share, seed, lambda own: problem.task.measurement(own, query)), run)


def _thinned(kind: Kind) -> Kind:
    def with_half(problem: Problem, run: sp.Trajectory, seed: int) -> Member:
        member = kind(problem, run, seed)
        return Member(member.model, every_other(member.trajectory))  # noise is that of the whole run

    return with_half


def displaced(
    run: sp.Trajectory, model: nn.Module, seed: int, *, scale: float, low_rank: bool = True, anew: bool = False
) -> sp.Trajectory:
    """A run whose checkpoints all lie beside its own by one draw of :func:`noise`, a stage.

    Args:
        run: the recorded run.
        model: names the parameters; buffers stay as they are.
        seed: of the draw.
        scale: factor on the noise of the last half of a stage's checkpoints (of two at least).
        low_rank: as in :func:`noise`.
        anew: draw for each checkpoint.

    Raises:
        ValueError: a stage has one checkpoint, which shows no spread.
    """
    generator = torch.Generator().manual_seed(seed)
    stages = []
    for stage in run.stages:
        if len(stage.checkpoints) < 2:
            raise ValueError(f"stage {stage.name!r} has one checkpoint, and noise is of two or more: record more")
        last = stage.checkpoints[-max(2, len(stage.checkpoints) // 2) :]
        weights = [point.parameters_of(model) for point in last]

        def draw(weights: list[dict[str, Tensor]] = weights) -> dict[str, Tensor]:
            return noise(weights, generator, low_rank=low_rank)

        shared = draw()
        points = [_moved(point, draw() if anew else shared, scale) for point in stage.checkpoints]
        stages.append(replace(stage, checkpoints=points, final=stage.final and _moved(stage.final, shared, scale)))
    return sp.Trajectory.from_stages(stages)


def noise(
    weights: Sequence[dict[str, Tensor]], generator: torch.Generator, *, low_rank: bool = True
) -> dict[str, Tensor]:
    """Draw from N(0, Σ), Σ = (diag(v) + D Dᵀ / (C − 1)) / 2 of the spread of C points (Maddox et al. 2019, eq. 1).

    Args:
        weights: C ≥ 2 points, by name.
        generator: gives C + d normal numbers.
        low_rank: False for Σ = diag(v), v the mean squared deviation of each weight; columns of D are deviations.
    """
    normal = torch.randn(len(weights), generator=generator)
    drawn = {}
    for name in weights[0]:
        deviations = torch.stack([point[name] for point in weights])
        deviations = deviations - deviations.mean(0)  # (C, ...)
        free = torch.randn(deviations.shape[1:], generator=generator) * deviations.square().mean(0).sqrt()
        joint = torch.tensordot(normal, deviations, 1) / (len(weights) - 1) ** 0.5
        drawn[name] = (free + joint) / 2**0.5 if low_rank else free
    return drawn


def _moved(point: sp.Checkpoint, by: dict[str, Tensor], scale: float) -> sp.Checkpoint:
    state = point.load()
    moved = {name: state[name] + scale * change for name, change in by.items()}
    return sp.Checkpoint(state | moved, point.step, point.lr, point.optimizer_state)


class Mask(nn.Module):
    """Fixed factors of hidden units: 0 for those left out, 1/(1 − p) for the others.

    Args:
        factors: ``(width,)``; no part of the model's state, so that checkpoints fit.
    """

    factors: Tensor

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.register_buffer("factors", factors, persistent=False)

    def forward(self, units: Tensor) -> Tensor:
        """Units ``(..., width)`` to the same."""
        return units * self.factors


def masked(model: nn.Module, share: float, seed: int, run: Callable[[nn.Module], object]) -> nn.Module:
    """A copy of a model with a fixed dropout mask behind every ReLU and GELU.

    Args:
        model: stays as it is.
        share: p, the chance of a unit to be left out.
        seed: of the masks.
        run: calls the model once, which shows how many units there are.

    Raises:
        ValueError: the model has no such module, or uses one of them twice.
    """
    model, generator = deepcopy(model), torch.Generator().manual_seed(seed)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.ReLU | nn.GELU)]
    widths: list[int] = []
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _module, _inputs, units: widths.append(units.shape[-1]))
        for name in names
    ]
    with torch.no_grad():
        run(model)
    for hook in hooks:
        hook.remove()
    if not names or len(widths) != len(names):
        raise ValueError(f"masks go behind ReLU and GELU modules that are used once; of {names} {len(widths)} were")
    for name, width in zip(names, widths, strict=True):
        kept = torch.rand(width, generator=generator) >= share
        model.set_submodule(name, nn.Sequential(model.get_submodule(name), Mask(kept / (1 - share))))
    return model


def every_other(run: sp.Trajectory) -> sp.Trajectory:
    """The run with half of each stage's checkpoints (rounded down, but one at least), evenly, its last among them."""
    stages = []
    for stage in run.stages:
        points, count = stage.checkpoints, max(1, len(stage.checkpoints) // 2)
        kept = [points[len(points) * (i + 1) // count - 1] for i in range(count)]
        stages.append(replace(stage, checkpoints=kept))
    return sp.Trajectory.from_stages(stages)


_SWAG, _MASK = partial(_noisy, scale=1.0), partial(_dropped, share=0.1)
_SMALL = 20_000  # parameters
_MAIN = [
    Line("2 sketches", 2, _unchanged),
    Line("2 with noise x 1", 2, _SWAG),
    Line("2 runs", 2),
    Line("2 masks, p = 0.05", 2, partial(_dropped, share=0.05)),
    Line("half the checkpoints each: 2 with noise x 1", 2, _SWAG, 0.5),
    Line("half the checkpoints each: 2 runs", 2, None, 0.5),
    Line("4 sketches", 4, _unchanged),
    Line("4 with noise x 1", 4, _SWAG),
    Line("4 runs", 4),
]
_FURTHER = [
    Line("1 run with noise x 1 anew at each checkpoint", 1, partial(_noisy, scale=1.0, anew=True)),
    Line("2 with noise x 0.5", 2, partial(_noisy, scale=0.5)),
    Line("2 with noise x 2", 2, partial(_noisy, scale=2.0)),
    Line("2 with diagonal noise x 1", 2, partial(_noisy, scale=1.0, low_rank=False)),
    Line("2 masks, p = 0.1", 2, _MASK),
    Line("2 masks, p = 0.2", 2, partial(_dropped, share=0.2)),
    Line("half the checkpoints each: 2 masks, p = 0.1", 2, _MASK, 0.5),
    Line("4 masks, p = 0.1", 4, _MASK),
]
