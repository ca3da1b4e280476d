"""Shakespeare, word by word: the same plays as in shakespeare.py, a decoder as in wikitext2.py.

A large vocabulary in another language than WikiText-2's, to tell what is due to words and what to the text.

    python examples/paper/shakespeare_words.py
    python examples/paper/laboratory.py --tasks shakespeare_words --studies q,r --dim 4096
"""

import argparse
import re

import _above  # noqa: F401
from _data import load_shakespeare
from _decoder import Corpus, decoder_problem
from _problem import Problem, parser, sized
from _text import Recipe
from wikitext2 import vocabulary_of

WORD = re.compile(r"[a-z']+|[.,:;!?-]|\n")


def problem(options: argparse.Namespace) -> Problem:
    """The task, by the command line's options."""
    words = WORD.findall(load_shakespeare(options.data).lower())
    size = sized(options, 6000, 2000, 50)
    return decoder_problem(
        options, "shakespeare_words", "Shakespeare, by words",
        Corpus.of_tenths(words, "word", lambda train: vocabulary_of(train, size)),
        data=sized(options, (4000, 200, 48), (600, 60, 48), (24, 6, 12)),
        shape=sized(options, (96, 3), (96, 2), (16, 1)),
        recipe=sized(options, Recipe(8, 16, 2e-3), Recipe(8, 16, 2e-3), Recipe(2, 8, 2e-3)), runs=2,
    )  # fmt: skip


if __name__ == "__main__":
    from _pipeline import run

    run(problem, parser(__doc__ or ""))
