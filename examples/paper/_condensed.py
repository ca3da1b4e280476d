"""Study (s): many checkpoints whose rows are kept as their mean alone, against a row for each of a few."""

import shutil
from collections.abc import Iterator

import numpy as np
from _bench import Bench
from _pipeline import RUN_SEED

import source_proj as sp
from source_proj.evaluate import GroundTruth

__all__ = ["condensed_rows"]


def condensed_rows(bench: Bench) -> Iterator[tuple[str, list[np.ndarray], GroundTruth, list[np.ndarray]]]:
    """(s) More checkpoints in the room of one? Each against the task's own checkpoints, a row each, at the same k.

    Parameters weigh what they do by default, of language models by agreement.
    """
    dim, count = 2 * bench.dim, len(bench.trajectories[0].stages[0].checkpoints)
    first = [bench.asked(_bank(bench, run, bench.trajectories[run], dim)) for run in range(bench.runs)]
    yield f"{count} checkpoints, k = {dim:,}, a row each", first, bench.truth, first
    for many in (12, 24, 48):
        yield f"{many} checkpoints, one row", _of(bench, many, dim), bench.truth, first
        if many == 24:
            yield "24 checkpoints, one row, queries at 6", _of(bench, many, dim, query_points=6), bench.truth, first
            yield "24 checkpoints, one row in int4", _of(bench, many, dim, storage="int4"), bench.truth, first
        if many == 24 and bench.size > 4 * dim:
            large = f"24 checkpoints, one row, k = {4 * dim:,}"
            yield large, _of(bench, many, 4 * dim), bench.truth, first
            yield f"{large} in int4", _of(bench, many, 4 * dim, storage="int4"), bench.truth, first


def _of(bench: Bench, many: int, dim: int, **options: object) -> list[np.ndarray]:
    """Scores of each run, of its mean rows."""
    found = []
    for run in range(bench.runs):
        place = bench.folder / "laboratory" / f"{run}-{many}"
        trajectory = bench.problem.extra["record_more"](RUN_SEED + run, place / "run", many)
        bank = _bank(bench, run, trajectory, dim)
        condensed = place / "-".join(["condensed", *map(str, options.values())])
        found.append(bench.asked(sp.condense(bank, condensed, **options)))  # type: ignore[arg-type]
        shutil.rmtree(condensed)
    return found


def _bank(bench: Bench, run: int, trajectory: sp.Trajectory, dim: int) -> sp.Bank:
    """A bank of a run with as many checkpoints as it has."""
    path = bench.folder / "laboratory" / f"{run}-{dim}-{len(trajectory.stages[0].checkpoints)}-bank"
    return bench.build(trajectory, path, sp.Sketch(dim, seed=run), parameter_weights=None)
