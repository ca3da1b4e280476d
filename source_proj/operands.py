"""Training operands: banked rows as loss gradients, at their place among the rows of all stages."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from source_proj.bank import Bank

__all__ = ["Operand", "loss_gradients", "mean_gradients", "stage_start"]


class Operand(NamedTuple):
    """Training rows start to stop of a term, ``(stop - start, k)``, and their weights where a method has any."""

    start: int
    stop: int
    rows: Tensor
    weights: Tensor | None = None

    def cut(self, start: int, stop: int) -> "Operand":
        """Return the part between two absolute rows."""
        part = slice(start - self.start, stop - self.start)
        return Operand(start, stop, self.rows[part], None if self.weights is None else self.weights[part])


def stage_start(bank: Bank, stage: int) -> int:
    """Return the first row of a stage among the rows of all stages."""
    return sum(one.n for one in bank.stages[:stage])


def loss_gradients(
    bank: Bank, stage: int, checkpoint: int, device: torch.device | str | None, metric: int | None = None
) -> Iterator[Operand]:
    """Loss gradients g = ℓ'φ of a stage's examples at one checkpoint, at their rows among all stages.

    They are in the checkpoint's own metric, unless another one is named.
    """
    start = stage_start(bank, stage)
    for block in bank.stages[stage].iter_rows(checkpoint, metric=metric):
        rows = block.rows.to(device or "cpu").mul_(block.d1.to(device or "cpu")[:, None])
        yield Operand(start + block.start, start + block.stop, rows)


def mean_gradients(
    bank: Bank,
    stage: int,
    checkpoints: Sequence[int],
    device: torch.device | str | None,
    metric: int | None = None,
) -> Iterator[Operand]:
    """ḡ_l: the loss gradients averaged over checkpoints of its stage; see `loss_gradients` for the metric."""
    streams = [loss_gradients(bank, stage, checkpoint, device, metric) for checkpoint in checkpoints]
    for blocks in zip(*streams, strict=True):
        mean = blocks[0].rows
        for block in blocks[1:]:
            mean += block.rows
        yield Operand(blocks[0].start, blocks[0].stop, mean.div_(len(blocks)))
