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
from typing import Literal

import torch

from source_proj._errors import BankError, MismatchError
from source_proj.bank.format import Settings
from source_proj.bank.layout import flat_objects, group_document, metric_array
from source_proj.bank.read.objects import read_flat
from source_proj.bank.store import Store
from source_proj.gradients import ParameterSpace
from source_proj.trajectory import Scale

__all__ = ["Decay", "Metrics", "metrics_objects"]

Decay = Literal["all", "own", "none"]
"""What weight decay acts on in another metric: all of it, what the segment's own metric has of it, or nothing."""


class Metrics:
    """The metrics of a bank, read when needed.

    Args:
        store: where the bank lies.
        settings: the bank's.
    """

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._run = settings.trajectory
        self._space = ParameterSpace.from_spec(settings.parameters)
        self._read: dict[int, Scale] = {}

    def __len__(self) -> int:
        return len(self._run.metrics)

    def hash(self, metric: int) -> str | None:
        """Hash of a metric's scale; None for the identity."""
        return self._run.metrics[metric]

    def scale(self, metric: int) -> Scale | None:
        """P^½ of the bank's parameters; None for the identity.

        Raises:
            BankError: it is missing or damaged.
        """
        digest = self.hash(metric)
        if digest is None:
            return None
        if metric not in self._read:
            self._read[metric] = self._checked(digest, self._run.is_factored(metric))
        return self._read[metric]

    def _checked(self, digest: str, factored: bool) -> Scale:
        folder = self._store.location(f"metrics/{digest}")
        values = torch.from_numpy(read_flat(self._store, f"metrics/{digest}", metric_array))
        try:
            scale = Scale(values, self._space, factored=factored)
        except MismatchError as error:
            raise BankError(f"the metric in {folder} is not of the bank's parameters: {error}; build it anew") from None
        if scale.hash != digest:
            raise BankError(f"the metric in {folder} was altered: its hash is another; build the bank anew")
        return scale

    def scales(self, metrics: Sequence[int]) -> list[Scale | None]:
        """`scale` of several."""
        return [self.scale(metric) for metric in metrics]

    def by_hash(self) -> dict[str, Scale]:
        """Those that are no identity; raises as :meth:`scale`."""
        found = {self.hash(metric): self.scale(metric) for metric in range(len(self))}
        return {digest: scale for digest, scale in found.items() if digest is not None and scale is not None}

    def moves(self, metric: int) -> bool:
        """Whether anything is other than 0 in a metric, as where a stage left all of the bank's parameters alone."""
        return bool(self._moved(metric))

    def decay_of(self, own: int, other: int) -> Decay:
        """On which part of a sketch in another metric the weight decay of a segment acts, given the segment's own one.

        Parameters that the segment did not move do not decay. Where that cannot be told apart, as by two P's of
        second moments, all decays.
        """
        moved, there = self._moved(own), self._moved(other)
        if not moved & there:
            return "none"
        if there <= moved or not moved <= there:
            return "all"
        plain = all(scale is None or scale.is_selection for scale in self.scales([own, other]))
        return "own" if plain else "all"

    def _moved(self, metric: int) -> set[str]:
        """Parameters that a metric does not leave out."""
        scale = self.scale(metric)
        return {name for name in self._space.names if scale is None or scale.moves(name)}


def metrics_objects(scales: Mapping[str, Scale]) -> Iterator[dict[str, bytes]]:
    """The scales, by hash, as the objects to write."""
    for digest, scale in scales.items():
        yield flat_objects(f"metrics/{digest}", metric_array(len(scale.values)), scale.values.numpy())
    if scales:
        yield {"metrics/zarr.json": group_document({})}
