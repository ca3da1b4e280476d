"""Pima: logistic regression, trained with SGD and at its optimum (SOURCE paper, appendix E.3).

python examples/paper/pima_logistic.py
python examples/paper/pima_logistic.py --optimal
"""

import argparse

from _convex import convex_problem
from _pipeline import run
from _problem import Problem, parser, sized
from _stacked import margin
from _tables import pima, split_table
from torch import nn

import source_proj as sp


def problem(options: argparse.Namespace, optimal: bool | None = None) -> Problem:
    """Make the task."""
    data = split_table(pima(options), 100, classes=True, most=sized(options, None, None, 200))
    return convex_problem(
        options, "pima_logistic", "Pima, logistic", data, lambda: nn.Linear(8, 2), sp.Classification(), margin,
        nn.functional.cross_entropy, optimal=getattr(options, "optimal", False) if optimal is None else optimal,
    )  # fmt: skip


def optimum(options: argparse.Namespace) -> Problem:
    """The same at its optimal solution."""
    return problem(options, optimal=True)


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--optimal", action="store_true", help="the exact optimum in place of SGD")
    run(problem, options)
