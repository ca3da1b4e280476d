"""Tokens, or positions, that a model's embeddings do not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from source_proj._errors import ExampleError

__all__ = ["refuse_foreign_indices"]


def refuse_foreign_indices(model: object, run: Callable[[], object]) -> None:
    """Run a model once more that has failed, to see whether an embedding was asked for what it does not have.

    Raises:
        ExampleError: one was; names the embedding, examples, positions and values.
        TypeError: it was given other numbers than integers.
    """
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    names = {module: name for name, module in modules if isinstance(module, nn.Embedding)}

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        embedding = cast(nn.Embedding, module)
        if args and isinstance(args[0], Tensor):
            _refuse(names[embedding], args[0], embedding.num_embeddings)

    handles = [module.register_forward_pre_hook(look) for module in names]
    try:
        with torch.enable_grad():  # so that no model writes into its parameters
            run()
    except (ExampleError, _NoIndices):
        raise
    except Exception:  # it says what is wrong already
        return
    finally:
        for handle in handles:
            handle.remove()


class _NoIndices(TypeError):
    pass


def _refuse(name: str, index: Tensor, rows: int) -> None:
    if index.is_floating_point():
        raise _NoIndices(f"the embedding {name!r} was given {index.dtype}: tokens are integers, give input_ids.long()")
    places = ((index < 0) | (index >= rows)).nonzero()[:10]
    if len(places) and index.dim() > 1:  # else they are of no example
        values, examples, at = (
            index[tuple(places.T)].tolist(),
            dict.fromkeys(places[:, 0].tolist()),
            places[:, 1].tolist(),
        )
        raise ExampleError(
            list(examples),
            f"the embedding {name!r} has {rows} rows, from 0 on, and {{examples}} ask for {values}, at the positions "
            f"{at}: of tokens, take the tokenizer that belongs to the model, or "
            "model.resize_token_embeddings(len(tokenizer)); of positions, cut sequences to the longest that the model "
            "takes",
        )
