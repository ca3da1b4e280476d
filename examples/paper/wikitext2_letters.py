"""WikiText-2, letter by letter: the same articles as in wikitext2.py, a decoder as in shakespeare.py.

A small vocabulary in another language than Shakespeare's, to tell what is due to letters and what to the text.

    python examples/paper/wikitext2_letters.py
    python examples/paper/laboratory.py --tasks wikitext2_letters --studies q,r --dim 4096
"""

import argparse

import _above  # noqa: F401
from _decoder import Corpus, decoder_problem
from _problem import Problem, parser, sized
from _text import Recipe
from wikitext2 import load_words, vocabulary_of


def problem(options: argparse.Namespace) -> Problem:
    """The task, by the command line's options."""
    articles, others = (list(" ".join(load_words(options.data, split)[0])) for split in ("valid", "test"))
    where = "validation split; queries are of the test split"
    return decoder_problem(
        options, "wikitext2_letters", "WikiText-2, by characters",
        Corpus(articles, others, vocabulary_of(articles, 80), "character", where),
        data=sized(options, (4000, 200, 64), (600, 60, 64), (24, 6, 12)),
        shape=sized(options, (96, 3), (48, 2), (16, 1)),
        recipe=sized(options, Recipe(12, 16, 3e-3), Recipe(12, 16, 3e-3), Recipe(2, 8, 3e-3)), runs=2,
    )  # fmt: skip


if __name__ == "__main__":
    from _pipeline import run

    run(problem, parser(__doc__ or ""))
