"""Wall time of one bank by two processes with one thread each, against one process with one thread.

    python examples/speed/launch.py

Rounds alternate. A launcher's processes import torch and wait; the clock runs from the moment that all are ready until
the last has returned, so that it measures the build and not the interpreter. Where other programs use the same cores,
wall times say little: the processor time that each process used says what two free cores would take, which is the
larger of the two processes' own (they wait for nobody but the disk).
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.utils.data import TensorDataset

import source_proj as sp


def network(width: int) -> nn.Module:
    """A perceptron with two hidden layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def build(path: Path, examples: int, width: int, shard: tuple[int, int]) -> None:
    """One worker's part of a bank of two checkpoints."""
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(examples, 64, generator=generator), torch.arange(examples) % 10
    run = sp.Trajectory([sp.Checkpoint(network(width).state_dict(), step, lr=0.1) for step in (10, 20)])
    data = TensorDataset(inputs, labels)
    sp.build(
        network(width), sp.Classification(), run, data, path, sketch=sp.Sketch(dim=1024), shard_rows=512,
        parameters=["*"], progress=False, shard=shard, takeover=300.0,
    )  # fmt: skip


def worker(pipe: Connection, folder: str, examples: int, width: int, shard: tuple[int, int]) -> None:
    """Warm up, wait for the word, build, and say what processor time it took."""
    torch.set_num_threads(1)
    build(Path(folder) / f"warm_{shard[0]}_{shard[1]}", 256, width, (0, 1))
    pipe.send(None)
    pipe.recv()
    before = used()
    build(Path(folder) / f"bank_{shard[1]}", examples, width, shard)
    pipe.send(used() - before)


def used() -> float:
    """Processor seconds of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def timed(processes: int, examples: int, width: int) -> tuple[float, list[float]]:
    """Wall seconds of a build, and each process's processor seconds."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, workers = [], []
        for index in range(processes):
            ours, theirs = context.Pipe()
            arguments = (theirs, folder, examples, width, (index, processes))
            workers.append(context.Process(target=worker, args=arguments))
            workers[-1].start()
            pipes.append(ours)
        for pipe in pipes:
            pipe.recv()
        start = time.perf_counter()
        for pipe in pipes:
            pipe.send(None)
        took = [pipe.recv() for pipe in pipes]
        wall = time.perf_counter() - start
        for process in workers:
            process.join()
    return wall, took


def main() -> None:
    """Print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=16384)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rounds = [[timed(count, args.examples, args.width) for count in (1, 2)] for _ in range(args.rounds)]
    alone, both = ([each[place] for each in rounds] for place in (0, 1))
    for name, several in (("one process", alone), ("two processes", both)):
        processor = " and ".join(f"{median(times):.2f}" for times in zip(*(took for _, took in several), strict=True))
        print(f"{name}: wall {median(wall for wall, _ in several):.2f} s, processor time {processor} s")
    walls = median(first / second for (first, _), (second, _) in zip(alone, both, strict=True))
    cores = median(first[0] / max(second) for (_, first), (_, second) in zip(alone, both, strict=True))
    print(f"two processes are {walls:.2f} times as fast by the clock, {cores:.2f} times by processor time (free cores)")


if __name__ == "__main__":
    main()
