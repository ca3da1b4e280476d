"""RTE: which pairs of sentences taught a model that one follows from the other, or that it does not?

The upper part of a pretrained MiniLM (6 layers, 384 wide) is fine-tuned with AdamW on pairs of GLUE's RTE; pairs of its
development split are asked for their margin. The lower layers are frozen: their outputs are computed once and are the
inputs of what is trained. ``--full`` trains everything.

So few pairs teach little: trained on 400, the model is right about 86 % of them and 58 % of 450 others, which is what
the pretrained cosine alone reaches, where guessing the commoner label would give 51 %. What it learned of each pair is
there to be attributed all the same: the choice of the subset, not the order of batches, decides most of its margins.

Needs ``pip install source-proj[paper-text]``.
"""

import argparse
import csv
import io
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import _above  # noqa: F401
import numpy as np
import torch
from _data import download, pretrained_folder, write_whole
from _problem import Problem, Sizes, parser, sized
from _text import Recipe, Rows, Training, chosen_device
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, normalize, scaled_dot_product_attention

import source_proj as sp

__all__ = ["RTE", "Corpus", "Encoder", "Pair", "encode", "load_pairs", "pair_problem", "pretrained_folder", "problem"]

LABELS = ("entailment", "not_entailment")
WIDTH, HEADS, LAYERS = 384, 12, 6
COSINE_MEDIAN, COSINE_SLOPE = 0.68, 4.0  # the slope makes initial margins about one apart
PARTS = {  # of a layer: BERT's names, and ours
    "attention.self.query": "query", "attention.self.key": "key", "attention.self.value": "value",
    "attention.output.dense": "joined", "attention.output.LayerNorm": "after_attention",
    "intermediate.dense": "expand", "output.dense": "contract", "output.LayerNorm": "after_perceptron",
}  # fmt: skip


class Layer(nn.Module):
    """A layer of BERT: attention and a perceptron, each added to its input and then normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.joined = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.after_attention = nn.LayerNorm(WIDTH, eps=1e-12)
        self.expand, self.contract = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.after_perceptron = nn.LayerNorm(WIDTH, eps=1e-12)

    def forward(self, x: Tensor, together: Tensor) -> Tensor:
        """Hidden states ``(B, T, width)`` to the same; ``together`` ``(B, T, T)`` says which tokens see each other."""
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        y = scaled_dot_product_attention(q, k, v, attn_mask=together[:, None])  # (B, heads, T, width / heads)
        x = self.after_attention(x + self.joined(y.transpose(1, 2).flatten(2)))
        states: Tensor = self.after_perceptron(x + self.contract(gelu(self.expand(x))))
        return states


class Embeddings(nn.Module):
    """Words, positions and segments of BERT, added and normalised; all is segment 0, as the sentences are apart."""

    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(30522, WIDTH)
        self.position_embeddings = nn.Embedding(512, WIDTH)
        self.token_type_embeddings = nn.Embedding(2, WIDTH)
        self.LayerNorm = nn.LayerNorm(WIDTH, eps=1e-12)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Token ids and their places in their sentence ``(B, T)`` to hidden states ``(B, T, width)``."""
        segments = self.token_type_embeddings(torch.zeros_like(ids))
        states: Tensor = self.LayerNorm(self.word_embeddings(ids) + self.position_embeddings(positions) + segments)
        return states


