"""Concrete: a regression by an MLP trained to convergence (SOURCE paper, section 5.1).

python examples/paper/concrete.py
"""

import argparse
from functools import partial
from typing import Any

import numpy as np
import torch
from _pipeline import run
from _problem import Problem, Sizes, parser, sized
from _stacked import StackedRun, StageSetting, absolute_error, mlp, mse
from _tables import concrete, split_table
from torch.utils.data import TensorDataset

import source_proj as sp


def problem(options: argparse.Namespace) -> Problem:
    """Make the task."""
    train_set, queries = data(options)
    return table_problem(options, "concrete", "Concrete", train_set, queries, epochs=20)


def data(options: argparse.Namespace) -> tuple[TensorDataset, TensorDataset]:
    """Rows to train on, and queries."""
    return split_table(concrete(options), 100, classes=False, most=sized(options, None, None, 200))


def replace_targets(train_set: TensorDataset, share: float) -> tuple[TensorDataset, np.ndarray]:
    """Exchange the targets of a share of the rows among each other; also say which."""
    inputs, targets = train_set.tensors
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(targets))[: round(share * len(targets))]
    noisy = np.zeros(len(targets), dtype=bool)
    noisy[chosen] = True
    replaced = targets.clone()
    replaced[torch.from_numpy(chosen)] = targets[torch.from_numpy(rng.permutation(chosen))]
    return TensorDataset(inputs, replaced), noisy


def table_problem(
    options: argparse.Namespace, name: str, title: str, train_set: TensorDataset, queries: TensorDataset, *,
    epochs: int, **rest: Any,
) -> Problem:  # fmt: skip
    """What regressions on a table share."""
    inputs = train_set.tensors[0].shape[1]
    stage = StageSetting(train_set, epochs=epochs, batch=32, lr=0.03, checkpoints=6)
    descent = partial(torch.optim.SGD, weight_decay=1e-5)
    run = StackedRun(
        mlp(inputs, 128, 128, 1), {"train": stage}, queries, absolute_error, optimizer=descent, loss=mse, group=50
    )
    sizes = sized(options, Sizes(100, 20, 5), Sizes(100, 8, 3), Sizes(12, 2, 2, 256, (128,)))
    return Problem(
        name=name,
        title=title,
        task=sp.Regression(),
        make_model=run.make_model,
        train_sets={"train": train_set},
        queries=queries,
        record=run.record,
        retrain=run.retrain,
        group=50,
        settings={"task": name, **run.settings()},
        sizes=sizes,
        kronecker=True,
        peers=True,
        extra={
            "accuracy": run.accuracy,
            "record_more": run.record_more,
            "captured": partial(run.captured, sp.Regression()),
            "workers": 2,
        },
        **rest,
    )


if __name__ == "__main__":
    run(problem, parser(__doc__))
