"""Digits, upright and then rotated: RotatedMNIST in miniature, on the digits that scikit-learn ships.

python examples/paper/rotated_digits.py
"""

import argparse

import _above  # noqa: F401
import numpy as np
import torch
from _pipeline import run
from _problem import Problem, Sizes, parser, sized
from _rotate import rotate
from _stacked import StackedRun, StageSetting, margin, mlp
from torch.utils.data import TensorDataset

import source_proj as sp


def problem(options: argparse.Namespace) -> Problem:
    """Make the task."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = np.random.default_rng(0).permutation(len(images))
    counts = sized(options, (900, 300, 200), (900, 300, 200), (240, 80, 40))
    upright, turned, asked, _ = np.split(order, np.cumsum(counts))
    first = TensorDataset(images[upright], labels[upright])
    second, queries = (TensorDataset(rotate(images[one], 8, 30), labels[one]) for one in (turned, asked))
    epochs = sized(options, (20, 10), (20, 10), (4, 2))
    stages = {
        "upright": StageSetting(first, epochs=epochs[0], batch=32, lr=0.03, checkpoints=4),
        "rotated": StageSetting(second, epochs=epochs[1], batch=32, lr=0.01, checkpoints=4),
    }
    run = StackedRun(mlp(64, 64, 64, 10), stages, queries, margin, group=50)
    sets = {"upright": first, "rotated": second}

    def show(which: str, index: int) -> tuple[np.ndarray, str]:
        image, label = {**sets, "queries": queries}[which][index]
        return image.reshape(8, 8).numpy(), str(int(label))

    return Problem(
        name="rotated_digits", title="Rotated digits", task=sp.Classification(), make_model=run.make_model,
        train_sets=sets, queries=queries, record=run.record, retrain=run.retrain, predict=run.predict, group=100,
        settings={"task": "rotated_digits", **run.settings()},
        sizes=sized(options, Sizes(100, 8, 5), Sizes(100, 8, 3), Sizes(12, 2, 2, 256, (128,))),
        notes=("900 upright digits (attributed), then 300 others rotated by 30 degrees",), panel="image", show=show,
        kronecker=True, extra={"accuracy": run.accuracy, "record_more": run.record_more, "workers": 2},
    )  # fmt: skip


if __name__ == "__main__":
    run(problem, parser(__doc__))
