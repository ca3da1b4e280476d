"""MNIST: an MLP trained to convergence (SOURCE paper, section 5.1).

python examples/paper/mnist.py
"""

import argparse

from _images import draw, image_problem
from _pipeline import run
from _problem import Problem, Sizes, parser, sized
from _stacked import StageSetting


def problem(options: argparse.Namespace) -> Problem:
    """Make the task."""
    train_set, queries = draw(options, "mnist", *sized(options, (60000, 500), (3000, 200), (600, 40)))
    stage = StageSetting(train_set, epochs=sized(options, 20, 20, 4), batch=64, lr=0.03, checkpoints=6)
    sizes = sized(options, Sizes(100, 6, 5, 16384, (4096,)), Sizes(100, 4, 3), Sizes(12, 2, 2, 256, (128,)))
    return image_problem("mnist", "MNIST", "mnist", {"train": stage}, queries, widths=(128, 64), sizes=sizes)


if __name__ == "__main__":
    run(problem, parser(__doc__))
