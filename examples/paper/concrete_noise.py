"""Concrete-N: 30 % of the targets are exchanged, and training stops early (SOURCE paper, section 5.1).

python examples/paper/concrete_noise.py
"""

import argparse

from _pipeline import run
from _problem import Problem, parser
from concrete import data, replace_targets, table_problem


def problem(options: argparse.Namespace) -> Problem:
    """Make the task."""
    clean, queries = data(options)
    train_set, noisy = replace_targets(clean, 0.3)
    return table_problem(
        options, "concrete_noise", "Concrete-N", train_set, queries, epochs=5, noisy=noisy,
        notes=("30 % of the training targets are exchanged among each other; five epochs, not converged",),
    )  # fmt: skip


if __name__ == "__main__":
    run(problem, parser(__doc__))
