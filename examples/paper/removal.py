"""Subset removal: how many credited examples must go before a correct prediction flips (SOURCE paper, section 5.2).

    python examples/paper/removal.py                          # Fashion-MNIST (2,000 images) and RotatedMNIST
    python examples/paper/removal.py --tasks rotated_mnist

For each query that the network gets right, a method's most helpful examples are left out in growing numbers and the
network is trained again. The more predictions flip at equal removals, the better the method knew what they rested on.
Methods compete at the settings that are best by LDS on other queries; the baseline removes random examples of the
query's own class. Every method's scores are the means over all recorded runs.
"""

import argparse
import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from _methods import DEFAULT, candidates
from _pictures import save_picture
from _pipeline import banks, ground_truth, home, retrainers
from _problem import Examples, Problem, parser, sized

from source_proj.evaluate import (
    SubsetRemoval,
    compare_methods,
    compare_removal,
    plot_removal,
    random_same_class,
    subset_removal,
)

METHODS = [DEFAULT, "Influence functions, averaged", "Influence functions", "TRAK", "TracIn", "Hydra (fast)", "RepSim"]
RANDOM = "random, same class"
SIZES = {"fashion_mnist": [10, 25, 50, 100, 200], "rotated_mnist": [50, 100, 200, 400, 800]}
"""Examples removed: a second stage on other data repairs most of what the first one lost, so more of them there."""
BASE_SEED = 10**6  # of the networks trained on everything whose prediction counts


def removal(problem: Problem, options: argparse.Namespace, sizes: list[int], count: int) -> dict[str, SubsetRemoval]:
    """Remove by every method's scores, for up to ``count`` queries that are predicted correctly."""
    if problem.predict is None:
        raise ValueError(f"{problem.name} has no predict function, so that no prediction can flip")
    truth = ground_truth(problem, options)
    wanted = [
        one
        for one in candidates(problem, banks(problem, options), None, home(problem, options))
        if one.method in METHODS
    ]
    judged = compare_methods(wanted, truth.masks, truth.outcomes)
    scores = {result.method: result.scores for result in judged.results}
    labels = [np.array([int(data[i][1]) for i in range(len(data))]) for data in (_first(problem), problem.queries)]
    scores[RANDOM] = random_same_class(*labels)
    base = _majority(problem, problem.predict)
    correct = base == labels[1]
    correct[np.flatnonzero(correct)[count:]] = False
    print(f"{problem.title}: {correct.sum()} queries, all of them predicted correctly by most networks")
    results = {}
    for name, one in scores.items():
        with retrainers(problem) as executor:
            results[name] = subset_removal(
                one, base, problem.predict, sizes, correct=correct, higher_is_better=problem.task.higher_is_better,
                path=home(problem, options) / f"removal-{''.join(filter(str.isalnum, name))}-{count}",
                group=problem.group, executor=executor, settings=problem.settings,
            )  # fmt: skip
        print(f"{name:32s} {results[name]}", flush=True)
    return results


def _first(problem: Problem) -> Examples:
    return next(iter(problem.train_sets.values()))


def _majority(problem: Problem, predict: Callable[[list[np.ndarray], list[int]], np.ndarray]) -> np.ndarray:
    """Prediction of most of nine networks trained on everything."""
    seeds = [BASE_SEED + i for i in range(9)]
    predicted = predict([np.arange(problem.n)] * len(seeds), seeds).astype(np.int64)  # (9, Q)
    return np.array([np.bincount(column).argmax() for column in predicted.T])


def write(problem: Problem, results: dict[str, SubsetRemoval], folder: Path) -> None:
    """Table and figure."""
    rows = []
    for name, one in results.items():
        behind = compare_removal(results[DEFAULT], one)
        for i, size in enumerate(one.sizes):
            rows.append(
                {"task": problem.name, "method": name, "removed": int(size), "queries": len(one.queries),
                 "flipped": one.fraction[i], "low": one.interval[i][0], "high": one.interval[i][1],
                 "diff": behind.value[i], "diff_low": behind.interval[i][0], "diff_high": behind.interval[i][1]}
            )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(folder / f"{problem.name}.csv", index=False, float_format="%.4f")
    figure = plot_removal(results)
    figure.axes[0].set_title(f"{problem.title}, {problem.n:,} examples")
    save_picture(figure, folder / f"{problem.name}.png")
    facts = {"title": problem.title, "n": problem.n, "queries": rows[0]["queries"], "runs": problem.sizes.runs}
    (folder / f"{problem.name}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Do the tasks asked for."""
    found = parser(__doc__ or "")
    found.add_argument("--tasks", default="fashion_mnist,rotated_mnist", help="names, separated by commas")
    found.add_argument("--count", type=int, help="queries (default 40)")
    options = found.parse_args()
    for name in options.tasks.split(","):
        problem = importlib.import_module(name).problem(options)
        if name == "fashion_mnist" and not (options.full or options.quick):
            problem = importlib.import_module(name).problem(options, small=True)
        problem = dataclasses.replace(problem, kronecker=False, peers=False)
        sizes = sized(options, [10, 50, 100, 200, 500, 1000], SIZES.get(name, SIZES["fashion_mnist"]), [5, 20])
        results = removal(problem, options, sizes, options.count or sized(options, 100, 40, 6))
        if not options.quick:
            write(problem, results, options.results / "removal")


if __name__ == "__main__":
    main()
