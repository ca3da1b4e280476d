"""Queries about single tokens: which training examples made the model expect just this one here?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from source_proj.task.language import CausalLM

__all__ = ["TokenQueries", "loss_weights"]


class TokenQueries:
    r"""Sequences taken apart into one query for each counted token.

    A query is its sequence with all labels but one ignored, so its measurement is that token's log-likelihood, given
    all before it. As scores are linear in the query, those of a sequence's tokens sum to those of the sequence under
    :class:`CausalLM` with ``reduction="sum"``, and their mean is its score with "mean".

    Args:
        sequences: map-style data set of dicts with "labels" (T,), or of (inputs, labels).
        task: the bank's; says which labels count.

    Raises:
        TypeError: the task is no language modelling, or an item has no labels.
        ValueError: no token counts.

    Attributes:
        ids: (sequence, position) as "sequence/position", the position that of the predicted token.
        positions: the same as pairs of integers.

    Example:
        >>> tokens = torch.tensor([5, 6, 7])
        >>> queries = TokenQueries([{"input_ids": tokens, "labels": tokens}], CausalLM())
        >>> queries.ids, queries[1]["labels"].tolist()
        (['0/1', '0/2'], [-100, -100, 7])
    """

    def __init__(self, sequences: Any, task: CausalLM) -> None:
        if not isinstance(task, CausalLM):
            raise TypeError(f"single tokens are queries of CausalLM alone, got {type(task).__name__}")
        self._sequences = sequences
        self._ignored = task.ignore_index
        first = 1 if task.shift else 0  # the first label is predicted by nothing
        self.positions = [
            (i, int(t) + first)
            for i in range(len(sequences))
            for t in (_labels(sequences[i])[first:] != task.ignore_index).nonzero()[:, 0]
        ]
        if not self.positions:
            raise ValueError(f"no token of the {len(sequences)} sequences counts: all labels are {task.ignore_index}")
        self.ids = [f"{i}/{t}" for i, t in self.positions]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Any:
        i, t = self.positions[index]
        item = self._sequences[i]
        labels = _labels(item)
        alone = torch.full_like(labels, self._ignored)
        alone[t] = labels[t]
        return {**item, "labels": alone} if isinstance(item, Mapping) else (item[0], alone)

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def of(self, sequence: int) -> list[int]:
        """Places of a sequence's queries, in order of its tokens."""
        return [place for place, (i, _) in enumerate(self.positions) if i == sequence]


def _labels(item: Any) -> Tensor:
    labels = item.get("labels") if isinstance(item, Mapping) else item[1] if isinstance(item, tuple | list) else None
    if labels is None:
        found = f"a dict of {sorted(map(str, item))}" if isinstance(item, Mapping) else f"a {type(item).__name__}"
        raise TypeError(f"a sequence must be a dict with 'labels' or (inputs, labels), got {found}: give it its labels")
    return labels if isinstance(labels, Tensor) else torch.as_tensor(labels, device="cpu")


def loss_weights(task: CausalLM, documents: Sequence[Any], tokens: TokenQueries) -> list[float]:
    """What each token's log-likelihood is times in minus the loss of its document."""
    weights, nothing = [], torch.zeros(1, dtype=torch.float32, device="cpu")
    for sequence, _ in tokens.positions:
        derivative, _ = task.loss_derivatives(nothing, default_collate([documents[sequence]]))
        count = 1 if task.reduction == "sum" else len(tokens.of(sequence))
        weights.append(-float(derivative) / count)
    return weights
