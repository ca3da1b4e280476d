"""Fits and searches on a Dask cluster whose workers are killed while they work; a program, as tests use one cluster.

    python tests/faults/killed_executors.py --kills 20

Prints a JSON report; bits that differ from one process's end the program.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1] / "attribution"))
from problems import classification

import source_proj as sp
from source_proj.attribution.features import SketchedQueries

ROWS, QUERIES, DIM, SHARD = 1_600, 64, 512, 160

Answers = dict[str, np.ndarray]


def make_bank(folder: Path) -> tuple[sp.Source, SketchedQueries]:
    """A bank of ten shards at each of four checkpoints, and queries."""
    problem = classification(n=ROWS)
    x = torch.randn(QUERIES, 5, generator=torch.Generator().manual_seed(1))
    options = {"storage": "int8", "batch_size": 32, "shard_rows": SHARD}
    bank = problem.build(folder / "bank", sp.Sketch(DIM), **options)
    alone = sp.Source(bank, model=problem.model, cache=False, progress=False)
    return alone, alone.sketch(TensorDataset(x, torch.arange(QUERIES) % 3))


def answers(source: sp.Source, features: SketchedQueries) -> Answers:
    """Fit, then what is asked of the bank."""
    hits = source.top_k(features, 10)
    return {"rows": hits.indices, "scores": hits.scores, "self-influence": source.self_influence().values}


def require_same(found: Answers, expected: Answers) -> None:
    for name, values in expected.items():
        if found[name].tobytes() != values.tobytes():
            raise SystemExit(f"{name} differ from those of one process in {(found[name] != values).sum()} numbers")


def killed_run(victim: int, ask: Callable[[], Answers], moment: float) -> tuple[Answers, bool]:
    """The answers of workers one of which is killed after a while, and whether it was while they worked."""
    finished, killed = threading.Event(), threading.Event()

    def kill() -> None:
        if not finished.wait(moment):
            os.kill(victim, signal.SIGKILL)
            killed.set()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        found = ask()
    finally:
        finished.set()
        killer.join()
    return found, killed.is_set()


def kill_workers(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Ask clusters of two workers, one of which is killed, until there were enough kills."""
    from distributed import Client, LocalCluster

    draw = random.Random(seed)
    alone, features = make_bank(folder)
    expected = answers(alone, features)
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    duration, moments, runs = 0.0, [], 0
    while len(moments) < kills:
        with LocalCluster(**options, local_directory=str(folder)) as cluster, Client(cluster) as client:
            client.wait_for_workers(2)
            shared = alone.replace(executor=client.get_executor())
            if not duration:
                start = time.perf_counter()
                require_same(answers(shared, features), expected)
                duration = time.perf_counter() - start
            victim = draw.choice([nanny.pid for nanny in cluster.workers.values()])
            moment = draw.uniform(0, 0.8) * duration
            found, killed = killed_run(victim, lambda shared=shared: answers(shared, features), moment)
            require_same(found, expected)
            moments += [round(moment, 2)] if killed else []
            runs += 1
            print(f"{len(moments)} kills in {runs} runs", file=sys.stderr, flush=True)
    return {"kills": len(moments), "runs": runs, "seconds": round(duration, 2), "killed at": moments}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = kill_workers(Path(folder), arguments.kills, arguments.seed)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
