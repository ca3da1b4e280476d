"""From texts to the tokens of a model: cut at the most that it takes, filled up to one length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from source_proj.integrations.text_settings import TextSettings

__all__ = ["Encoded", "encode", "padded", "token_limit"]


class Encoded(NamedTuple):
    """An example's tokens.

    Attributes:
        columns: what the tokenizer says of it, by column; empty where it has no token.
        prompt: how many of its tokens are the prompt's.
        cut: whether it has more tokens than were taken.
    """

    columns: Mapping[str, list[int]]
    prompt: int
    cut: bool


def encode(tokenizer: Any, row: Mapping[str, Any], settings: TextSettings, limit: int, continues: bool) -> Encoded:
    """The tokens of an example, cut by itself."""
    if continues:  # an end-of-text token of the tokenizer's would stop the model at once
        columns, prompt, cut = _after_prompt(tokenizer, str(row[settings.prompt or settings.text]), "", limit)
        return Encoded({key: values[:prompt] for key, values in columns.items()}, prompt, cut)
    text = str(row[settings.text])
    if settings.prompt is not None:
        return _after_prompt(tokenizer, str(row[settings.prompt]), text, limit)
    second = () if settings.pair is None else (str(row[settings.pair]),)
    columns = _columns_of(tokenizer(text, *second, truncation=True, max_length=limit))
    full = len(columns.get("input_ids", ())) >= limit
    cut = full and len(tokenizer(text, *second, verbose=False)["input_ids"]) > limit
    return Encoded(columns, 0, cut)


def _columns_of(encoding: Mapping[str, Any]) -> dict[str, list[int]]:
    """Token columns of an encoding; nothing where it has no token."""
    return {key: list(value) for key, value in encoding.items()} if encoding["input_ids"] else {}


def _after_prompt(tokenizer: Any, prompt: str, text: str, limit: int) -> Encoded:
    """A text behind its prompt, the tokenizer's own first and last tokens around both; the text's end is cut."""
    whole = tokenizer(prompt, return_special_tokens_mask=True)
    tokens, special = list(whole["input_ids"]), list(whole["special_tokens_mask"])
    ordinary = [place for place, is_special in enumerate(special) if not is_special]
    end = ordinary[-1] + 1 if ordinary else len(tokens)  # what follows the last ordinary token closes an example
    body = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    head, tail = tokens[:end], tokens[end:]
    inner = (head + body)[: max(0, limit - len(tail))]
    joined = (inner + tail)[:limit]
    columns = {"input_ids": joined, "attention_mask": [1] * len(joined)} if joined else {}
    return Encoded(columns, min(len(head), len(inner)), len(head) + len(body) + len(tail) > limit)


def padded(encoded: list[Mapping[str, list[int]]], tokenizer: Any) -> dict[str, Tensor]:
    """Columns ``(N, longest)`` of what the model reads; padding is masked."""
    padding = {"input_ids": _padding_token(tokenizer), "attention_mask": 0, "token_type_ids": 0}
    length = max(len(columns["input_ids"]) for columns in encoded)
    whole = {
        key: [columns[key] + [value] * (length - len(columns[key])) for columns in encoded]
        for key, value in padding.items()
        if all(key in columns for columns in encoded)
    }
    return {key: torch.tensor(rows, dtype=torch.int64, device="cpu") for key, rows in whole.items()}


def _padding_token(tokenizer: Any) -> int:
    """What fills a row up: any token does, as it is masked, and its label counted nowhere.

    Raises:
        ValueError: the tokenizer names none.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError(
        f"the tokenizer {type(tokenizer).__name__} has neither a token for padding nor one that ends a text: set its "
        "pad_token, and save it in the model's folder"
    )


def token_limit(model: nn.Module, tokenizer: Any) -> int:
    """Longest sequence that the model takes; tokenizers without a limit say so by an absurd number."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return min(int(positions or 512) - _before_first(model), int(tokenizer.model_max_length))


def _before_first(model: nn.Module) -> int:
    """Rows of a table of positions that no token has: RoBERTa and its kind count from behind that of padding."""
    tables = (
        module
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
    )
    return max((table.padding_idx + 1 for table in tables if table.padding_idx is not None), default=0)
