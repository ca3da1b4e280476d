"""Fashion-MNIST, trained to convergence by AdamW.

    python examples/paper/fashion_mnist_adamw.py

6,000 images, 784-256-128-10, AdamW with learning rate 1e-3 and weight decay 1e-2, batch 64, 20 epochs. The paper trains
its image models with SGD alone.
"""

import argparse
from functools import partial

import torch
from _images import draw, image_problem
from _pipeline import run
from _problem import Problem, Sizes, parser, sized
from _stacked import StageSetting

ADAMW = partial(torch.optim.AdamW, weight_decay=1e-2, fused=True)


def problem(options: argparse.Namespace) -> Problem:
    """Make the task."""
    train_set, queries = draw(options, "fashion_mnist", *sized(options, (60000, 500), (6000, 200), (600, 40)))
    stage = StageSetting(train_set, epochs=sized(options, 20, 20, 4), batch=64, lr=1e-3, checkpoints=6)
    sizes = sized(options, Sizes(100, 6, 5, 16384, (4096,)), Sizes(100, 3, 2), Sizes(12, 2, 2, 256, (128,)))
    return image_problem(
        "fashion_mnist_adamw", "Fashion-MNIST, AdamW", "fashion_mnist", {"train": stage}, queries, widths=(256, 128),
        optimizer=ADAMW, sizes=sizes, notes=("Trained with AdamW; the paper has SGD here.",), cheap=False,
        panel=None,
    )  # fmt: skip


if __name__ == "__main__":
    run(problem, parser(__doc__))
