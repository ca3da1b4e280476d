"""The metrics of a bank: for a preconditioner P, rows hold R P^½ g, and not R g.

A bank's trajectory says which metric each checkpoint's rows are in, by the entry ``metric_of`` of its stages; without
it they are in metric 0. Metrics themselves are listed in its entry ``metrics``; without it there is one, the identity.

To carry a query back across a segment into the metric m of an earlier one, SOURCE needs the matrix
C = (1/N) Σ_i (R P_m^½ a_i)(R P_l^½ a_i)ᵀ at the later segment's checkpoints. The bank keeps the factors R P_m^½ ∇o
themselves, as further rows of these checkpoints: k bytes a row in int8, where partial sums of C take 4 k² bytes a
shard and curvature (at k = 4,096, four times as much), and every curvature and segmentation can be had from them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import zarr
from torch import Tensor, nn

from source_proj._errors import BankError, MismatchError
from source_proj.bank.layout import metric_array
from source_proj.bank.read.part import open_node, read_array
from source_proj.gradients import ParameterSpace
from source_proj.trajectory import (
    Moments,
    PreconditionedOptimizer,
    Stage,
    Trajectory,
    moments,
    optimizer_from_spec,
)

__all__ = ["Metrics", "Planned", "plan_metrics", "write_metrics"]

_DIGITS = 12  # of numbers in the settings: sums may round differently elsewhere, and settings are compared


class Planned(NamedTuple):
    """A trajectory's description with its metrics, and the square roots of their diagonals by hash."""

    spec: dict[str, Any]
    scales: dict[str, Tensor]


class Metrics:
    """The metrics of a bank, read when needed.

    Args:
        bank: the bank's folder.
        trajectory: the settings' trajectory.
    """

    def __init__(self, bank: Path, trajectory: Mapping[str, Any]) -> None:
        self._bank = bank
        self._entries: Sequence[Mapping[str, Any]] = trajectory.get("metrics", [{"kind": "identity"}])
        self._read: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def hash(self, metric: int) -> str | None:
        """Hash of a metric's diagonal; None for the identity."""
        found: str | None = self._entries[metric].get("hash")
        return found

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
            if values.dtype != np.float32 or _hash(torch.from_numpy(values)) != digest:
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


def plan_metrics(trajectory: Trajectory, model: nn.Module, space: ParameterSpace) -> Planned:
    """Read the optimizer states of a trajectory, and say in its description which metric each checkpoint is in.

    For a segment's (or stage's) checkpoints, P is the mean of their preconditioners (Adam's bias-corrected at each
    one's own step); a checkpoint of step 0, which has no second moment, does not count.

    Args:
        trajectory: the run.
        model: gives the order of parameters, which an optimizer's state follows.
        space: the attributed parameters.

    Raises:
        MismatchError: a state is missing or does not fit.
    """
    spec = trajectory.spec()
    entries: list[dict[str, Any]] = []
    scales: dict[str, Tensor] = {}
    for stage, described in zip(trajectory.stages, spec["stages"], strict=True):
        optimizer = optimizer_from_spec(described["optimizer"])  # the decay divided by the loss scale
        groups = [list(range(len(stage.checkpoints)))]
        if isinstance(optimizer, PreconditionedOptimizer):
            if stage.metric == "scalar":
                described |= _scalars(stage, optimizer, model, space)
            elif stage.metric == "none":
                described |= _plain_decays(stage, optimizer, space)
            else:
                groups = stage.segment_indices if stage.metric == "per_segment" else groups
                described["metric_of"] = []
                described["decays"] = []
                for group in groups:
                    scale, decay = _metric([stage.checkpoints[c] for c in group], optimizer, model, space)
                    digest = _hash(scale)
                    scales[digest] = scale
                    described["metric_of"] += [_place(entries, {"kind": "diagonal", "hash": digest})] * len(group)
                    described["decays"] += [decay] * len(group)
                continue
        described["metric_of"] = [_place(entries, {"kind": "identity"})] * len(groups[0])
    if len(entries) > 1 or scales:
        spec["metrics"] = entries
    else:
        for described in spec["stages"]:
            del described["metric_of"]
    return Planned(spec, scales)


