"""The head of a language model over some tokens at a time, where all logits at once would not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from source_proj.task.batch import Model, given_once, without_cache

__all__ = ["Head", "check_head", "hidden_and_head", "sum_over_chunks"]

Head = Callable[[Tensor], Tensor]
Part = Callable[..., Tensor]


def hidden_and_head(model: Model, inputs: Mapping[str, Any]) -> tuple[Tensor, Head]:
    """Last hidden state (B, T, width) of a model of transformers, and the head that makes logits of it.

    Raises:
        TypeError: the model has no head apart from its body.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # within PEFT's wrapper
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    body = getattr(model, "base_model", None)
    if head is None or not isinstance(body, nn.Module) or body is model:
        raise TypeError(
            f"CausalLM(chunk=...) needs a model of transformers, with base_model and get_output_embeddings(), got "
            f"{type(model).__name__}: leave chunk= out"
        )
    hidden: Tensor = given_once(body, inputs, lambda: body(**without_cache(body, inputs)))[0]
    return hidden, head


def check_head(model: Model, inputs: Mapping[str, Any]) -> None:
    """Compare the head's logits of one example with the model's own: some models scale or cap them afterwards.

    Raises:
        ValueError: they differ by more than rounding.
    """
    one = {key: value[:1] if isinstance(value, Tensor) and value.dim() else value for key, value in inputs.items()}
    with torch.no_grad():
        hidden, head = hidden_and_head(model, one)
        got, expected = head(hidden), model(**without_cache(model, one)).logits
    # Two products of the same matrices, perhaps cut differently: apart by rounding alone.
    tolerance = 100 * torch.finfo(got.dtype).eps * float(expected.abs().max())
    if got.shape != expected.shape or bool((got - expected).abs().max() > tolerance):
        raise ValueError(
            f"the logits of {type(model).__name__} are not its head's output alone (are they scaled or capped?): "
            "leave chunk= out"
        )


def sum_over_chunks(part: Part, chunk: int, head: Head, hidden: Tensor, *by_token: Tensor) -> Tensor:
    """Sum part(head, hidden, *by_token) → (B,) over pieces of ``chunk`` tokens, whose logits are let go in between.

    In the backward pass a piece's logits are computed once more.

    Args:
        part: sums something over the tokens of a piece.
        chunk: tokens in a piece.
        head: hidden state to logits.
        hidden: (B, T, width).
        by_token: (B, T) each.
    """
    total = hidden.new_zeros(hidden.shape[0], dtype=torch.float32)
    for start in range(0, hidden.shape[1], chunk):
        piece = [tensor[:, start : start + chunk] for tensor in (hidden, *by_token)]
        total = total + checkpoint(part, head, *piece, use_reentrant=False, preserve_rng_state=False)
    return total
