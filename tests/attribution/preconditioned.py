"""Small runs of preconditioned optimizers, and SOURCE written down densely in the space of all parameters."""

from dataclasses import dataclass

import numpy as np
import torch
from problems import Problem, _blobs
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.utils.data import TensorDataset

import source_proj as sp

LR, EVERY = 0.01, 10
ADAM = {"betas": (0.8, 0.95), "eps": 1e-3}


def run(optimizer, make, *, checkpoints=4, n=24, seed=0, schedule=None, **options):
    """A two-layer classifier, full batches; `make` turns its named parameters into torch's optimizer."""
    torch.manual_seed(seed)
    x, y = _blobs(n)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    found = train(model, make(model), x, y, checkpoints)
    trajectory = sp.Trajectory(found, optimizer, **{"segments": 2, **options})
    return Problem(model, sp.Classification(), trajectory, TensorDataset(x, y), TensorDataset(*_blobs(7)))


def train(model, torch_optimizer, x, y, checkpoints):
    found = []
    for step in range(1, EVERY * checkpoints + 1):
        torch_optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        torch_optimizer.step()
        if step % EVERY == 0:
            found.append(sp.Checkpoint(model.state_dict(), step, LR, torch_optimizer.state_dict()))
    return found


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=LR, **{"weight_decay": 0.0, **ADAM, **options})


def adam_run(*, weight_decay=0.3, **options):
    return run(
        sp.Adam(**ADAM, weight_decay=weight_decay), lambda model: adamw(model, weight_decay=weight_decay), **options
    )


@dataclass
class DenseSegment:
    """A segment of a stage of n examples that begins at row start; P and Λ are diagonals ``(d,)``."""

    start: int
    n: int
    time: float
    p: Tensor
    decay: Tensor
    hessian: Tensor
    mean: Tensor


def dense_scores(segments: list[DenseSegment], queries: Tensor, rows: int) -> np.ndarray:
    """Eq. 22 with S = exp(-s (P H + Λ)) and r = (1/N) ∫_0^s exp(-t (P H + Λ)) dt P g, float64, without any metric."""
    scores = torch.zeros(len(queries), rows, dtype=torch.float64)
    carried = queries.double()
    for segment in reversed(segments):
        generator = torch.diag(segment.p) @ segment.hessian + torch.diag(segment.decay)
        d = len(generator)
        block = torch.zeros(2 * d, 2 * d, dtype=torch.float64)
        block[:d, :d], block[:d, d:] = -generator, torch.eye(d)
        both = torch.matrix_exp(segment.time * block)  # [exp(-s A), ∫ exp(-t A) dt] (Van Loan 1978)
        part = -(carried @ both[:d, d:] @ (segment.p * segment.mean).T) / segment.n
        scores[:, segment.start : segment.start + segment.n] += part
        carried = carried @ both[:d, :d]
    return scores.numpy()


def flat(gradients: dict[str, Tensor]) -> Tensor:
    """(n, …) by name → (n, d), in the order of the space."""
    return torch.cat([one.flatten(1) for one in gradients.values()], dim=1)


def per_example(model: nn.Module, state: dict[str, Tensor], function, data: TensorDataset) -> Tensor:
    """Gradients ``(n, d)`` float64 of function(outputs, targets) ``(n,)``."""
    x, y = data.tensors
    parameters = {name: value.double() for name, value in state.items()}
    return flat(jacrev(lambda p: function(functional_call(model, p, (x.double(),)), y))(parameters))


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


def margin(outputs: Tensor, targets: Tensor) -> Tensor:
    """log(p/(1 - p)) of the target, what `sp.Classification` measures."""
    p = outputs.softmax(1).gather(1, targets[:, None])[:, 0]
    return p.log() - (1 - p).log()


def second_moments(checkpoint: sp.Checkpoint, names: list[str], beta: float) -> Tensor:
    """v̂ ``(d,)`` of torch's Adam, parameters in the model's order."""
    entries = checkpoint.optimizer_state["state"]
    order = [entries[n]["exp_avg_sq"].double() / (1 - beta ** float(entries[n]["step"])) for n in range(len(names))]
    return torch.cat([one.flatten() for one in order])


def dense_segment(problem, stage, group, data, start, p, decay, before=0.0) -> DenseSegment:
    """A segment of some checkpoints, with the empirical Fisher."""
    checkpoints = [stage.checkpoints[c] for c in group]
    g = torch.stack([per_example(problem.model, c.load(), loss, data) for c in checkpoints])
    hessian = torch.einsum("cni,cnj->ij", g, g) / (g.shape[0] * g.shape[1])
    time = LR * (checkpoints[-1].step - before)
    return DenseSegment(start, len(data), time, p, torch.as_tensor(decay).expand(p.shape), hessian, g.mean(0))
