"""The metrics of a bank: for a preconditioner P, rows hold R P^½ g, and not R g.

A bank's trajectory lists its metrics, and says of each checkpoint of its stages which one its rows are in; without a
preconditioner there is one, the identity.

To carry a query back across a segment into the metric m of an earlier one, SOURCE needs the matrix
C = (1/N) Σ_i (R P_m^½ a_i)(R P_l^½ a_i)ᵀ at the later segment's checkpoints. The bank keeps the factors R P_m^½ ∇o
themselves, as further rows of these checkpoints: k bytes a row in int8, where partial sums of C take 4 k² bytes a
shard and curvature (at k = 4,096, four times as much), and every curvature and segmentation can be had from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import zarr
from torch import Tensor

from source_proj._errors import BankError
from source_proj._io.hashing import hash_float32
from source_proj.bank.layout import metric_array
from source_proj.bank.read.part import open_node, read_array
from source_proj.trajectory import RunRecord

__all__ = ["Metrics", "write_metrics"]


class Metrics:
    """The metrics of a bank, read when needed.

    Args:
        bank: the bank's folder.
        run: the bank's record of the run.
    """

    def __init__(self, bank: Path, run: RunRecord) -> None:
        self._bank = bank
        self._hashes = run.metrics
        self._read: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._hashes)

    def hash(self, metric: int) -> str | None:
        """Hash of a metric's diagonal; None for the identity."""
        return self._hashes[metric]

    def scale(self, metric: int) -> Tensor | None:
        """The diagonal of P^½ ``(d,)`` float32 in the coordinates of the bank's parameters; None for the identity.

        Raises:
            BankError: it is missing or damaged.
        """
        digest = self.hash(metric)
        if digest is None:
            return None
        if metric not in self._read:
            folder = self._bank / "metrics" / digest
            array = open_node(self._bank, f"metrics/{digest}")
            if not isinstance(array, zarr.Array):
                raise BankError(f"{folder} is a zarr group and must be an array")
            values = read_array(array, slice(None), folder)
            if values.dtype != np.float32 or hash_float32(torch.from_numpy(values)) != digest:
                raise BankError(f"the metric in {folder} was altered: its hash is another; build the bank anew")
            self._read[metric] = torch.from_numpy(values)
        return self._read[metric]

    def scales(self, metrics: Sequence[int]) -> list[Tensor | None]:
        """`scale` of several."""
        return [self.scale(metric) for metric in metrics]


def write_metrics(folder: Path, scales: Mapping[str, Tensor]) -> None:
    """Write the square roots of the diagonals, by hash."""
    group = zarr.create_group(folder)
    for digest, scale in scales.items():
        metric_array(len(scale)).create(group, digest)[:] = scale.numpy()
