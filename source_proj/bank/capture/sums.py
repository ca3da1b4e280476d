r"""The sums of one segment: each example's gradients over the steps that saw it, and their curvature.

At step t, with learning rate η_t, a batch of B_t examples gives the loss gradients g_t(z). A segment keeps

    Σ_t η_t g_t(z)  for each example z,    Σ_t s_t η_t Σ_z a_t(z) a_t(z)ᵀ,    W = Σ_t η_t B_t,    V = Σ_t s_t η_t B_t.

The row of z is N/W times its sum: an example that was seen as often as the others has the mean of its gradients,
weighted by the learning rates, and one that was seen twice as often has twice that. The mean Hessian is the second sum
over V; of a sketch of many numbers, whose columns are taken as several sketches, that of each block of columns. Of the
empirical Fisher, whose factors a are w g with w what :meth:`Task.fisher_weight` says, every step has
some, and s is 1; of the sampled Fisher, whose a are gradients of the likelihood of labels drawn from the model, some
steps have, each of which stands for the s steps until the next one. Σ_t η_t M_t, with M_t the step's passes, tells
whether all steps had as many.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from source_proj.bank.read.curvature import curvature_size, panels_of
from source_proj.kernels.gram import HEIGHT
from source_proj.sketch.columns import Columns

__all__ = ["Memory", "SegmentSums"]

Memory = Literal["ram", "disk"]

_BLOCK = 512  # rows whose outer products are summed at once: fewer would wait for memory, k x k numbers each time


class SegmentSums:
    """Sums of sketched gradients over the steps of one segment.

    Args:
        blocks: the blocks of a row's k columns that have a Hessian of their own.
        examples: N, where it is known; else there is room for the largest index so far.
        memory: where the N x k float32 sums lie: in main memory, or in a file that is mapped into it.
        folder: of that file, which has no name and goes with the process.
        device: where curvature is summed, half of k' x k' float32 of each block.

    Raises:
        ValueError: memory is neither "ram" nor "disk".
    """

    def __init__(
        self, blocks: Sequence[Columns], examples: int | None, memory: Memory, folder: Path, device: torch.device
    ) -> None:
        if memory not in get_args(Memory):
            raise ValueError(f"memory must be one of {', '.join(get_args(Memory))}, got {memory!r}")
        self._blocks, self._dim = tuple(blocks), blocks[0].dim
        self._examples, self._device = examples, device
        self._memory, self._folder = memory, folder
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._count = self._examples or 0
        self._room = self._zeros(self._count)  # of rows, more than there are
        size = curvature_size(self._blocks)
        self._curvature = torch.zeros(size, device=self._device, dtype=torch.float32)
        self._panels = panels_of(self._curvature, self._blocks)
        self._factors = torch.empty(_BLOCK, self._dim, device=self._device, dtype=torch.float32)
        self._waiting = 0  # factors whose outer products are not summed yet
        self._weight = self._curvature_weight = self._passes = 0.0

    def add(
        self, index: Tensor, rows: Tensor, rate: float, factors: Tensor | None, share: float = 1.0, passes: int = 1
    ) -> None:
        """Add a step.

        Args:
            index: which examples, (B,) int64.
            rows: their loss gradients, (B, k) float32.
            rate: the learning rate η.
            factors: a, (n, k) float32; None for a step that has none.
            share: s.
            passes: how many forward and backward passes the step's gradient is the sum of.
        """
        self._reserve(int(index.max()) + 1)
        self._room.index_add_(0, index, rows.to("cpu") * rate)
        self._weight += rate * len(index)
        self._passes += rate * passes
        if factors is None:
            return
        self._curvature_weight += share * rate * len(factors)
        for part in (factors * (share * rate) ** 0.5).split(_BLOCK):
            if self._waiting + len(part) > _BLOCK:
                self._sum_waiting()
            self._factors[self._waiting : self._waiting + len(part)] = part
            self._waiting += len(part)

    def content(self) -> dict[str, Any]:
        """What a segment is so far: tensors that the next step changes, and numbers."""
        self._sum_waiting()
        return {
            "rows": self._room[: self._count],
            "curvature": self._curvature.to("cpu"),
            "weight": self._weight,
            "curvature_weight": self._curvature_weight,
            "passes": self._passes,
        }

    def load(self, content: dict[str, Any]) -> None:
        """Go on from a content."""
        self.clear()
        self._reserve(len(content["rows"]))
        self._room[: self._count] = content["rows"]
        self._curvature.copy_(content["curvature"])
        self._weight, self._curvature_weight = float(content["weight"]), float(content["curvature_weight"])
        self._passes = float(content["passes"])

    def merge(self, gathered: Callable[[Tensor], None], largest: Callable[[int], int]) -> None:
        """Add up the sums of several processes.

        Args:
            gathered: replaces a tensor by the sum over the processes where it is wanted, and by zeros elsewhere.
            largest: the largest of the processes' numbers.
        """
        self._sum_waiting()
        self._reserve(largest(self._count))
        weights = torch.tensor([self._weight, self._curvature_weight, self._passes], dtype=torch.float64, device="cpu")
        for tensor in (self._room[: self._count], self._curvature, weights):
            gathered(tensor)
        self._weight, self._curvature_weight, self._passes = weights.tolist()

    def _sum_waiting(self) -> None:
        factors = self._factors[: self._waiting]
        for columns, panels in zip(self._blocks, self._panels, strict=True):
            own = factors[:, columns.slice]
            for start, panel in zip(range(0, columns.width, HEIGHT), panels, strict=True):
                panel.addmm_(own[:, start : start + HEIGHT].T, own[:, start:])
        self._waiting = 0

    def _reserve(self, count: int) -> None:
        self._count = max(self._count, count)
        if count > len(self._room):
            before = self._room
            self._room = self._zeros(max(count, min(2 * len(before), count + (1 << 16))))
            self._room[: len(before)] = before

    def _zeros(self, count: int) -> Tensor:
        if self._memory == "ram" or not count:
            return torch.zeros(count, self._dim, dtype=torch.float32, device="cpu")
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self._folder) as file:  # the map keeps what has no name any more
            return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=(count, self._dim)))
