"""Shakespeare, letter by letter: which stretches of the plays taught a small decoder to spell another?

A decoder of GPT's shape is trained on stretches of characters with AdamW; stretches of the last tenth of the plays are
asked for their mean log-likelihood.

    python examples/paper/shakespeare.py
    python examples/paper/laboratory.py --tasks shakespeare --studies b,k
"""

import argparse
from dataclasses import asdict
from functools import partial

import _above  # noqa: F401
from _data import load_shakespeare
from _problem import Problem, Sizes, parser, sized
from _text import Recipe, Training, chosen_device
from wikitext2 import Decoder, mean_loss, stretches

import source_proj as sp


def problem(options: argparse.Namespace) -> Problem:
    """The task, by the command line's options."""
    n, n_queries, tokens = sized(options, (4000, 200, 64), (600, 60, 64), (24, 6, 12))
    width, layers = sized(options, (96, 3), (48, 2), (16, 1))
    recipe = sized(options, Recipe(12, 16, 3e-3), Recipe(12, 16, 3e-3), Recipe(2, 8, 3e-3))
    plays = load_shakespeare(options.data)
    letters = sorted(set(plays))
    numbers = {letter: number for number, letter in enumerate(letters)}
    cut = len(plays) * 9 // 10
    train, places = stretches(plays[:cut], numbers, tokens, n)
    queries, asked = stretches(plays[cut:], numbers, tokens, n_queries)
    model = {"vocabulary": len(letters), "tokens": tokens, "width": width, "layers": layers, "heads": width // 16}
    make_model, task = partial(Decoder, **model), sp.CausalLM()
    training = Training(
        make_model, train, queries, task, mean_loss, recipe, chosen_device(options.device), checkpoints=6
    )

    def show(stage: str, index: int) -> tuple[str, str]:
        start = cut + asked[index] if stage == "queries" else places[index]
        return plays[start : start + tokens], f"from character {start:,} on"

    return Problem(
        name="shakespeare", title="Shakespeare, by characters", task=task, make_model=make_model,
        train_sets={"train": train}, queries=queries, record=training.record, retrain=training.retrain, group=4,
        settings={"task": "shakespeare", "n": n, "queries": n_queries, "recipe": asdict(recipe), **model},
        sizes=sized(options, Sizes(), Sizes(100, 1, 2), Sizes(4, 2, 2, 64, (32,))),
        notes=(f"{n:,} stretches of {tokens} characters of the first nine tenths; queries are of the last.",),
        layer="head", peers=True, cheap=False, panel="text", show=show,
        extra={"workers": 2, "accuracy": training.perplexity, "captured": training.captured},
    )  # fmt: skip


if __name__ == "__main__":
    from _pipeline import run

    run(problem, parser(__doc__ or ""))
