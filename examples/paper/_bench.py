"""The laboratory's bench: a task with its runs, and banks of them made when a study asks for them."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from _methods import features_of
from _pipeline import RUN_SEED
from _problem import Problem
from _study import Recipe, fit_scores

import source_proj as sp
from source_proj.evaluate import GroundTruth
from source_proj.trajectory import PreconditionerMode

__all__ = ["Bench"]


@dataclass
class Bench:
    """A task with its runs, and banks of them made when a study asks for them."""

    problem: Problem
    truth: GroundTruth
    folder: Path
    runs: int
    dim: int

    @cached_property
    def trajectories(self) -> list[sp.Trajectory]:
        """The recorded runs."""
        return [self.problem.record(RUN_SEED + i, self.folder / f"run-{i}") for i in range(self.runs)]

    @cached_property
    def size(self) -> int:
        """Number of parameters d."""
        return sum(p.numel() for p in self.problem.make_model().parameters())

    def bank(
        self, run: int, *, dim: int | None = None, seed: int | None = None, fisher: int = 0, kind: str = "sparse",
        storage: str = "int8",
    ) -> sp.Bank:  # fmt: skip
        """The bank of a run; ``dim=0`` is no sketch at all."""
        dim = self.dim if dim is None else dim
        seed = run if seed is None else seed
        exact = dim == 0 or dim >= self.size
        sketch = sp.Sketch(self.size, "identity") if exact else sp.Sketch(dim, kind, seed=seed)
        codec = "" if exact or storage == "int8" else f"-{storage}"
        path = self.folder / "laboratory" / f"{run}-{'exact' if exact else dim}-{seed}-{fisher}-{kind}{codec}"
        storage = "float32" if exact else storage
        return self.build(self.trajectories[run], path, sketch, storage=storage, sampled_fisher=fisher)

    def recorded_often(self) -> list[sp.Bank]:
        """Banks of the same runs with twelve checkpoints a stage."""
        record = self.problem.extra["record_more"]
        found = []
        for run in range(self.runs):
            trajectory = record(RUN_SEED + run, self.folder / "laboratory" / f"run-{run}-12", 12)
            path = self.folder / "laboratory" / f"{run}-{self.dim}-12"
            found.append(self.build(trajectory, path, sp.Sketch(self.dim, "sparse", seed=run)))
        return found

    def build(self, trajectory: sp.Trajectory, path: str | Path, sketch: sp.Sketch, **rest: Any) -> sp.Bank:
        """The bank of a trajectory of this task's model on its training sets, all parameters of equal weight.

        So they were before study (r); what that study is of, it says.
        """
        sets = dict(self.problem.train_sets)
        data: Any = sets if len(sets) > 1 or "train" not in sets else sets["train"]
        rest = {"parameter_weights": "none", **rest}
        return sp.build(self.problem.make_model(), self.problem.task, trajectory, data, path, sketch=sketch, **rest)

    def in_metric(
        self, mode: PreconditionerMode, segments: int, time: float = 1.0, *, dim: int | None = None
    ) -> list[np.ndarray]:
        """Scores of each run by the library itself, with another mode of Adam's preconditioner."""
        dim = dim or self.dim
        found = []
        for run, trajectory in enumerate(self.trajectories):
            # Only a metric a segment depends on how a stage is cut.
            cut = segments if mode.endswith("per_segment") else 1
            stages = [replace(stage, preconditioner=mode, segments=cut) for stage in trajectory.stages]
            path = self.folder / "laboratory" / f"{run}-{dim}-{mode}-{cut}"
            bank = self.build(sp.Trajectory.from_stages(stages), path, sp.Sketch(dim, "sparse", seed=run))
            source = sp.Source(bank, segments=segments, query_gradient="mean", time_scale=time, progress=False)
            found.append(np.asarray(source.score(self.features(bank)))[:, : self.problem.n])
        return found

    def in_storage(self, storage: str, dim: int) -> list[np.ndarray]:
        """Scores of each run by the library itself, of rows in another codec."""
        return [self.by_default(self.bank(run, dim=dim, storage=storage)) for run in range(self.runs)]

    def by_default(self, bank: sp.Bank) -> np.ndarray:
        """Scores by one bank and the library's own defaults."""
        source = sp.Source(bank, progress=False)
        return np.asarray(source.score(self.features(bank)))[:, : self.problem.n]

    def asked(self, bank: sp.Bank) -> np.ndarray:
        """As :meth:`by_default`, of queries that are differentiated where the bank's own ones are."""
        source = sp.Source(bank, model=self.problem.make_model(), progress=False)
        return np.asarray(source.score(self.problem.queries))[:, : self.problem.n]

    def scores(self, recipe: Recipe, **choices: Any) -> list[np.ndarray]:
        """Scores of each run."""
        return [self.one(self.bank(run, **choices), recipe) for run in range(self.runs)]

    def one(self, bank: sp.Bank, recipe: Recipe) -> np.ndarray:
        """Scores by one bank."""
        return fit_scores(bank, self.features(bank), recipe, self.problem.n)

    def features(self, bank: sp.Bank) -> sp.QueryFeatures:
        """Query gradients at all checkpoints, computed once a bank."""
        return features_of(bank, self.problem)
