"""Labels that are none of the classes."""

from __future__ import annotations

import torch
from torch import Tensor

from source_proj._errors import ExampleError

__all__ = ["refuse_foreign_labels"]


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
