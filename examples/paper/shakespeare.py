"""Shakespeare, letter by letter: which stretches of the plays taught a small decoder to spell another?

A decoder of GPT's shape is trained on stretches of characters with AdamW; stretches of the last tenth of the plays are
asked for their mean log-likelihood.

    python examples/paper/shakespeare.py
    python examples/paper/laboratory.py --tasks shakespeare --studies b,k
"""

import argparse

import _above  # noqa: F401
from _data import load_shakespeare
from _decoder import Corpus, decoder_problem
from _problem import Problem, parser, sized
from _text import Recipe


def problem(options: argparse.Namespace) -> Problem:
    """The task, by the command line's options."""
    plays = load_shakespeare(options.data)
    numbers = {letter: number for number, letter in enumerate(sorted(set(plays)))}  # those of the queries, too
    return decoder_problem(
        options, "shakespeare", "Shakespeare, by characters",
        Corpus.of_tenths(plays, "character", lambda _: numbers),
        data=sized(options, (4000, 200, 64), (600, 60, 64), (24, 6, 12)),
        shape=sized(options, (96, 3), (48, 2), (16, 1)),
        recipe=sized(options, Recipe(12, 16, 3e-3), Recipe(12, 16, 3e-3), Recipe(2, 8, 3e-3)), runs=1,
    )  # fmt: skip


if __name__ == "__main__":
    from _pipeline import run

    run(problem, parser(__doc__ or ""))
