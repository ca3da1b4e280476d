"""Which examples a step was of: their places in the training set."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from source_proj._errors import MismatchError
from source_proj.gradients.training import TrainingPass

__all__ = ["places_of"]

_PLACES = 10**7  # beyond which an id is rather a key of a database
_WANTED = "ids must be places in the training set, integers"


def places_of(passes: Sequence[TrainingPass], ids: Any, examples: int | None) -> Tensor:
    """Which examples the passes of a step were of, (B,) int64.

    Args:
        passes: of the step.
        ids: what `step` was given; None where the batches said so.
        examples: number of training examples, if it is known.

    Raises:
        MismatchError: they are not as many as examples, or two passes were of the same ones.
        TypeError: there are none, or they are no integers.
        ValueError: one is out of range.
    """
    sizes = [each.size for each in passes]
    if ids is None:
        parts = [each.index for each in passes]
        if not parts or any(part is None for part in parts):
            raise TypeError(
                "which examples was the step of? Give step(ids=...), their places in the training set, in order; or "
                "train on an IndexedDataset (for the Trainer, one of mappings, and with remove_unused_columns=False)"
            )
        ids = torch.cat([torch.as_tensor(part, device="cpu").reshape(-1) for part in parts])
    try:
        index = torch.as_tensor(ids, device="cpu").reshape(-1)
    except (ValueError, TypeError, RuntimeError) as error:  # of strings, or of rows of several lengths
        got = [type(each).__name__ for each in ids][:1] if isinstance(ids, list | tuple) else [type(ids).__name__]
        raise TypeError(f"{_WANTED}, got {got[0]}: their own ids are given to bank(ids=...)") from error
    if index.is_floating_point() or index.dtype == torch.bool or index.is_complex():
        raise TypeError(f"{_WANTED}, got {index.dtype}")
    if len(index) != sum(sizes):
        raise MismatchError(
            f"{len(index)} ids were given for a step in whose gradient are {len(sizes)} forward passes of {sizes} "
            "examples. Where gradients are accumulated, give the ids of all passes in order; a model that runs twice "
            "over the same examples in one step can't be captured"
        )
    for (one, there), (other, here) in combinations(zip(passes, index.split(sizes), strict=True), 2):
        if one in other.beside and torch.equal(there, here):
            raise MismatchError(
                f"two of the step's {len(sizes)} forward passes were of the same examples before either went back: a "
                "model that runs twice over them in one step can't be captured"
            )
    if examples is None and len(index) and int(index.max()) >= _PLACES:
        raise ValueError(
            f"got the id {int(index.max())}, and ids are places in the training set, for each of which up to it there "
            "is a row of k numbers: give the places, and their ids to bank(ids=...); or examples=, if there are so many"
        )
    limit = examples if examples is not None else 1 << 62
    if len(index) and (int(index.min()) < 0 or int(index.max()) >= limit):
        raise ValueError(
            f"ids must lie from 0 to {limit - 1}, got {int(index.min())} to {int(index.max())}: they are places in the "
            "training set, whose size is examples="
        )
    return index.long()
