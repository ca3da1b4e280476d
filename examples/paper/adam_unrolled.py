"""SOURCE in Adam's metrics against exact unrolled differentiation of a small AdamW run.

    python examples/paper/adam_unrolled.py

Least squares with 6 weights and 20 examples, full batches, 400 steps. What removing an example changes is carried
through every step of the optimizer, first moments included; second moments are what they were ("steps"), or change as
well ("steps and moments"). SOURCE knows 64 checkpoints, cut into segments with a metric each. Printed: the distance of
its scores from the exact ones, relative to these.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import source_proj as sp
from source_proj.trajectory import PreconditionerMode

STEPS, CHECKPOINTS, LR, DECAY, BETAS, EPS = 400, 64, 0.01, 0.1, (0.9, 0.99), 0.05


@dataclass
class Step:
    """One step of training: gradients ``(n, d)`` before it, v̂ ``(d,)`` and weights ``(1, d)`` after it."""

    gradients: Tensor
    second: Tensor
    weights: Tensor
    state: dict[str, Any]


@dataclass
class Example:
    """A run, its data, and the derivative of the last weights by the removal of each example ``(n, d)``."""

    x: Tensor
    y: Tensor
    queries: TensorDataset
    steps: list[Step]

    @property
    def hessian(self) -> Tensor:
        """Of the mean squared error, ``(d, d)``."""
        return 2 * self.x.T @ self.x / len(self.x)

    def query_gradients(self) -> Tensor:
        """Of each query's squared error at the end, ``(q, d)``."""
        x, y = self.queries.tensors
        return 2 * (x.double() @ self.steps[-1].weights.T - y.double()) * x.double()


