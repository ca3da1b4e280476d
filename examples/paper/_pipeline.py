"""From a task to its table: retrain, record, build banks, score by every method, compare, draw."""

import argparse
import dataclasses
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from _methods import DEFAULT, TIMED, Run, candidates
from _problem import Problem
from joblib.externals.loky import get_reusable_executor

import source_proj as sp
from source_proj.evaluate import Candidate, Comparison, GroundTruth, compare_methods
from source_proj.trajectory import Stage

__all__ = ["banks", "ground_truth", "home", "retrainers", "run"]

REFERENCES = (DEFAULT, TIMED)  # the others' differences are to these
RUN_SEED = 10**8  # far from the seeds of retrainings
_LARGER = 4  # times the dimension, which takes the same bytes in a quarter of the bits
_LEVEL = 5e-4  # LDS by which two processors differ on the same retrainings


def run(make_problem: Callable[[argparse.Namespace], Problem], parser: argparse.ArgumentParser) -> Comparison:
    """Do one task with the options of the command line."""
    options = parser.parse_args()
    return compare(make_problem(options), options)


def compare(problem: Problem, options: argparse.Namespace) -> Comparison:
    """Do one task: everything that a killed process had finished is found in the cache."""
    started = time.perf_counter()
    truth = ground_truth(problem, options)
    lap = _report(started, f"{problem.title}: {truth.shape[0]} subsets x {truth.shape[1]} retrainings")
    extra = ground_truth(problem, options, of_its_own=True) if problem.cheap and not options.methods else None
    runs = banks(problem, options)
    lap = _report(lap, f"{len(runs)} runs and their banks")
    wanted = candidates(problem, runs, extra, home(problem, options))
    if options.methods:
        wanted = chosen(wanted, options.methods)
        if not options.quick:  # before the others are scored, which may take hours
            check_same(
                problem,
                compare_methods(wanted[: len(REFERENCES)], truth.masks, truth.outcomes),
                table_of(problem, options),
            )
    found = compare_methods(wanted, truth.masks, truth.outcomes)
    _report(lap, "fits and scores")
    print("\n" + found.table().round(3).to_string(columns=["method", "runs", "setting", "lds", "low", "high", "slope"]))
    if options.methods and not options.quick:
        merge(problem, found, table_of(problem, options))
    elif not options.quick:
        write(problem, options, found, truth, runs, time.perf_counter() - started)
    return found


def home(problem: Problem, options: argparse.Namespace) -> Path:
    """Folder of a task's runs, banks and retrainings: other settings, other folder."""
    digest = hashlib.sha256(json.dumps(dict(problem.settings), sort_keys=True).encode()).hexdigest()[:12]
    return Path(options.cache) / f"{problem.name}-{digest}"


def ground_truth(problem: Problem, options: argparse.Namespace, *, of_its_own: bool = False) -> GroundTruth:
    """Retrain on random halves; ``of_its_own`` gives other halves, once each, for empirical influence."""
    sizes = problem.sizes
    seed, retrainings, name = (10**7, 1, "own-retrainings") if of_its_own else (0, sizes.retrainings, "retrainings")
    count = max(40, sizes.subsets) if of_its_own else sizes.subsets  # of few, one may hold all or none of an example
    truth = GroundTruth.subsets(
        home(problem, options) / name, problem.n, len(problem.queries), count=count,
        retrainings=retrainings, seed=seed, settings=problem.settings,
    )  # fmt: skip
    with retrainers(problem) as executor:
        return truth.fill(problem.retrain, group=problem.group, executor=executor)


