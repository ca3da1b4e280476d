"""Convex problems, whose optimum can be had exactly: logistic and linear regression (SOURCE paper, appendix E.3).

Each comes in two forms: trained with SGD as usual, and at the optimal solution, where influence functions are right but
for the Hessian that they take: the difference is what training that has not converged does to a method.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _problem import Problem, Sizes, sized
from _stacked import StackedRun, StageSetting
from torch import Tensor
from torch.utils.data import TensorDataset

import source_proj as sp

__all__ = ["convex_problem"]

DECAY = 1e-3
_NEWTON_STEPS = 50


def convex_problem(
    options: argparse.Namespace,
    name: str,
    title: str,
    data: tuple[TensorDataset, TensorDataset],
    make_model: Callable[[], torch.nn.Linear],
    task: sp.Task,
    measure: Callable[[Tensor, Tensor], Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    optimal: bool,
) -> Problem:
    """A model of one linear layer, trained with SGD or solved."""
    train_set, queries = data
    # An odd number: the absolute error's gradient is ±x here, and over six checkpoints its mean can be exactly zero.
    stage = StageSetting(train_set, epochs=20, batch=32, lr=0.03, checkpoints=5)
    descent = partial(torch.optim.SGD, weight_decay=DECAY)
    run = StackedRun(make_model, {"train": stage}, queries, measure, optimizer=descent, loss=loss, group=50)
    sizes = sized(options, Sizes(100, 20, 5), Sizes(100, 8, 3), Sizes(12, 2, 2))
    common: dict[str, Any] = {
        "task": task, "make_model": make_model, "train_sets": {"train": train_set}, "queries": queries, "sizes": sizes,
        "peers": True,
    }  # fmt: skip
    if not optimal:
        return Problem(
            name=name, title=title, record=run.record, retrain=run.retrain, group=50,
            settings={"task": name, **run.settings()},
            extra={"accuracy": run.accuracy, "record_more": run.record_more, "workers": 2}, **common,
        )  # fmt: skip

    def state_of(kept: np.ndarray) -> dict[str, Tensor]:
        inputs, targets = (one[torch.from_numpy(kept)] for one in train_set.tensors)
        return _solve(make_model(), inputs, targets, loss)

    def retrain(kept: list[np.ndarray], seeds: list[int]) -> np.ndarray:  # noqa: ARG001 (one optimum, whatever the seed)
        inputs, targets = queries.tensors
        outputs = []
        for one in kept:
            state = state_of(one)
            outputs.append(inputs.double() @ state["weight"].T + state["bias"])
        return measure(torch.stack(outputs), targets).numpy()

    def record(seed: int, folder: Path) -> sp.Trajectory:  # noqa: ARG001
        state = {key: value.float() for key, value in state_of(np.arange(len(train_set))).items()}
        # One step of an enormous learning rate: gradient flow for as long as it takes to arrive.
        return sp.Trajectory([sp.Checkpoint(state, step=1, lr=1e9)], optimizer=sp.SGD(weight_decay=DECAY))

    common["sizes"] = sized(options, Sizes(100, 1, 1), Sizes(100, 1, 1), Sizes(12, 1, 1))
    return Problem(
        name=f"{name}_optimal", title=f"{title}, optimal", record=record, retrain=retrain, group=100,
        settings={"task": f"{name}_optimal", "decay": DECAY, "n": len(train_set), "queries": len(queries)},
        notes=("the exact optimum, also of every retraining: no training noise",), **common,
    )  # fmt: skip


def _solve(
    model: torch.nn.Linear, inputs: Tensor, targets: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Newton's method on the mean loss plus weight decay, in float64."""
    x = torch.cat([inputs.double(), torch.ones(len(inputs), 1, dtype=torch.float64)], dim=1)
    outputs, width = model.out_features, x.shape[1]

    def objective(theta: Tensor) -> Tensor:
        predicted = x @ theta.view(outputs, width).T
        return (
            loss(predicted, targets if targets.dtype == torch.int64 else targets.double()) + DECAY / 2 * theta @ theta
        )

    theta = torch.zeros(outputs * width, dtype=torch.float64)
    for _ in range(_NEWTON_STEPS):
        gradient = torch.func.grad(objective)(theta)
        step = torch.linalg.solve(torch.func.hessian(objective)(theta), gradient)
        theta = theta - step
        if float(step.norm()) < 1e-12 * (1 + float(theta.norm())):
            break
    solved = theta.view(outputs, width)
    return {"weight": solved[:, :-1].contiguous(), "bias": solved[:, -1].contiguous()}
