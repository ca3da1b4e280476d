"""WikiText-2: which stretches of text taught a small language model the words of another?

A GPT-shaped decoder is trained on stretches of the validation split with AdamW; stretches of the test split are asked
for their mean token log-likelihood. With ``--full`` it is GPT-2, fine-tuned on the training split (``_gpt2.py``).
"""

import argparse
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import _above  # noqa: F401
import numpy as np
import torch
from _data import download, write_whole
from _gpt2 import GPT2, TOKENS, gpt2_training
from _problem import Problem, Sizes, parser, sized
from _text import Recipe, Rows, Training, chosen_device
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import source_proj as sp

__all__ = [
    "Decoder",
    "Setting",
    "decoder",
    "gpt2",
    "load_words",
    "mean_loss",
    "problem",
    "stretches",
    "vocabulary_of",
    "with_weights",
]

SOURCE = (
    "https://raw.githubusercontent.com/pytorch/examples/77f55b912142e11fcfdf5b530231fb9c52f181e8/"
    "word_language_model/data/wikitext-2/"
)
SHA256 = {
    "valid": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
    "test": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
}
ARTICLE = re.compile(r"= ([^=]+) =")  # sections have more signs


class Decoder(nn.Module):
    """A language model of GPT's shape: learned positions, layer norm before each part, an untied head.

    Args:
        vocabulary: number of words V.
        tokens: longest sequence T.
        width: of the residual stream.
        layers: number of blocks.
        heads: of attention; they divide the width.
    """

    def __init__(self, vocabulary: int, tokens: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(tokens, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits ``(B, T, V)`` of token ids ``(B, T)``."""
        x = self.words(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Block(nn.Module):
    """Causal attention and a perceptron, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width)
        self.query, self.key, self.value, self.joined = (nn.Linear(width, width) for _ in range(4))
        self.before_perceptron = nn.LayerNorm(width)
        self.expand, self.activation, self.contract = (
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, width)`` to the same."""
        y = self.before_attention(x)
        q, k, v = (
            part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        y = scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, T, width / heads)
        x = x + self.joined(y.transpose(1, 2).flatten(2))
        mixed: Tensor = x + self.contract(self.activation(self.expand(self.before_perceptron(x))))
        return mixed


def load_words(folder: Path, split: str) -> tuple[list[str], list[str]]:
    """Read a split ("valid" or "test"): its words, each line ended by "<eos>", and the article that each is from."""
    path = folder / "wikitext2" / f"{split}.txt"
    if not path.exists():
        url = f"{SOURCE}{split}.txt"
        content = download(url, path)
        _check(content, split, url)
        write_whole(path, content)
    content = path.read_bytes()
    _check(content, split, str(path))
    words: list[str] = []
    articles: list[str] = []
    article = ""
    for line in content.decode().splitlines():
        heading = ARTICLE.fullmatch(line.strip())
        article = heading.group(1) if heading else article
        found = [*line.split(), "<eos>"]
        words += found
        articles += [article] * len(found)
    return words, articles


class Setting(NamedTuple):
    """A model and its texts.

    Attributes:
        training: model, data and recipe.
        settings: what decides the outcomes.
        show: text of an example of ``"queries"`` or of a training stage, and what it is called.
        notes: sentences for the table's head.
    """

    training: Training
    settings: dict[str, Any]
    show: Callable[[str, int], tuple[str, str]]
    notes: tuple[str, ...]


def problem(options: argparse.Namespace) -> Problem:
    """The task, by the command line's options."""
    training, settings, show, notes = gpt2(options) if options.full else decoder(options)
    return Problem(
        name="wikitext2", title="WikiText-2", task=training.task, make_model=training.make_model,
        train_sets={"train": training.rows}, queries=training.queries, record=training.record,
        retrain=training.retrain, group=4, settings={"task": "wikitext2", **settings},
        sizes=sized(options, Sizes(100, 1, 5), Sizes(100, 2, 3), Sizes(4, 2, 2, 64, (32,))), notes=notes,
        layer="lm_head" if options.full else "head", peers=not options.full, cheap=False, panel="text", show=show,
        extra={"workers": 1 if options.full else 2, "accuracy": training.perplexity, "captured": training.captured,
               "record_more": training.record_more},
    )  # fmt: skip


def gpt2(options: argparse.Namespace) -> Setting:
    """GPT-2, fine-tuned on the training split as the paper does."""
    training, settings, text = gpt2_training(options, mean_loss)

    def show(stage: str, index: int) -> tuple[str, str]:
        return text(stage, index), f"chunk {index:,}"

    notes = (f"{len(training.rows):,} chunks of {TOKENS} tokens; GPT-2, fine-tuned, without dropout.",)
    return Setting(training, settings, show, notes)


def decoder(options: argparse.Namespace) -> Setting:
    """A small decoder, trained from scratch on the validation split."""
    n, n_queries, tokens = sized(options, None, (600, 100, 48), (24, 6, 12))
    vocabulary, width, layers = sized(options, None, (2000, 96, 2), (50, 16, 1))
    recipe = sized(options, None, Recipe(8, 16, 2e-3), Recipe(2, 8, 2e-3))
    words, articles = load_words(options.data, "valid")
    asked, asked_articles = load_words(options.data, "test")
    numbers = vocabulary_of(words, vocabulary)
    train, chosen = stretches(words, numbers, tokens, n)
    queries, chosen_queries = stretches(asked, numbers, tokens, n_queries)
    model = {"vocabulary": len(numbers), "tokens": tokens, "width": width, "layers": layers, "heads": width // 16}
    device = chosen_device(options.device)
    training = Training(partial(Decoder, **model), train, queries, sp.CausalLM(), mean_loss, recipe, device)

    def show(stage: str, index: int) -> tuple[str, str]:
        text, titles, starts = (
            (asked, asked_articles, chosen_queries) if stage == "queries" else (words, articles, chosen)
        )
        start = starts[index]
        return " ".join(text[start : start + tokens]), titles[start]

    notes = (
        f"{len(train)} stretches of {tokens} words of the validation split; the training split is not used.",
        f"Words beyond the {len(numbers)} most frequent are <unk>. The paper fine-tunes GPT-2; this decoder of "
        f"{layers} layers, {width} wide, is trained from scratch.",
    )
    return Setting(training, {"n": n, "queries": n_queries, "recipe": asdict(recipe), **model}, show, notes)


def with_weights(options: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The same options, and which GPT-2 ``--full`` takes."""
    options.add_argument("--weights", default=GPT2, help="GPT-2 of --full: a folder, or its name")
    return options


def _check(content: bytes, split: str, origin: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[split]:
        raise ValueError(
            f"{origin} is not the known wikitext2/{split}.txt: sha256 {found}, expected {SHA256[split]}; "
            "delete the file"
        )


def vocabulary_of(words: Sequence[str], size: int) -> dict[str, int]:
    """Numbers of the most frequent words, "<unk>" being 0."""
    common = [word for word, _ in Counter(words).most_common(size) if word != "<unk>"]
    return {word: number for number, word in enumerate(["<unk>", *common[: size - 1]])}


def stretches(words: Sequence[str], numbers: dict[str, int], tokens: int, count: int) -> tuple[Rows, list[int]]:
    """Cut a text of words, or of letters, into stretches and draw some, in its order; also where each begins."""
    whole = len(words) // tokens
    if count > whole:
        raise ValueError(f"the text has {whole} stretches of {tokens} tokens, but {count} are wanted")
    drawn = np.sort(np.random.default_rng(0).permutation(whole)[:count])
    ids = torch.tensor([numbers.get(word, 0) for word in words[: whole * tokens]]).reshape(whole, tokens)[drawn]
    return Rows({"input_ids": ids, "labels": ids}), [int(i) * tokens for i in drawn]


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the tokens, each predicted from those before it."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


if __name__ == "__main__":
    from _pipeline import run

    run(problem, with_weights(parser(__doc__ or "")))
