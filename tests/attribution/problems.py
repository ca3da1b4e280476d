"""Small training runs with exact (identity) sketches, and SOURCE written down naively."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import source_proj as sp


@dataclass
class Problem:
    """A trained model, what trained it, and its data."""

    model: nn.Module
    task: sp.Task
    trajectory: sp.Trajectory
    train: TensorDataset | dict[str, TensorDataset]
    queries: TensorDataset

    @property
    def size(self) -> int:
        """d."""
        return sum(p.numel() for p in self.model.parameters())

    def build(self, path: Path, sketch: sp.Sketch | None = None, **options: object) -> sp.Bank:
        sketch = sketch or sp.Sketch(dim=self.size, kind="identity")
        options = {"storage": "float32", "batch_size": 8, "progress": False, **options}
        return sp.build(self.model, self.task, self.trajectory, self.train, path, sketch=sketch, **options)


def source(problem: Problem, bank: sp.Bank, **options) -> sp.Source:
    return sp.Source(bank, model=problem.model, **{"progress": False, **options})


def classification(n: int = 40, *, checkpoints: int = 4, segments: object = 2, seed: int = 0) -> Problem:
    """A two-layer classifier on noisy blobs, SGD with momentum and weight decay."""
    torch.manual_seed(seed)
    x, y = _blobs(n)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    states = _train(model, x, y, nn.functional.cross_entropy, steps=20 * checkpoints, every=20, lr=0.05)
    trajectory = sp.Trajectory(
        [sp.Checkpoint(state, 20 * (i + 1), lr=0.05) for i, state in enumerate(states)],
        optimizer=sp.SGD(momentum=0.5, weight_decay=1e-2),
        segments=segments,
    )
    return Problem(model, sp.Classification(), trajectory, TensorDataset(x, y), TensorDataset(*_blobs(7)))


def two_stages(n: int = (30), *, seed: int = 0) -> Problem:
    """Pretraining on one set, then fine-tuning on another, smaller one."""
    torch.manual_seed(seed)
    first, second = _blobs(n), _blobs(n // 2)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    early = _train(model, *first, nn.functional.cross_entropy, steps=40, every=20, lr=0.1)
    late = _train(model, *second, nn.functional.cross_entropy, steps=30, every=10, lr=0.02)
    optimizer = sp.SGD(momentum=0.5, weight_decay=1e-2)
    trajectory = sp.Trajectory.from_stages(
        [
            sp.Stage("pretrain", [sp.Checkpoint(s, 20 * (i + 1), lr=0.1) for i, s in enumerate(early)], optimizer),
            sp.Stage(
                "finetune", [sp.Checkpoint(s, 10 * (i + 1), lr=0.02) for i, s in enumerate(late)], optimizer, segments=2
            ),
        ]
    )
    train = {"pretrain": TensorDataset(*first), "finetune": TensorDataset(*second)}
    return Problem(model, sp.Classification(), trajectory, train, TensorDataset(*_blobs(6)))


def regression(n: int = 30, d: int = 4, *, seed: int = 0) -> Problem:
    """Linear least squares, gradient descent; the squared error of each query is measured."""
    torch.manual_seed(seed)
    x = torch.randn(n, d)
    y = x @ torch.randn(d, 1) + 0.3 * torch.randn(n, 1)
    model = nn.Linear(d, 1, bias=False)
    states = _train(model, x, y, nn.functional.mse_loss, steps=60, every=30, lr=0.01, momentum=0.0, weight_decay=0.0)
    trajectory = sp.Trajectory([sp.Checkpoint(s, 30 * (i + 1), lr=0.01) for i, s in enumerate(states)])
    qx = torch.randn(5, d)
    return Problem(
        model, sp.Regression("squared"), trajectory, TensorDataset(x, y), TensorDataset(qx, torch.randn(5, 1))
    )


def naive_source(bank: sp.Bank, queries: Tensor, groups: list[list[list[int]]], damping: float | None) -> np.ndarray:
    """SOURCE as the paper writes it (eq. 16 to 23), in dense float64 matrices, one example at a time.

    ``damping``: added inside c; None stands for tr(H)/k.
    """
    segments, start = [], 0
    for stage, own in zip(bank.stages, groups, strict=True):
        optimizer, integrals = stage.record.optimizer, stage.record.lr_integrals
        factor = (1 - optimizer.dampening) / (1 - optimizer.momentum)
        decay, before = optimizer.weight_decay, 0.0
        for group in own:
            g = torch.stack([_loss_gradients(stage, c) for c in group])  # (C, n, k)
            hessian = sum(torch.outer(a, a) for one in g for a in one) / (stage.n * len(group))
            time = factor * (integrals[group[-1]] - before)
            before = integrals[group[-1]]
            segments.append((start, stage.n, time, decay, hessian, g.mean(0)))
        start += stage.n
    scores = torch.zeros(len(queries), bank.n_rows, dtype=torch.float64)
    identity = torch.eye(queries.shape[1], dtype=torch.float64)
    for q, query in enumerate(queries.double()):
        carried = query.clone()
        for start, n, time, decay, hessian, mean in reversed(segments):
            rho = float(hessian.trace()) / len(identity) if damping is None else damping
            damped = hessian + (decay + rho) * identity
            c = torch.linalg.solve(damped, identity - torch.matrix_exp(-time * damped))
            for z in range(n):
                scores[q, start + z] += -(carried @ c @ mean[z]) / n  # score = -τ, and r = c g / N
            carried = torch.matrix_exp(-time * (hessian + decay * identity)) @ carried
    return scores.numpy()


def _loss_gradients(stage: sp.StageBank, checkpoint: int) -> Tensor:
    return torch.cat([b.rows * b.d1[:, None] for b in stage.iter_rows(checkpoint)]).double()


def _blobs(n: int) -> tuple[Tensor, Tensor]:
    y = torch.arange(n) % 3
    return torch.randn(n, 5) + 1.5 * nn.functional.one_hot(y, 5), y


def _train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: object,
    *,
    steps: int,
    every: int,
    lr: float,
    momentum: float = 0.5,
    weight_decay: float = 1e-2,
) -> list[dict[str, Tensor]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    states = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
        if step % every == 0:
            states.append({name: value.clone() for name, value in model.state_dict().items()})
    return states
