"""Study (p): the bank that training itself leaves, against banks of the same runs' checkpoints."""

from collections.abc import Callable, Iterator

import numpy as np
from _bench import Bench
from _pipeline import RUN_SEED

import source_proj as sp
from source_proj.evaluate import GroundTruth

__all__ = ["Captures", "captured_rows"]

Captures = Callable[..., sp.Bank]
"""``extra["captured"]`` of a problem: trains with a seed in a folder, capturing by a sketch, and gives the bank.

Of a task whose parameters have weights it takes them too.
"""


def captured_rows(bench: Bench) -> Iterator[tuple[str, list[np.ndarray], GroundTruth, list[np.ndarray]]]:
    """(p) Rows summed at every step, which cost no pass, or rows of the checkpoints? Each against these.

    Runs, sketches and query gradients are the same. Where labels are drawn for the Fisher by default, both are shown.
    """
    captured: Captures = bench.problem.extra["captured"]
    weighted = bench.problem.task.parameter_weights
    for dim in (bench.dim, 2 * bench.dim):
        count = len(bench.trajectories[0].stages[0].checkpoints)
        first = [bench.asked(bench.bank(run, dim=dim, kind="tensor")) for run in range(bench.runs)]
        yield f"{count} checkpoints, k = {dim:,}", first, bench.truth, first
        if draws := bench.problem.task.sampled_draws:
            banks = [bench.bank(run, dim=dim, kind="tensor", fisher=draws) for run in range(bench.runs)]
            sampled = [bench.asked(bank) for bank in banks]
            yield f"{count} checkpoints, sampled Fisher, k = {dim:,}", sampled, bench.truth, first
        weights: list[dict[str, float]] = []
        if weighted != "none":
            by_agreement = []
            for run, trajectory in enumerate(bench.trajectories):
                path = bench.folder / "laboratory" / f"weighted-{run}-{dim}"
                bank = bench.build(trajectory, path, sp.Sketch(dim, seed=run), parameter_weights=weighted)
                by_agreement.append(bench.asked(bank))
                weights.append(bank.parameter_weights)
            yield f"{count} checkpoints, weights by agreement, k = {dim:,}", by_agreement, bench.truth, first
        rows = []
        for run in range(bench.runs):
            folder = bench.folder / "laboratory" / f"captured-{run}-{dim}"
            rows.append(bench.asked(captured(RUN_SEED + run, folder, sp.Sketch(dim, seed=run))))
        yield f"captured at every step, k = {dim:,}", rows, bench.truth, first
        if weights:
            rows = []
            for run in range(bench.runs):
                folder = bench.folder / "laboratory" / f"captured-weighted-{run}-{dim}"
                bank = captured(RUN_SEED + run, folder, sp.Sketch(dim, seed=run), weights[run - 1])
                rows.append(bench.asked(bank))
            yield f"captured at every step, another run's weights, k = {dim:,}", rows, bench.truth, first
