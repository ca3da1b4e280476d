"""RotatedMNIST: two stages, attributed to the first (SOURCE paper, section 5.1).

    python examples/paper/rotated_mnist.py

A network learns upright digits, then goes on with other digits that are rotated. Queries are rotated test digits, asked
of the final network; attributed are the upright digits, whose traces the second stage has partly overwritten.
"""

import argparse

import _above  # noqa: F401
import numpy as np
from _data import load_images
from _images import image_problem
from _pipeline import run
from _problem import Problem, Sizes, parser, sized
from _rotate import rotate
from _stacked import StageSetting
from torch.utils.data import TensorDataset


def problem(options: argparse.Namespace) -> Problem:
    """Make the task."""
    n_upright, n_rotated, n_queries = sized(options, (30000, 6000, 500), (3000, 600, 200), (500, 150, 40))
    images, labels = load_images(options.data, "mnist", "train")
    order = np.random.default_rng(0).permutation(len(images))
    upright, rotated, asked = np.split(order[: n_upright + n_rotated + n_queries], [n_upright, n_upright + n_rotated])
    first = TensorDataset(images[upright], labels[upright])
    second, queries = (TensorDataset(rotate(images[one], 28, 45), labels[one]) for one in (rotated, asked))
    stages = {
        "upright": StageSetting(first, epochs=sized(options, 15, 15, 4), batch=64, lr=0.03, checkpoints=4),
        "rotated": StageSetting(second, epochs=sized(options, 10, 10, 3), batch=64, lr=0.01, checkpoints=4),
    }
    sizes = sized(options, Sizes(100, 6, 5, 16384, (4096,)), Sizes(100, 4, 3), Sizes(12, 2, 2, 256, (128,)))
    notes = (f"{n_upright:,} upright digits (attributed), then {n_rotated:,} others rotated by 45 degrees",)
    return image_problem(
        "rotated_mnist",
        "RotatedMNIST",
        "mnist",
        stages,
        queries,
        widths=(96, 96),
        sizes=sizes,
        notes=notes,
        kronecker=True,
    )


if __name__ == "__main__":
    run(problem, parser(__doc__))
