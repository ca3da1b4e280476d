"""WikiText-2, letter by letter: the same articles as in wikitext2.py, a decoder as in shakespeare.py.

A small vocabulary in another language than Shakespeare's, to tell what is due to letters and what to the text.

    python examples/paper/wikitext2_letters.py
    python examples/paper/laboratory.py --tasks wikitext2_letters --studies q,r --dim 4096
"""

import argparse
from dataclasses import asdict
from functools import partial

import _above  # noqa: F401
from _problem import Problem, Sizes, parser, sized
from _text import Recipe, Training, chosen_device
from wikitext2 import Decoder, load_words, mean_loss, stretches, vocabulary_of

import source_proj as sp


def problem(options: argparse.Namespace) -> Problem:
    """The task, by the command line's options."""
    n, n_queries, tokens = sized(options, (4000, 200, 64), (600, 60, 64), (24, 6, 12))
    vocabulary, width, layers = sized(options, (80, 96, 3), (80, 48, 2), (80, 16, 1))
    recipe = sized(options, Recipe(12, 16, 3e-3), Recipe(12, 16, 3e-3), Recipe(2, 8, 3e-3))
    articles, others = (list(" ".join(load_words(options.data, split)[0])) for split in ("valid", "test"))
    numbers = vocabulary_of(articles, vocabulary)
    train, places = stretches(articles, numbers, tokens, n)
    queries, asked = stretches(others, numbers, tokens, n_queries)
    model = {"vocabulary": len(numbers), "tokens": tokens, "width": width, "layers": layers, "heads": width // 16}
    make_model, task = partial(Decoder, **model), sp.CausalLM()
    training = Training(
        make_model, train, queries, task, mean_loss, recipe, chosen_device(options.device), checkpoints=6
    )

    def show(stage: str, index: int) -> tuple[str, str]:
        text, start = (others, asked[index]) if stage == "queries" else (articles, places[index])
        return "".join(text[start : start + tokens]), f"from character {start:,} on"

    return Problem(
        name="wikitext2_letters", title="WikiText-2, by characters", task=task, make_model=make_model,
        train_sets={"train": train}, queries=queries, record=training.record, retrain=training.retrain, group=4,
        settings={"task": "wikitext2_letters", "n": n, "queries": n_queries, "recipe": asdict(recipe), **model},
        sizes=sized(options, Sizes(), Sizes(100, 2, 2), Sizes(4, 2, 2, 64, (32,))),
        notes=(f"{n:,} stretches of {tokens} characters of the validation split; queries are of the test split.",),
        layer="head", peers=True, cheap=False, panel="text", show=show,
        extra={"workers": 2, "accuracy": training.perplexity, "captured": training.captured},
    )  # fmt: skip


if __name__ == "__main__":
    from _pipeline import run

    run(problem, parser(__doc__ or ""))