@contextmanager
def retrainers(problem: Problem) -> Iterator[Executor | None]:
    """As many processes as the task's retraining profits from, which share the cores; None for this one alone."""
    workers, threads = int(problem.extra.get("workers", 1)), torch.get_num_threads()
    if workers == 1:
        yield None
        return
    torch.set_num_threads(max(1, threads // workers))
    try:
        yield get_reusable_executor(workers)
    finally:
        torch.set_num_threads(threads)


def banks(problem: Problem, options: argparse.Namespace) -> list[Run]:
    """Record the runs that are attributed, and sketch their gradients."""
    folder, sizes = home(problem, options), problem.sizes
    model = problem.make_model()
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    runs = []
    for index in range(sizes.runs):
        trajectory = problem.record(RUN_SEED + index, folder / f"run-{index}")
        if not index and "accuracy" in problem.extra:
            print(f"run 0: {problem.extra['accuracy'](RUN_SEED, folder / 'run-0')}")
        for own in range(sizes.sketches):
            # Members of an ensemble get sketches of their own, so that their noise averages out.
            seed = index * sizes.sketches + own
            runs.append(_build(problem, options, trajectory, folder / f"banks-{index}-{own}", seed, size))
    return runs


def _build(
    problem: Problem, options: argparse.Namespace, trajectory: sp.Trajectory, folder: Path, seed: int, size: int
) -> Run:
    def build(
        name: str, course: sp.Trajectory, dim: int, only_first: bool = False, weights: str | None = None
    ) -> sp.Bank:
        # A sketch no smaller than the model would add noise and save nothing.
        sketch = sp.Sketch(dim, seed=seed) if dim < size else sp.Sketch(size, "identity")
        sets = dict(list(problem.train_sets.items())[: 1 if only_first else None])
        names = [stage.name for stage in course.stages]
        data: Any = next(iter(sets.values())) if len(names) == 1 and names[0] not in sets else sets
        return sp.build(
            problem.make_model(), problem.task, course, data, folder / f"{name}-{dim}", sketch=sketch,
            device=options.device, parameter_weights=weights,
        )  # fmt: skip

    rivals = partial(build, weights="none")  # as they are published
    dim = problem.sizes.dim
    whole = build("bank", trajectory, dim)
    plain, metric, alone = whole, None, trajectory
    even = None if problem.task.parameter_weights == "none" else build("even", trajectory, dim, weights="none")
    if any(stage.optimizer.preconditioned for stage in trajectory.stages):
        # Decoupled weight decay is no part of the loss: as SGD's λ it would put a floor under the rivals' damping.
        alone = _altered(trajectory, optimizer=sp.SGD())
        plain, metric = rivals("plain", alone, dim), build("metric", _altered(trajectory, preconditioner="shared"), dim)
    first = carried = plain
    if len(trajectory.stages) > 1:
        stage = alone.stages[0]
        alone = sp.Trajectory.from_stages([stage])
        first = rivals("first", alone, dim, only_first=True)
        carried = rivals("carried", sp.Trajectory.from_stages([_ending_at(stage, trajectory)]), dim, only_first=True)
    averaged = build("averaged", trajectory.average_parameters(), dim)
    smaller = tuple(rivals("first", alone, k, only_first=True) for k in problem.sizes.smaller if k < min(dim, size))
    larger = build("bank", trajectory, _LARGER * dim) if _LARGER * dim < size else None
    return Run(trajectory, whole, even, larger, plain, metric, first, carried, averaged, smaller)


def _altered(trajectory: sp.Trajectory, **changes: Any) -> sp.Trajectory:
    return sp.Trajectory.from_stages([dataclasses.replace(stage, **changes) for stage in trajectory.stages])


def _ending_at(stage: Stage, trajectory: sp.Trajectory) -> Stage:
    """A stage whose queries are asked of the final network: later stages are ignored, S being the identity."""
    end = trajectory.final
    return dataclasses.replace(stage, final=sp.Checkpoint(end.path or end.load(), step=stage.checkpoints[-1].step))


def write(
    problem: Problem,
    options: argparse.Namespace,
    found: Comparison,
    truth: GroundTruth,
    runs: list[Run],
    seconds: float,
) -> None:
    """Write table, facts, figure and panels into the results folder."""
    from _mislabelled import find_mislabelled
    from _panels import write_panels
    from _pictures import save_picture

    from source_proj.evaluate import plot_lds

    folder = Path(options.results)
    folder.mkdir(parents=True, exist_ok=True)
    _table(problem, found).to_csv(folder / f"{problem.name}.csv", index=False, float_format="%.4f")
    facts = {
        "title": problem.title,
        "notes": list(problem.notes),
        "n": problem.n,
        "queries": len(problem.queries),
        "unit": problem.task.unit,
        "subsets": truth.shape[0],
        "retrainings": truth.shape[1],
        "runs": problem.sizes.runs,
        "sketches": problem.sizes.sketches,
        "dim": runs[0].bank.sketch.dim,
        "sketch": runs[0].bank.sketch.kind,
        "seconds": round(seconds),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    if problem.noisy is not None:
        facts["mislabelled"] = find_mislabelled(problem, runs, folder)
    (folder / f"{problem.name}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    figure = plot_lds({result.method: result.single for result in found.results})
    save_picture(figure, folder / f"{problem.name}.png")
    if problem.panel is not None:
        named = [DEFAULT, "TRAK", "TracIn", "Influence functions", "RepSim"]
        write_panels(problem, {name: found[name].scores for name in named}, folder)


def chosen(every: Sequence[Candidate], begin: str) -> list[Candidate]:
    """Those whose method's name begins so, behind the references.

    Raises:
        ValueError: there are none.
    """
    references = [candidate for candidate in every if candidate.method in REFERENCES]
    wanted = [each for each in every if each.method.startswith(begin) and each not in references]
    if not wanted:
        names = list(dict.fromkeys(candidate.method for candidate in every))
        raise ValueError(f"no method begins with {begin!r}; there are {names}")
    return [*references, *wanted]


def table_of(problem: Problem, options: argparse.Namespace) -> Path:
    """Where a task's table is."""
    return Path(options.results) / f"{problem.name}.csv"


def merge(problem: Problem, comparison: Comparison, path: Path) -> None:
    """Put rows of some methods into the table that is there, in place of theirs, or behind the others.

    Raises:
        ValueError: see :func:`check_same`.
    """
    check_same(problem, comparison, path)
    new, old = _table(problem, comparison), pd.read_csv(path)
    rows = new[~new["method"].isin(REFERENCES)]
    table = pd.concat([old[~old["method"].isin(rows["method"])], rows])
    table.to_csv(path, index=False, float_format="%.4f")


def check_same(problem: Problem, comparison: Comparison, path: Path) -> None:
    """Compare the references with what the table that is there says of them.

    Raises:
        ValueError: the table was measured with other retrainings, or other defaults of SOURCE.
    """
    same = ["method", "runs", "lds", "ceiling"]
    here, there = (
        table.loc[table["method"].isin(REFERENCES), same].set_index(["method", "runs"]).sort_index()
        for table in (_table(problem, comparison), pd.read_csv(path))
    )
    if not np.allclose(here, there, atol=_LEVEL, rtol=0, equal_nan=True):
        raise ValueError(
            f"{path} is of other retrainings or defaults: there SOURCE has\n{there}\nand here\n{here}\n"
            "Run the task without --methods"
        )


def _table(problem: Problem, comparison: Comparison) -> pd.DataFrame:
    """The comparison's table with the task's name and title before it.

    Differences are to SOURCE's defaults; ``timed``, ``timed_low`` and ``timed_high`` are those to SOURCE that knows the
    retrainings' time.
    """
    names = {"diff": "timed", "diff_low": "timed_low", "diff_high": "timed_high"}
    timed = comparison.behind(TIMED).rename(columns=names)
    table: pd.DataFrame = comparison.table().merge(timed, on=["method", "runs"], how="left")
    table.insert(0, "title", problem.title)
    table.insert(0, "task", problem.name)
    return table


def _report(since: float, what: str) -> float:
    now = time.perf_counter()
    print(f"{what}: {now - since:.0f} s", flush=True)
    return now
