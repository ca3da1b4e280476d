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
    """(s) More checkpoints in the room of one? Each against the task's own checkpoints, a row each, at the same k."""
    dim, count = 2 * bench.dim, len(bench.trajectories[0].stages[0].checkpoints)
    first = [bench.asked(bench.bank(run, dim=dim, kind="tensor")) for run in range(bench.runs)]
    yield f"{count} checkpoints, k = {dim:,}, a row each", first, bench.truth, first
    for many in (12, 24, 48):
        yield f"{many} checkpoints, one row", _of(bench, many, dim), bench.truth, first
        if many == 24:
            yield "24 checkpoints, one row, queries at 6", _of(bench, many, dim, query_points=6), bench.truth, first
            yield "24 checkpoints, one row in int4", _of(bench, many, dim, storage="int4"), bench.truth, first


def _of(bench: Bench, many: int, dim: int, **options: object) -> list[np.ndarray]:
    """Scores of each run, of its mean rows."""
    found = []
    for run in range(bench.runs):
        place = bench.folder / "laboratory" / f"{run}-{dim}-{many}"
        trajectory = bench.problem.extra["record_more"](RUN_SEED + run, place / "run", many)
        bank = bench.build(trajectory, place / "bank", sp.Sketch(dim, seed=run))
        condensed = place / "-".join(["condensed", *map(str, options.values())])
        found.append(bench.asked(sp.condense(bank, condensed, **options)))  # type: ignore[arg-type]
        shutil.rmtree(condensed)
    return found
