"""Shakespeare, word by word: the same plays as in shakespeare.py, a decoder as in wikitext2.py.

A large vocabulary in another language than WikiText-2's, to tell what is due to words and what to the text.

    python examples/paper/shakespeare_words.py
    python examples/paper/laboratory.py --tasks shakespeare_words --studies q,r --dim 4096
"""

import argparse
import re
from dataclasses import asdict
from functools import partial

import _above  # noqa: F401
from _data import load_shakespeare
from _problem import Problem, Sizes, parser, sized
from _text import Recipe, Training, chosen_device
from wikitext2 import Decoder, mean_loss, stretches, vocabulary_of

import source_proj as sp

WORD = re.compile(r"[a-z']+|[.,:;!?-]|\n")


def problem(options: argparse.Namespace) -> Problem:
    """The task, by the command line's options."""
    n, n_queries, tokens = sized(options, (4000, 200, 48), (600, 60, 48), (24, 6, 12))
    vocabulary, width, layers = sized(options, (6000, 96, 3), (2000, 96, 2), (50, 16, 1))
    recipe = sized(options, Recipe(8, 16, 2e-3), Recipe(8, 16, 2e-3), Recipe(2, 8, 2e-3))
    words = WORD.findall(load_shakespeare(options.data).lower())
    cut = len(words) * 9 // 10
    numbers = vocabulary_of(words[:cut], vocabulary)
    train, places = stretches(words[:cut], numbers, tokens, n)
    queries, asked = stretches(words[cut:], numbers, tokens, n_queries)
    model = {"vocabulary": len(numbers), "tokens": tokens, "width": width, "layers": layers, "heads": width // 16}
    make_model, task = partial(Decoder, **model), sp.CausalLM()
    training = Training(
        make_model, train, queries, task, mean_loss, recipe, chosen_device(options.device), checkpoints=6
    )

    def show(stage: str, index: int) -> tuple[str, str]:
        start = cut + asked[index] if stage == "queries" else places[index]
        return " ".join(words[start : start + tokens]), f"from word {start:,} on"

    return Problem(
        name="shakespeare_words", title="Shakespeare, by words", task=task, make_model=make_model,
        train_sets={"train": train}, queries=queries, record=training.record, retrain=training.retrain, group=4,
        settings={"task": "shakespeare_words", "n": n, "queries": n_queries, "recipe": asdict(recipe), **model},
        sizes=sized(options, Sizes(), Sizes(100, 2, 2), Sizes(4, 2, 2, 64, (32,))),
        notes=(f"{n:,} stretches of {tokens} words of the first nine tenths; queries are of the last.",),
        layer="head", peers=True, cheap=False, panel="text", show=show,
        extra={"workers": 2, "accuracy": training.perplexity, "captured": training.captured},
    )  # fmt: skip


if __name__ == "__main__":
    from _pipeline import run

    run(problem, parser(__doc__ or ""))
