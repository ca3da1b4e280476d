"""Tasks of small decoders on a text in pieces, letters or words: what they share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Self

from _problem import Problem, Sizes, sized
from _text import Recipe, Training, chosen_device
from wikitext2 import Decoder, mean_loss, stretches

import source_proj as sp

__all__ = ["Corpus", "decoder_problem"]


@dataclass(frozen=True)
class Corpus:
    """A text in pieces.

    Attributes:
        train: the pieces that are trained on.
        others: those that are asked about.
        numbers: of the pieces that the model knows.
        piece: what one is called, "character" or "word".
        where: of which parts of the text training examples and queries are, in words.
        first: place of the first of the others in the text.
    """

    train: Sequence[str]
    others: Sequence[str]
    numbers: dict[str, int]
    piece: str
    where: str
    first: int = 0

    @classmethod
    def of_tenths(cls, pieces: Sequence[str], piece: str, known: Callable[[Sequence[str]], dict[str, int]]) -> Self:
        """A text whose first nine tenths are trained on, and whose last is asked about; `known` numbers the first."""
        cut = len(pieces) * 9 // 10
        where = "first nine tenths; queries are of the last"
        return cls(pieces[:cut], pieces[cut:], known(pieces[:cut]), piece, where, first=cut)

    def shown(self, pieces: Sequence[str]) -> str:
        """Pieces as people read them."""
        return ("" if self.piece == "character" else " ").join(pieces)


def decoder_problem(
    options: argparse.Namespace,
    name: str,
    title: str,
    corpus: Corpus,
    *,
    data: tuple[int, int, int],
    shape: tuple[int, int],
    recipe: Recipe,
    runs: int,
) -> Problem:
    """A decoder of GPT's shape on stretches of a text, asked for the mean log-likelihood of others.

    Args:
        options: the command line's.
        name: of the task.
        title: for people.
        corpus: the text.
        data: numbers of training examples, of queries, and of pieces in each.
        shape: width and number of layers; heads are 16 wide.
        recipe: how it is trained.
        runs: how many are attributed.
    """
    (n, n_queries, tokens), (width, layers) = data, shape
    train, places = stretches(corpus.train, corpus.numbers, tokens, n)
    queries, asked = stretches(corpus.others, corpus.numbers, tokens, n_queries)
    model = {
        "vocabulary": len(corpus.numbers), "tokens": tokens, "width": width, "layers": layers, "heads": width // 16
    }  # fmt: skip
    make_model, task = partial(Decoder, **model), sp.CausalLM()
    training = Training(
        make_model, train, queries, task, mean_loss, recipe, chosen_device(options.device), checkpoints=6
    )

    def show(stage: str, index: int) -> tuple[str, str]:
        of_queries = stage == "queries"
        pieces, start = (corpus.others, asked[index]) if of_queries else (corpus.train, places[index])
        place = start + (corpus.first if of_queries else 0)
        return corpus.shown(pieces[start : start + tokens]), f"from {corpus.piece} {place:,} on"

    return Problem(
        name=name, title=title, task=task, make_model=make_model,
        train_sets={"train": train}, queries=queries, record=training.record, retrain=training.retrain, group=4,
        settings={"task": name, "n": n, "queries": n_queries, "recipe": asdict(recipe), **model},
        sizes=sized(options, Sizes(), Sizes(100, runs, 2), Sizes(4, 2, 2, 64, (32,))),
        notes=(f"{n:,} stretches of {tokens} {corpus.piece}s of the {corpus.where}.",),
        layer="head", peers=True, cheap=False, panel="text", show=show,
        extra={"workers": 2, "accuracy": training.perplexity, "captured": training.captured,
               "record_more": training.record_more},
    )  # fmt: skip