def train(seed: int = 0) -> Example:
    """Train with torch's AdamW in float64, and keep every step."""
    torch.manual_seed(seed)
    x = torch.randn(20, 6, dtype=torch.float64) * torch.linspace(0.5, 2, 6, dtype=torch.float64)
    y = x @ torch.randn(6, 1, dtype=torch.float64) + 0.5 * torch.randn(20, 1, dtype=torch.float64)
    weights = nn.Parameter(torch.zeros(1, 6, dtype=torch.float64))
    optimizer = torch.optim.AdamW([weights], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    steps = []
    for step in range(1, STEPS + 1):
        gradients = 2 * (x @ weights.detach().T - y) * x
        weights.grad = gradients.mean(0, keepdim=True)
        optimizer.step()
        entry = optimizer.state[weights]
        second = (entry["exp_avg_sq"] / (1 - BETAS[1] ** step)).flatten()
        state = {
            "state": {0: {"step": step, "exp_avg_sq": entry["exp_avg_sq"].clone()}},
            "param_groups": [{"params": [0]}],
        }
        steps.append(Step(gradients, second, weights.detach().clone(), state))
    queries = TensorDataset(torch.randn(5, 6), torch.randn(5, 1))
    return Example(x, y, queries, steps)


def unrolled(example: Example, *, moments: bool) -> np.ndarray:
    """Exact scores ``(q, n)``: each step differentiated by the removal of each example.

    Args:
        example: the run.
        moments: whether second moments are differentiated too.
    """
    n, d = example.x.shape
    moved, first, second = (torch.zeros(n, d, dtype=torch.float64) for _ in range(3))
    mean, raw = torch.zeros(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
    for t, step in enumerate(example.steps, start=1):
        gradient = step.gradients.mean(0)
        change = moved @ example.hessian - step.gradients / n  # of the mean gradient
        mean = BETAS[0] * mean + (1 - BETAS[0]) * gradient
        first = BETAS[0] * first + (1 - BETAS[0]) * change
        second = BETAS[1] * second + (1 - BETAS[1]) * 2 * gradient * change
        raw = step.second.sqrt()
        p = 1 / (raw + EPS)
        direction = p * first / (1 - BETAS[0] ** t)
        if moments:
            second_hat = second / (1 - BETAS[1] ** t)
            direction = direction - mean / (1 - BETAS[0] ** t) * p**2 * second_hat / (2 * raw)
        moved = moved - LR * (direction + DECAY * moved)
    return -(example.query_gradients() @ moved.T).numpy()


def checkpoints(example: Example) -> list[sp.Checkpoint]:
    """Weights and second moments at equal distances."""
    at = [round(STEPS * (i + 1) / CHECKPOINTS) for i in range(CHECKPOINTS)]
    found = [(step, example.steps[step - 1]) for step in at]
    return [sp.Checkpoint({"weight": one.weights.float()}, step, LR, one.state) for step, one in found]


def source_scores(example: Example, segments: int, mode: PreconditionerMode = "per_segment") -> np.ndarray:
    """SOURCE with an exact sketch ``(q, n)``."""
    adam = sp.Adam(BETAS, eps=EPS, weight_decay=DECAY)
    course = sp.Trajectory(checkpoints(example), adam, segments=segments, preconditioner=mode)
    data = TensorDataset(example.x.float(), example.y.float())
    model = nn.Linear(6, 1, bias=False)
    exact: dict[str, Any] = {"sketch": sp.Sketch(6, "identity"), "storage": "float32", "progress": False}
    with tempfile.TemporaryDirectory() as folder:
        bank = sp.build(model, sp.Regression("squared"), course, data, f"{folder}/bank", **exact)
        source = sp.Source(bank, model=model, curvature="gauss_newton", damping=None, progress=False)
        return np.asarray(source.score(example.queries)).astype(float)


def frozen(example: Example, segments: int, lr: float) -> np.ndarray:
    """The exact derivative ``(q, n)`` of AdamW with each segment's P and gradients held at their means.

    Args:
        example: the run, whose times of segments are kept: fewer or more steps for another learning rate.
        segments: their number.
        lr: learning rate; its multiple must be the run's.
    """
    n, d = example.x.shape
    moved, first = torch.zeros(n, d, dtype=torch.float64), torch.zeros(n, d, dtype=torch.float64)
    t = 0
    for steps in _segments(segments):
        ends = [example.steps[step - 1] for step in steps]
        p = torch.stack([1 / (one.second.sqrt() + EPS) for one in ends]).mean(0)
        gradients = torch.stack([2 * (example.x @ one.weights.T - example.y) * example.x for one in ends]).mean(0)
        for _ in range(round(STEPS / segments * LR / lr)):
            t += 1
            first = BETAS[0] * first + (1 - BETAS[0]) * (moved @ example.hessian - gradients / n)
            moved = moved - lr * (p * first / (1 - BETAS[0] ** t) + DECAY * moved)
    return -(example.query_gradients() @ moved.T).numpy()


def _segments(count: int) -> Iterator[Sequence[int]]:
    at = [round(STEPS * (i + 1) / CHECKPOINTS) for i in range(CHECKPOINTS)]
    for begin in range(0, CHECKPOINTS, CHECKPOINTS // count):
        yield at[begin : begin + CHECKPOINTS // count]


def distance(found: np.ndarray, exact: np.ndarray) -> float:
    """Relative distance of two sets of scores."""
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def main() -> None:
    """Print the table."""
    example = train()
    exact = {"steps": unrolled(example, moments=False), "steps and moments": unrolled(example, moments=True)}
    modes: list[PreconditionerMode] = ["per_segment", "shared"]
    for mode in modes:
        for segments in (1, 2, 4, 8, 16):
            scores = source_scores(example, segments, mode)
            gaps = ", ".join(f"{distance(scores, one):.3f} from {name}" for name, one in exact.items())
            print(f"{mode:>11}, {segments:2d} segments: {gaps}")
    for lr in (LR, LR / 2, LR / 4, LR / 8):
        gap = distance(frozen(example, 2, lr), source_scores(example, 2))
        print(f"all held at the means of 2 segments, learning rate {lr:g}: {gap:.5f}")


if __name__ == "__main__":
    main()
