"""QNLI: which pairs of a question and a sentence taught a model that the one answers the other, or that it does not?

    python examples/paper/qnli.py

As RTE (``rte.py``, whose model and recipe it has), on pairs of GLUE's QNLI. Needs
``pip install source-proj[paper-text]``.
"""

import argparse

from _problem import Problem, parser
from rte import Corpus, pair_problem

QNLI = Corpus(
    "QNLI",
    "https://dl.fbaipublicfiles.com/glue/data/QNLIv2.zip",
    ("question", "sentence"),
    {"train": (104743, None), "dev": (5463, None)},
)


def problem(options: argparse.Namespace) -> Problem:
    """The task, by the command line's options."""
    return pair_problem(options, QNLI, (10474, 500, 128))  # a tenth


if __name__ == "__main__":
    from _pipeline import run

    run(problem, parser(__doc__ or ""))
