"""What averaged EK-FAC influence functions cost beside a bank: one recorded run of one task, all of its queries.

    python examples/paper/peer_cost.py                        # Fashion-MNIST, some minutes
    python examples/paper/peer_cost.py --task concrete

kronfluence fits factors at every checkpoint, and passes over the training set for each set of queries, which is what
a second damping takes. The bank is built and fitted once; a set of queries costs their own gradients and a product.
"""

import importlib
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from _grid import grid
from _kronfluence import HEURISTIC, ekfac_influence
from _pipeline import RUN_SEED, home
from _problem import Problem, parser

import source_proj as sp


def seconds(function: Callable[[], object]) -> float:
    """CPU time of all threads, which a busy machine changes least."""
    started = time.process_time()
    function()
    return time.process_time() - started


def main() -> None:
    """Time both, and print a table."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--task", default="fashion_mnist", help="name of a task's file")
    options = arguments.parse_args()
    problem = importlib.import_module(options.task).problem(options)
    run = problem.record(RUN_SEED, home(problem, options) / "run-0")
    (train_set,) = problem.train_sets.values()
    checkpoints = run.stages[0].checkpoints

    def peer(sets: int) -> object:
        """Factors, and the same queries that many times."""
        return ekfac_influence(
            problem.make_model(), problem.task, checkpoints, train_set, problem.queries, dampings=[HEURISTIC] * sets
        )

    ours = bank_seconds(problem, run)
    peers = [seconds(partial(peer, sets)) for sets in (1, 2)]
    queried = peers[1] - peers[0]
    print(f"{problem.title}: {problem.n:,} examples, {len(checkpoints)} checkpoints, {len(problem.queries)} queries, "
          f"{torch.get_num_threads()} threads; CPU seconds")  # fmt: skip
    rows = [
        [f"bank, k = {problem.sizes.dim:,}", *(f"{time_:.1f}" for time_ in ours)],
        ["kronfluence, EK-FAC", f"{peers[0] - queried:.1f}", "–", f"{queried:.1f}"],
    ]
    print("\n".join(grid(["", "build, or factors", "fit", "a set of queries"], rows)))


def bank_seconds(problem: Problem, run: sp.Trajectory) -> list[float]:
    """Of build, fit and queries."""
    model, data = problem.make_model(), next(iter(problem.train_sets.values()))
    with tempfile.TemporaryDirectory() as folder:
        sketch = sp.Sketch(problem.sizes.dim)
        build = partial(sp.build, model, problem.task, run, data, Path(folder) / "bank", sketch=sketch, progress=False)
        built = seconds(build)
        source = sp.Source(sp.open(Path(folder) / "bank"), model=model, progress=False)
        return [built, seconds(source.fit), seconds(partial(source.score, problem.queries))]


if __name__ == "__main__":
    main()
