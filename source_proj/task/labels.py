"""Labels that are none of the classes."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from source_proj._errors import ExampleError

__all__ = ["refuse_foreign_labels", "refuse_foreign_tokens", "refuse_infinite"]


def refuse_foreign_labels(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits (B, C) and labels (B,) of which each is from 0 to C − 1.

    Under ``torch.func.vmap`` no value can be looked at: such an example's logits are NaN then, and its label 0, so
    that no index is out of range on a device, and whoever looks at the values asks again outside of it.

    Raises:
        ExampleError: a label is negative or too large; names examples and values.
    """
    classes = logits.shape[1]
    try:
        first, last = torch.stack(labels.aminmax()).tolist() if len(labels) else (0, 0)
    except RuntimeError:
        foreign = (labels < 0) | (labels >= classes)  # (B,)
        return logits.masked_fill(foreign[:, None], float("nan")), torch.where(foreign, 0, labels)
    if first < 0 or last >= classes:
        places = ((labels < 0) | (labels >= classes)).nonzero()[:, 0].tolist()
        raise ExampleError(
            places,
            f"the labels of {{examples}} are {labels[places[:10]].tolist()}, and the model has {classes} "
            "classes, from 0 on: leave these examples out, or mend their labels (-100 means no label elsewhere, and "
            "such an example has no gradient here)",
        )
    return logits, labels


def refuse_foreign_tokens(
    logits: Tensor, labels: Tensor, counted: Tensor, ignored: int, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Return logits (B, T, V) and labels (B, S) of which each that counts is from 0 to V − 1; under vmap as above.

    Args:
        logits: of the positions in order.
        labels: of the first S positions.
        counted: whether each counts, (B, S).
        ignored: the label that says that one does not.
        first: which column of the batch's labels the first one is.

    Raises:
        ExampleError: a label is negative or too large; names examples, positions and values.
    """
    words = logits.shape[-1]
    foreign = counted & ((labels < 0) | (labels >= words))  # (B, S)
    try:
        found = bool(foreign.any())
    except RuntimeError:
        hidden = logits.masked_fill(foreign.any(-1)[:, None, None], float("nan"))
        return hidden, torch.where(foreign, 0, labels)
    if found:
        examples, positions = (part[:10].tolist() for part in foreign.nonzero(as_tuple=True))
        raise ExampleError(
            list(dict.fromkeys(examples)),
            f"the labels {labels[foreign][:10].tolist()} of {{examples}}, at the positions "
            f"{[first + position for position in positions]}, are none of the model's {words} tokens, from 0 on: mend "
            f"them, take the tokenizer that belongs to the model, or say {ignored} where a label does not count "
            "(CausalLM(ignore_index=...))",
        )
    return logits, labels


def refuse_infinite(targets: Tensor) -> Tensor:
    """Return targets (B,) that are finite; under vmap they can't be looked at.

    Raises:
        ExampleError: one is NaN or infinite; names examples and values.
    """
    with suppress(RuntimeError):
        places = (~targets.isfinite()).nonzero()[:, 0].tolist()
        if places:
            raise ExampleError(
                places,
                f"the targets of {{examples}} are {targets[places[:10]].tolist()}, and must be finite: mend them, or "
                "leave these examples out",
            )
    return targets
