"""How the cost of a bank and of its questions grows: with examples, checkpoints, sketch size, parameters, queries.

    python examples/speed/growth.py

Each size is doubled twice, and the processor time of one thread is fitted by a power: the slope is 1 where cost doubles
with the size, and 0 where it does not matter.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

import source_proj as sp


@dataclass(frozen=True)
class Sizes:
    """Of a bank and of what is asked of it."""

    examples: int = 4096
    checkpoints: int = 2
    dim: int = 1024
    width: int = 512
    queries: int = 128


def network(width: int, seed: int) -> nn.Module:
    """A perceptron whose parameters are mostly width² of them."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def data(count: int) -> TensorDataset:
    """Inputs and labels."""
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(count, 64, generator=generator), torch.arange(count) % 10)


def times(sizes: Sizes) -> dict[str, float]:
    """Processor seconds of a build, of a fit, and of a score."""
    states = [network(sizes.width, seed).state_dict() for seed in range(sizes.checkpoints)]
    run = sp.Trajectory([sp.Checkpoint(state, 10 * place, lr=0.1) for place, state in enumerate(states)])
    model, task = network(sizes.width, 0), sp.Classification()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bank"
        sketch = sp.Sketch(dim=sizes.dim)
        bank, building = timed(
            lambda: sp.build(
                model, task, run, data(sizes.examples), path, sketch=sketch, parameters=["*"], progress=False
            )
        )
        source = sp.Source(bank, model=model, task=task, progress=False)
        _, fitting = timed(lambda: source.score(data(1)))
        _, scoring = timed(lambda: source.score(data(sizes.queries)))
    return {"build": building, "fit": fitting, "score": scoring}


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and its processor seconds."""
    start = time.process_time()
    return function(), time.process_time() - start


def slope(sizes: list[float], seconds: list[float]) -> float:
    """Of the line through (log size, log seconds)."""
    x, y = ([math.log(value) for value in values] for values in (sizes, seconds))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return products / sum((a - mean_x) ** 2 for a in x)


def main() -> None:
    """Print a table of slopes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = Sizes()
    times(base)
    print("| grows | build | fit | score |\n| --- | --- | --- | --- |")
    for name in ("examples", "checkpoints", "dim", "width", "queries"):
        several = [replace(base, **{name: factor * getattr(base, name)}) for factor in (1, 2, 4)]
        rounds = [[times(sizes) for sizes in several] for _ in range(args.rounds)]
        grown = [float(getattr(sizes, name) ** (2 if name == "width" else 1)) for sizes in several]
        shown = []
        for step in ("build", "fit", "score"):
            seconds = [median(each[place][step] for each in rounds) for place in range(len(several))]
            shown.append(f"{slope(grown, seconds):.2f} ({seconds[0]:.2f} to {seconds[-1]:.2f} s)")
        print(f"| {'parameters' if name == 'width' else name} ×4 | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
