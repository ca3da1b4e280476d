"""Layers that exact unrolling could get wrong: right beside retraining with other weights, or refused by name."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

import source_proj as sp
from source_proj.evaluate import ExactUnrolling
from source_proj.evaluate._stacked_loss import _single_gradients

N, Q, WIDTH, WORDS = 6, 3, 8, 5
STEPS = [list(range(N)), [0, 1, 2], [3, 4, 5, 5]] * 2


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 1)

    def body(self, x):
        return self.inner(x).tanh()

    def forward(self, x):
        return self.outer(self.body(x))


class Checkpointed(Plain):
    """Computes its body once more in the backward pass."""

    def forward(self, x):
        return self.outer(checkpoint(self.body, x, use_reentrant=False))


class Words(nn.Module):
    def __init__(self, kind=nn.Embedding, **options):
        super().__init__()
        self.words, self.outer = kind(WORDS, WIDTH, **options), nn.Linear(WIDTH, 1)

    def forward(self, x):
        words = self.words(x)
        return self.outer((words if words.ndim == 2 else words.mean(1)).tanh())


def problem(make, seed=0):
    """A model in double precision, training data and queries, numbers or words as it takes."""
    torch.manual_seed(seed)
    model = make().double()
    draw = (
        (lambda n: torch.randint(WORDS, (n, 4))) if isinstance(model, Words) else (lambda n: torch.randn(n, 4).double())
    )
    targets = torch.randn(N, 1, dtype=torch.float64)
    return model, TensorDataset(draw(N), targets), TensorDataset(draw(Q), targets[:Q])


def optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.2, momentum=0.5)


def retrained(model, data, weights):
    """The naive twin: a plain loop with weighted examples."""
    twin = copy.deepcopy(model)
    descent = optimizer(twin.parameters())
    x, y = data.tensors
    for places in STEPS:
        descent.zero_grad()
        (weights[places] * (twin(x[places]) - y[places])[:, 0] ** 2).mean().backward()
        descent.step()
    return twin


def unrolled(model, data, batches=STEPS):
    return ExactUnrolling(model, sp.Regression("prediction"), data, batches, optimizer, progress=False)


def slopes(model, data, queries, width=1e-5):
    """Central differences of each query's prediction after training, by each example's weight, (Q, N)."""
    columns = []
    for z in range(N):
        shift = width * nn.functional.one_hot(torch.tensor(z), N).double()
        with torch.no_grad():
            up, down = (one(queries.tensors[0])[:, 0] for one in _both(model, data, shift))
        columns.append((up - down) / (2 * width))
    return torch.stack(columns, 1).numpy()


def _both(model, data, shift):
    with torch.enable_grad():
        return [retrained(model, data, 1 + sign * shift) for sign in (1, -1)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make", [Plain, Checkpointed, Words, lambda: Words(padding_idx=1)])
def test_scores_are_the_slope_of_retraining(make, seed):
    model, data, queries = problem(make, seed)
    run = unrolled(model, data)
    ends = dict(retrained(model, data, torch.ones(N, dtype=torch.float64)).named_parameters())
    for name, value in run.final_weights().items():
        torch.testing.assert_close(value, ends[name].detach(), rtol=1e-10, atol=1e-12)
    expected = slopes(model, data, queries)
    np.testing.assert_allclose(run.score(queries).values, expected, rtol=1e-5, atol=1e-7 * abs(expected).max())


def test_what_stacked_models_are_held_to_knows_checkpoints():
    """Gradients of single models with weights of their own, the checkpointed body's among them."""
    model, data, _ = problem(Checkpointed)
    others = [problem(Checkpointed, seed)[0] for seed in (1, 2)]
    x, y = (torch.stack([values[:4], values[2:]]) for values in data.tensors)
    own = {
        name: torch.stack([dict(other.named_parameters())[name].detach() for other in others]).requires_grad_()
        for name, _ in model.named_parameters()
    }
    rows = _single_gradients(model, nn.functional.mse_loss, own, {}, x, y)
    for m, other in enumerate(others):
        nn.functional.mse_loss(other(x[m]), y[m]).backward()
        for name, parameter in other.named_parameters():
            torch.testing.assert_close(rows[name][m], parameter.grad)
