"""A tiny training run, banks of it, and their content as plain zarr gives it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import nn
from torch.utils.data import TensorDataset

from source_proj import bank as banks
from source_proj.sketch import Sketch
from source_proj.task import Classification, Task
from source_proj.trajectory import Adam, Checkpoint, Trajectory

N, BATCH, SHARD = 90, 8, 24  # four shards, the last one and its last batch short
SKETCH = Sketch(dim=32, seed=5)


@dataclass
class Run:
    model: nn.Module
    task: Task
    trajectory: Trajectory
    data: Any

    def build(self, path: Path, **changes: Any) -> banks.Bank:
        named = {name: changes.pop(name, getattr(self, name)) for name in ("model", "task", "trajectory", "data")}
        options = {"sketch": SKETCH, "batch_size": BATCH, "shard_rows": SHARD, "progress": False, **changes}
        return banks.build(named["model"], named["task"], named["trajectory"], named["data"], path, **options)


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))


def make_states(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    states = []
    for index in range(count):
        torch.manual_seed(100 * seed + index)
        states.append(make_model().state_dict())
    return states


def make_data(n: int = N, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(n, 6, generator=generator), torch.randint(0, 3, (n,), generator=generator)
    )  # fmt: skip


def make_run(checkpoints: int = 2, n: int = N) -> Run:
    states = make_states(checkpoints)
    trajectory = Trajectory([Checkpoint(state, 10 * (i + 1), lr=0.1) for i, state in enumerate(states)])
    return Run(make_model(), Classification(), trajectory, make_data(n))


def make_adam_run(mode: str = "per_segment", seed: int = 0) -> Run:
    """Four checkpoints in two segments, with second moments of random size."""
    checkpoints = []
    for i, state in enumerate(make_states(4)):
        generator = torch.Generator().manual_seed(10 * seed + i)
        entries = {
            n: {"step": torch.tensor(10.0 * (i + 1)), "exp_avg_sq": torch.rand(p.shape, generator=generator)}
            for n, p in enumerate(make_model().parameters())
        }
        optimizer_state = {"state": entries, "param_groups": [{"params": [0, 1, 2, 3]}]}
        checkpoints.append(Checkpoint(state, 10 * (i + 1), 0.1, optimizer_state))
    trajectory = Trajectory(checkpoints, Adam(weight_decay=0.1), segments=2, preconditioner=mode)
    return Run(make_model(), Classification(), trajectory, make_data())


def content(path: Path) -> dict[str, np.ndarray]:
    """Every array of a bank, decoded by plain zarr, and the attributes of every node but the software's versions."""
    root = zarr.open_group(path, mode="r")
    found: dict[str, Any] = {"": {k: v for k, v in root.attrs.asdict().items() if k != "versions"}}
    for name, node in root.members(max_depth=None):
        found[name] = node[...] if isinstance(node, zarr.Array) else node.attrs.asdict()
    return found


def assert_same(one: Path, other: Path) -> None:
    """Two banks hold the same bits."""
    left, right = content(one), content(other)
    assert left.keys() == right.keys()
    for name in left:
        if isinstance(left[name], dict):
            assert left[name] == right[name] or name == ""  # the root says where checkpoint files lie
        else:
            assert left[name].dtype == right[name].dtype, name
            assert left[name].tobytes() == right[name].tobytes(), name
    assert banks.open(one).fingerprint == banks.open(other).fingerprint


def rows(bank: banks.Bank, checkpoint: int, what: str = "output", stage: int = 0) -> torch.Tensor:
    blocks = list(bank.stages[stage].iter_rows(checkpoint, what))
    return torch.cat([block.rows for block in blocks])
