"""Parkinsons: how severe is the disease, by 16 measures of a voice? A regression by an MLP (SOURCE paper, section 5.1).

python examples/paper/parkinsons.py
"""

import argparse

from _pipeline import run
from _problem import Problem, parser, sized
from _tables import parkinsons, split_table
from concrete import table_problem


def problem(options: argparse.Namespace) -> Problem:
    """Make the task."""
    train_set, queries = split_table(parkinsons(options), 100, classes=False, most=sized(options, None, 2000, 200))
    notes = (
        f"{len(train_set):,} of 5,875 recordings of 42 patients, drawn without regard to the patient; the target is "
        "the total UPDRS.",
    )
    return table_problem(options, "parkinsons", "Parkinsons", train_set, queries, epochs=20, notes=notes)


if __name__ == "__main__":
    run(problem, parser(__doc__))
