"""WikiText-2 at the paper's size: GPT-2 fine-tuned on 4,656 chunks of the training split, asked about 481 others.

Weights and tokenizer are what ``transformers`` finds under ``--weights``, a name of the hub or a folder; texts come
through ``datasets``. Needs ``pip install "source-proj[hf]" datasets``, and a GPU.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any

import torch
from _text import Recipe, Rows, Training, chosen_device
from torch import Tensor, nn

import source_proj as sp

__all__ = ["GPT2", "TOKENS", "chunks", "gpt2_training"]

GPT2 = "openai-community/gpt2"
TOKENS = 512
_LINES = 1000  # whose tokens are joined before they are cut, as in the language-modelling example of transformers
_RECIPE = Recipe(3, 8, 5e-5, 0.01, warmup=0.0)


def gpt2_training(
    options: argparse.Namespace, loss: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Training, dict[str, Any], Callable[[str, int], str]]:
    """Model, data and recipe; what decides the outcomes; and the text of an example of ``"queries"`` or of training.

    Args:
        options: of the command line; ``weights``, where it is among them, says which model.
        loss: mean loss of logits ``(B, T, V)`` and labels ``(B, T)``.
    """
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = str(getattr(options, "weights", GPT2))
    tokenizer = AutoTokenizer.from_pretrained(weights)
    texts = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1")
    sets = {
        split: chunks(texts[split]["text"], lambda text: tokenizer(text)["input_ids"], TOKENS)
        for split in ("train", "validation")
    }

    def make_model() -> nn.Module:
        # Without dropout a run follows from its start and its batches.
        quiet = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        model: nn.Module = AutoModelForCausalLM.from_pretrained(weights, **quiet)
        return model

    def mean_loss(output: Any, labels: Tensor) -> Tensor:
        return loss(output.logits, labels)

    def text(stage: str, index: int) -> str:
        rows = sets["validation" if stage == "queries" else "train"]
        return str(tokenizer.decode(rows[index]["input_ids"]))

    training = Training(
        make_model, sets["train"], sets["validation"], sp.CausalLM(), mean_loss, _RECIPE, chosen_device(options.device)
    )
    settings = {"weights": weights, "recipe": asdict(_RECIPE), "tokens": TOKENS}
    return training, settings, text


def chunks(texts: Iterable[str], encode: Callable[[str], Sequence[int]], tokens: int) -> Rows:
    """Texts as rows of so many tokens: those of every thousand texts are joined and cut, and what is left is dropped.

    Example:
        >>> chunks(["abcde", "fgh"], lambda text: [ord(letter) - ord("a") for letter in text], 3).tensors["labels"]
        tensor([[0, 1, 2],
                [3, 4, 5]])
    """
    cut = []
    lines = list(texts)
    for start in range(0, len(lines), _LINES):
        several = map(encode, lines[start : start + _LINES])
        ids = torch.tensor(list(chain.from_iterable(several)), dtype=torch.int64)
        cut.append(ids[: len(ids) // tokens * tokens].reshape(-1, tokens))
    ids = torch.cat(cut)
    return Rows({"input_ids": ids, "labels": ids})
