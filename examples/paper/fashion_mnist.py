"""Fashion-MNIST: an MLP trained to convergence (SOURCE paper, section 5.1).

    python examples/paper/fashion_mnist.py

6,000 images, 784-256-128-10, SGD with momentum 0.9, learning rate 0.03, weight decay 1e-3, batch 64, 20 epochs.
"""

import argparse

from _images import draw, image_problem
from _pipeline import run
from _problem import Problem, Sizes, parser, sized
from _stacked import StageSetting
from torch.utils.data import TensorDataset


def problem(options: argparse.Namespace, small: bool = False) -> Problem:
    """Make the task; ``small`` has 2,000 images, for what needs thousands of retrainings on nearly all of them."""
    train_set, queries = draw(options, "fashion_mnist", *sized(options, (60000, 500), (6000, 200), (600, 40)))
    if small:
        train_set = TensorDataset(*(one[:2000] for one in train_set.tensors))
    stage = StageSetting(train_set, epochs=sized(options, 20, 20, 4), batch=64, lr=0.03, checkpoints=6)
    sizes = sized(
        options,
        Sizes(100, 6, 5, 16384, (4096, 1024)),
        # Four banks: two runs with two sketch seeds each are what the other published numbers of this task have.
        Sizes(100, 2, 3) if small else Sizes(100, 6, 2, sketches=2),
        Sizes(12, 2, 2, 256, (128,)),
    )
    return image_problem(
        "fashion_mnist",
        "Fashion-MNIST",
        "fashion_mnist",
        {"train": stage},
        queries,
        widths=(256, 128),
        sizes=sizes,
        kronecker=True,
    )


if __name__ == "__main__":
    run(problem, parser(__doc__))