def _place(entries: list[dict[str, Any]], entry: dict[str, Any]) -> int:
    if entry not in entries:
        entries.append(entry)
    return entries.index(entry)


def _with_state(checkpoints: Sequence[Any], what: str) -> list[Any]:
    found = [c for c in checkpoints if c.step > 0 or c.optimizer_state is not None]
    if not found:
        raise MismatchError(
            f"{what} consists of the initial weights alone, where no optimizer has a second moment yet: join it with "
            "later checkpoints, or take metric='none'"
        )
    return found


def _metric(
    checkpoints: Sequence[Any], optimizer: PreconditionedOptimizer, model: nn.Module, space: ParameterSpace
) -> tuple[Tensor, float]:
    """The square root of the mean P, and the one number λ̄ that stands for weight decay."""
    p, v, decay = (torch.zeros(space.size, dtype=torch.float64) for _ in range(3))
    found = _with_state(checkpoints, f"the segment of {checkpoints}")
    for checkpoint in found:
        for place, one in _moments(checkpoint, optimizer, model, space):
            p[place] += one.preconditioner.flatten() / len(found)
            v[place] += one.second.flatten() / len(found)
            decay[place] += one.decay.flatten() / len(found)
    if not p.any():
        raise MismatchError(f"the optimizer states of {checkpoints} move none of the attributed parameters")
    return p.sqrt().float(), _mean(decay, p * v)


def _scalars(
    stage: Stage, optimizer: PreconditionedOptimizer, model: nn.Module, space: ParameterSpace
) -> dict[str, Any]:
    """One number p = Σ P v̂ / Σ v̂ a checkpoint: p H has the trace of P^½ H P^½ where v̂ is H's diagonal."""
    numbers: dict[int, tuple[float, float]] = {}
    for checkpoint in _with_state(stage.checkpoints, f"stage {stage.name!r}"):
        p, v, decay = (torch.zeros(space.size, dtype=torch.float64) for _ in range(3))
        for place, one in _moments(checkpoint, optimizer, model, space):
            p[place], v[place], decay[place] = (part.flatten() for part in one)
        if not p.any():
            raise MismatchError(f"the optimizer state of {checkpoint} moves none of the attributed parameters")
        numbers[checkpoint.step] = (_mean(p, v), _mean(decay, v))
    first = next(iter(numbers.values()))  # also for the initial weights, if they are a checkpoint
    filled = [numbers.get(checkpoint.step, first) for checkpoint in stage.checkpoints]
    return {"scalars": [one[0] for one in filled], "decays": [one[1] for one in filled]}


def _plain_decays(stage: Stage, optimizer: PreconditionedOptimizer, space: ParameterSpace) -> dict[str, Any]:
    """Weight decay without second moments: the mean over coordinates."""
    sizes = torch.tensor([float(np.prod(shape)) for shape in space.shapes], dtype=torch.float64)
    groups = [optimizer.group(name) for name in space.names]
    decays = torch.tensor([one.lr_scale * float(one.weight_decay or 0.0) for one in groups], dtype=torch.float64)
    return {"decays": [_mean(decays, sizes)] * len(stage.checkpoints)}


def _moments(
    checkpoint: Any, optimizer: PreconditionedOptimizer, model: nn.Module, space: ParameterSpace
) -> Iterator[tuple[slice, Moments]]:
    """The moments of the attributed parameters, and where their coordinates are."""
    for name, one in moments(checkpoint, optimizer, model):
        if name in space.offsets:
            begin = space.offsets[name]
            yield slice(begin, begin + one.second.numel()), one


def _mean(values: Tensor, weights: Tensor) -> float:
    """Σ w x / Σ w, rounded; exact where all values with a weight are equal."""
    there = values[weights > 0]
    if there.numel() == 0:
        return 0.0
    if bool((there == there[0]).all()):
        return float(there[0])
    return float(f"{float((values * weights).sum() / weights.sum()):.{_DIGITS}g}")


def _hash(scale: Tensor) -> str:
    return hashlib.sha256(scale.contiguous().numpy().astype("<f4", copy=False).data).hexdigest()
