"""Fashion-MNIST-N: 30 % of the labels are wrong, and training stops after three epochs (SOURCE paper, section 5.1).

python examples/paper/fashion_mnist_noise.py
"""

import argparse

from _images import draw, image_problem, replace_labels
from _pipeline import run
from _problem import Problem, Sizes, parser, sized
from _stacked import StageSetting


def problem(options: argparse.Namespace) -> Problem:
    """Make the task."""
    clean, queries = draw(options, "fashion_mnist", *sized(options, (60000, 500), (6000, 200), (600, 40)))
    train_set, noisy = replace_labels(clean, 0.3)
    stage = StageSetting(train_set, epochs=3, batch=64, lr=0.03, checkpoints=3)
    sizes = sized(options, Sizes(100, 6, 5, 16384, (4096,)), Sizes(100, 4, 3), Sizes(12, 2, 2, 256, (128,)))
    return image_problem(
        "fashion_mnist_noise", "Fashion-MNIST-N", "fashion_mnist", {"train": stage}, queries, widths=(256, 128),
        sizes=sizes, noisy=noisy, notes=("30 % of the training labels are wrong; three epochs, not converged",),
    )  # fmt: skip


if __name__ == "__main__":
    run(problem, parser(__doc__))
