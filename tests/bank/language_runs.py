"""A tiny language model, sentences for it, checkpoints that lie apart, and banks of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import source_proj as sp

WORDS, TOKENS = 11, 6


class Language(nn.Module):
    """A table, a layer and a head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.table, self.layer, self.head = nn.Embedding(WORDS, width), nn.Linear(width, width), nn.Linear(width, WORDS)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (B, T, V) of (B, T)."""
        logits: Tensor = self.head(torch.tanh(self.layer(self.table(input_ids).cumsum(1))))
        return logits


def sentences(n: int) -> Any:
    ids = torch.randint(0, WORDS, (n, TOKENS), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row} for row in ids]


def language_run(checkpoints: int, *, apart: dict[str, float] | None = None) -> sp.Trajectory:
    """Checkpoints, each parameter of which moves away from a first one, by noise of its own size."""
    torch.manual_seed(0)
    model = Language()
    states = []
    for step in range(checkpoints):
        generator = torch.Generator().manual_seed(step)
        states.append(
            {
                name: value + (apart or {}).get(name.split(".")[0], 0.3) * torch.randn(value.shape, generator=generator)
                for name, value in model.state_dict().items()
            }
        )
    return sp.Trajectory([sp.Checkpoint(state, step + 1, lr=0.1) for step, state in enumerate(states)])


def build(path: Path, n: int = 130, checkpoints: int = 3, **options: Any) -> sp.Bank:
    given = {"sketch": sp.Sketch(64), "progress": False, "batch_size": 32, **options}
    task = given.pop("task", sp.CausalLM())
    return sp.build(Language(), task, language_run(checkpoints), sentences(n), path, **given)
