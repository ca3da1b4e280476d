"""Concrete: linear regression, trained with SGD and at its optimum (SOURCE paper, appendix E.3).

python examples/paper/concrete_linear.py
python examples/paper/concrete_linear.py --optimal
"""

import argparse

from _convex import convex_problem
from _pipeline import run
from _problem import Problem, parser, sized
from _stacked import absolute_error, mse
from _tables import concrete, split_table
from torch import nn

import source_proj as sp


def problem(options: argparse.Namespace, optimal: bool | None = None) -> Problem:
    """Make the task."""
    data = split_table(concrete(options), 100, classes=False, most=sized(options, None, None, 200))
    return convex_problem(
        options, "concrete_linear", "Concrete, linear", data, lambda: nn.Linear(8, 1), sp.Regression(), absolute_error,
        mse, optimal=getattr(options, "optimal", False) if optimal is None else optimal,
    )  # fmt: skip


def optimum(options: argparse.Namespace) -> Problem:
    """The same at its optimal solution."""
    return problem(options, optimal=True)


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--optimal", action="store_true", help="the exact optimum in place of SGD")
    run(problem, options)
