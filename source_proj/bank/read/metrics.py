"""The metrics of a bank: for a preconditioner P, rows hold R P^½ g, and not R g.

A bank's trajectory lists its metrics, and says of each checkpoint of its stages which one its rows are in; without a
preconditioner there is one, the identity.

To carry a query back across a segment into the metric m of an earlier one, SOURCE needs the matrix
C = (1/N) Σ_i (R P_m^½ a_i)(R P_l^½ a_i)ᵀ at the later segment's checkpoints. The bank keeps the factors R P_m^½ ∇o
themselves, as further rows of these checkpoints: k bytes a row in int8, where partial sums of C take 4 k² bytes a
shard and curvature (at k = 4,096, four times as much), and every curvature and segmentation can be had from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from source_proj._errors import BankError
from source_proj._io.hashing import hash_float32
from source_proj.bank.layout import flat_objects, group_document, metric_array
from source_proj.bank.read.objects import read_flat
from source_proj.bank.store import Store
from source_proj.trajectory import RunRecord

__all__ = ["Metrics", "metrics_objects"]


class Metrics:
    """The metrics of a bank, read when needed.

    Args:
        store: where the bank lies.
        run: the bank's record of the run.
    """

    def __init__(self, store: Store, run: RunRecord) -> None:
        self._store = store
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
            folder = self._store.location(f"metrics/{digest}")
            values = read_flat(self._store, f"metrics/{digest}", metric_array)
            if hash_float32(torch.from_numpy(values)) != digest:
                raise BankError(f"the metric in {folder} was altered: its hash is another; build the bank anew")
            self._read[metric] = torch.from_numpy(values)
        return self._read[metric]

    def scales(self, metrics: Sequence[int]) -> list[Tensor | None]:
        """`scale` of several."""
        return [self.scale(metric) for metric in metrics]


def metrics_objects(scales: Mapping[str, Tensor]) -> Iterator[dict[str, bytes]]:
    """The square roots of the diagonals, by hash, as the objects to write."""
    for digest, scale in scales.items():
        yield flat_objects(f"metrics/{digest}", metric_array(len(scale)), scale.numpy())
    if scales:
        yield {"metrics/zarr.json": group_document({})}