class Encoder(nn.Module):
    """Two sentences, encoded apart by the pretrained model from layer ``first`` on, and a new linear classifier.

    With u and v the normalised means over the tokens of either sentence, the classifier sees |u − v| and u ∘ v, much
    as in Sentence-BERT (arXiv 1908.10084). It starts as what MiniLM was pretrained for, the cosine: the second sentence
    is taken to follow where uᵀv is above its median over training pairs. All runs start from the same weights, and
    seeds decide the order of batches alone.

    Args:
        first: first layer that it has; the inputs are the hidden states before it. 0 has the embeddings as well, and
            takes tokens.
    """

    def __init__(self, first: int) -> None:
        super().__init__()
        self.embeddings = Embeddings() if first == 0 else None
        self.layers = nn.ModuleList(Layer() for _ in range(first, LAYERS))
        self.classifier = nn.Linear(2 * WIDTH, len(LABELS))
        slope = COSINE_SLOPE * torch.tensor([1.0, -1.0])  # of either label's logit by the cosine
        with torch.no_grad():
            self.classifier.weight.copy_(torch.cat([torch.zeros(WIDTH), torch.ones(WIDTH)]) * slope[:, None])
            self.classifier.bias.copy_(-COSINE_MEDIAN * slope)
        own = {name: value for name, value in self.state_dict().items() if name.startswith("classifier.")}
        self.load_state_dict({**_pretrained_weights(first), **own})

    def forward(self, inputs: Tensor, sentence: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits ``(B, 2)``.

        Args:
            inputs: hidden states ``(B, T, width)``, or token ids ``(B, T)``; the second sentence follows the first.
            sentence: 1 and 2 at the tokens of the first and second, 0 at padding ``(B, T)``.
            positions: each token's place in its sentence ``(B, T)``, for token ids.
        """
        x = self.hidden(inputs, sentence, positions)
        counted = (sentence[:, None] == torch.tensor([[1], [2]], device=x.device)).to(x)  # (B, 2, T)
        u, v = normalize(counted @ x / counted.sum(-1, keepdim=True), dim=-1).unbind(1)
        logits: Tensor = self.classifier(torch.cat([(u - v).abs(), u * v], -1))
        return logits

    def hidden(self, inputs: Tensor, sentence: Tensor, positions: Tensor | None, count: int = LAYERS) -> Tensor:
        """Hidden states after the first ``count`` layers that it has."""
        together = sentence[:, :, None] == sentence[:, None, :]
        x = inputs if self.embeddings is None else self.embeddings(inputs, positions)
        for layer in self.layers[:count]:
            x = layer(x, together)
        return x


@dataclass(frozen=True)
class Pair:
    """Two sentences, and whether the second follows: 0 for "entailment", 1 for "not_entailment"."""

    first: str
    second: str
    label: int


@dataclass(frozen=True)
class Corpus:
    """A task of GLUE that asks of two sentences whether one follows from the other.

    Attributes:
        name: as in GLUE.
        url: of an archive of its splits.
        columns: names of the two sentences.
        known: pairs of each split, and those labelled "entailment" where that is known.
    """

    name: str
    url: str
    columns: tuple[str, str]
    known: Mapping[str, tuple[int, int | None]]


RTE = Corpus(
    "RTE",
    "https://dl.fbaipublicfiles.com/glue/data/RTE.zip",
    ("sentence1", "sentence2"),
    {"train": (2490, 1249), "dev": (277, 146)},
)


def load_pairs(folder: Path, split: str, corpus: Corpus) -> list[Pair]:
    """Read a split ("train" or "dev"); where it is missing, all are downloaded from GLUE's source."""
    path = folder / f"glue_{corpus.name.lower()}" / f"{split}.tsv"
    if not path.exists():
        archive = zipfile.ZipFile(io.BytesIO(download(corpus.url, path)))
        contents = {name: archive.read(f"{corpus.name}/{name}.tsv") for name in corpus.known}
        for name, content in contents.items():
            _parse(content, name, corpus, f"{corpus.url}:{corpus.name}/{name}.tsv")
        for name, content in contents.items():
            write_whole(path.with_name(f"{name}.tsv"), content)
    return _parse(path.read_bytes(), split, corpus, str(path))


def _parse(content: bytes, split: str, corpus: Corpus, origin: str) -> list[Pair]:
    rows = csv.DictReader(io.StringIO(content.decode(), newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    first, second = corpus.columns
    pairs = [Pair(row[first], row[second], LABELS.index(row["label"])) for row in rows]
    count, entailed = corpus.known[split]
    counts = len(pairs), sum(pair.label == 0 for pair in pairs)
    if counts != (count, counts[1] if entailed is None else entailed):
        raise ValueError(
            f"{origin} is not the known {corpus.name} {split} split: it has {counts[0]} pairs, {counts[1]} of them "
            f"entailment; expected {count} and {entailed or 'any number'}. Delete the file"
        )
    return pairs


def _pretrained_weights(first: int) -> dict[str, Tensor]:
    """The weights of :class:`Encoder` but the classifier's, by its names."""
    ours = {
        f"encoder.layer.{first + i}.{theirs}": f"layers.{i}.{ours}"
        for theirs, ours in PARTS.items()
        for i in range(LAYERS - first)
    }
    found = {}
    for name, value in load_file(pretrained_folder() / "model.safetensors").items():
        module, _, parameter = name.rpartition(".")
        if module in ours:
            found[f"{ours[module]}.{parameter}"] = value
        elif first == 0 and name.startswith("embeddings.") and parameter != "position_ids":
            found[name] = value
    return found


def encode(pairs: list[Pair], tokens: int, first: int) -> Rows:
    """Inputs of :class:`Encoder`: each pair's sentences one after the other, cut or padded to ``tokens`` tokens.

    The hidden states before layer ``first`` are computed here, once; for 0 there are token ids instead.
    """
    ids, sentence, positions = torch.zeros(3, len(pairs), tokens, dtype=torch.long)
    for row, (one, other) in enumerate(_tokenised(pairs)):
        cut = one[: max(tokens - len(other), tokens // 2)], other[: tokens // 2]  # hypotheses are short
        start = 0
        for number, found in enumerate(cut, 1):
            stop = start + len(found)
            ids[row, start:stop] = torch.tensor(found)
            sentence[row, start:stop] = number
            positions[row, start:stop] = torch.arange(len(found))
            start = stop
    rows = {"inputs": ids, "sentence": sentence, "positions": positions}
    if first:
        whole = Encoder(0)
        with torch.no_grad():
            batches = zip(*(tensor.split(64) for tensor in (ids, sentence, positions)), strict=True)
            states = torch.cat([whole.hidden(i, s, p, count=first) for i, s, p in batches])
        rows = {"inputs": states, "sentence": sentence}
    return Rows({**rows, "labels": torch.tensor([pair.label for pair in pairs])})


def problem(options: argparse.Namespace) -> Problem:
    """The task, by the command line's options."""
    return pair_problem(options, RTE, (2490, 277, 128))


def pair_problem(options: argparse.Namespace, corpus: Corpus, full: tuple[int, int, int]) -> Problem:
    """What RTE and QNLI share; ``full`` has their training pairs, queries and tokens at the paper's size."""
    n, n_queries, tokens = sized(options, full, (400, 100, 48), (24, 6, 32))
    first = sized(options, 0, 5, 5)
    recipe = sized(options, Recipe(3, 32, 5e-5), Recipe(3, 16, 2e-4), Recipe(2, 8, 2e-4))
    pairs, asked = (
        _drawn(load_pairs(options.data, split, corpus), tokens, count, whole=not options.full)
        for split, count in (("train", n), ("dev", n_queries))
    )
    train, queries = encode(pairs, tokens, first), encode(asked, tokens, first)
    task, make_model = sp.Classification(), partial(Encoder, first)
    training = Training(make_model, train, queries, task, cross_entropy, recipe, chosen_device(options.device))

    def show(stage: str, index: int) -> tuple[str, str]:
        pair = (asked if stage == "queries" else pairs)[index]
        return f"{pair.first}\n{pair.second}", LABELS[pair.label]

    notes: tuple[str, ...] = (
        f"{len(train)} training pairs, {len(queries)} queries, {tokens} tokens. The paper fine-tunes BERT on "
        f"{full[0]:,} pairs; this is MiniLM, of 6 layers, 384 wide, which encodes the sentences apart. Its "
        "classifier starts as their cosine, and runs differ in the order of batches alone.",
    )
    if first:
        notes += (
            f"Trained and attributed: the last {LAYERS - first} of its layers and the classifier; the outputs of the "
            "layers below are computed once. Only pairs that fit whole are used.",
        )
    name = corpus.name.lower()
    return Problem(
        name=name, title=corpus.name, task=task, make_model=make_model, train_sets={"train": train}, queries=queries,
        record=training.record, retrain=training.retrain, predict=training.predict, group=4,
        settings={"task": name, "n": n, "queries": n_queries, "tokens": tokens, "first": first,
                  "start": [COSINE_MEDIAN, COSINE_SLOPE], **asdict(recipe)},
        sizes=sized(options, Sizes(), Sizes(100, 2, 3), Sizes(4, 2, 2, 64, (32,))),
        notes=notes, layer="classifier", peers=not options.full, cheap=False, panel="text", show=show,
        extra={"workers": 2, "accuracy": training.accuracy, "captured": training.captured,
               "record_more": training.record_more},
    )  # fmt: skip


def _drawn(pairs: list[Pair], tokens: int, count: int, *, whole: bool) -> list[Pair]:
    """Draw some pairs, in order; with ``whole``, of those only that need not be cut to ``tokens`` tokens."""
    if whole:
        fits = [len(one) + len(other) <= tokens and len(other) <= tokens // 2 for one, other in _tokenised(pairs)]
        pairs = [pair for pair, fit in zip(pairs, fits, strict=True) if fit]
    if count > len(pairs):
        raise ValueError(f"there are {len(pairs)} pairs of up to {tokens} tokens, but {count} are wanted")
    return [pairs[i] for i in np.sort(np.random.default_rng(0).permutation(len(pairs))[:count])]


def _tokenised(pairs: list[Pair]) -> list[tuple[list[int], list[int]]]:
    """Token ids of either sentence, between BERT's own marks of its begin and end."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ModuleNotFoundError("RTE needs tokenizers: pip install 'source-proj[paper-text]'") from error
    tokenizer = Tokenizer.from_file(str(pretrained_folder() / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    both = (tokenizer.encode_batch(part) for part in ([p.first for p in pairs], [p.second for p in pairs]))
    return [(one.ids, other.ids) for one, other in zip(*both, strict=True)]


if __name__ == "__main__":
    from _pipeline import run

    run(problem, parser(__doc__ or ""))
