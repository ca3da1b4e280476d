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
from pathlib import Path

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


def main() -> None:
    from distributed import Client, LocalCluster

    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        alone, features = make_bank(Path(folder))
        expected = answers(alone, features)
        options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
        with LocalCluster(**options, local_directory=folder) as cluster, Client(cluster) as client:
            start = time.perf_counter()
            require_same(answers(alone.replace(executor=client.get_executor()), features), expected)
            duration = time.perf_counter() - start
            moments, runs = [], 0
            while len(moments) < arguments.kills:
                client.wait_for_workers(2)
                victim = draw.choice(list(client.run(os.getpid).values()))
                moment, killed = draw.uniform(0, 0.8) * duration, threading.Event()
                finished = threading.Event()

                def kill(victim=victim, moment=moment, killed=killed, finished=finished) -> None:
                    if not finished.wait(moment):
                        os.kill(victim, signal.SIGKILL)
                        killed.set()

                killer = threading.Thread(target=kill)
                killer.start()
                found = answers(alone.replace(executor=client.get_executor()), features)
                finished.set()
                killer.join()
                require_same(found, expected)
                moments += [round(moment, 2)] if killed.is_set() else []
                runs += 1
    report = {"kills": len(moments), "runs": runs, "seconds": round(duration, 2), "killed at": moments}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
