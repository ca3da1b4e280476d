"""Fashion-MNIST-N, trained by AdamW: 30 % of the labels are wrong, and training stops after three epochs.

python examples/paper/fashion_mnist_adamw_noise.py
"""

import argparse

from _images import draw, image_problem, replace_labels
from _pipeline import run
from _problem import Problem, Sizes, parser, sized
from _stacked import StageSetting
from fashion_mnist_adamw import ADAMW


def problem(options: argparse.Namespace) -> Problem:
    """Make the task."""
    clean, queries = draw(options, "fashion_mnist", *sized(options, (60000, 500), (6000, 200), (600, 40)))
    train_set, noisy = replace_labels(clean, 0.3)
    stage = StageSetting(train_set, epochs=3, batch=64, lr=1e-3, checkpoints=3)
    sizes = sized(options, Sizes(100, 6, 5, 16384, (4096,)), Sizes(100, 3, 2), Sizes(12, 2, 2, 256, (128,)))
    notes = ("30 % of the training labels are wrong; three epochs of AdamW, not converged; the paper has SGD here.",)
    return image_problem(
        "fashion_mnist_adamw_noise", "Fashion-MNIST-N, AdamW", "fashion_mnist", {"train": stage}, queries,
        widths=(256, 128), optimizer=ADAMW, sizes=sizes, noisy=noisy, notes=notes, cheap=False,
        panel=None,
    )  # fmt: skip


if __name__ == "__main__":
    run(problem, parser(__doc__))
