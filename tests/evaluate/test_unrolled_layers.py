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


class Normalised(Plain):
    """Of torch's fused weight normalisation the second derivative is wrong."""

    def __init__(self, norm=nn.utils.parametrizations.weight_norm):
        super().__init__()
        norm(self.inner), norm(self.outer, dim=None)


class Cut(Plain):
    def body(self, x):
        inner = self.inner(x)
        return inner * inner.detach().sigmoid()


class Clamped(Plain):
    def body(self, x):
        with torch.no_grad():
            self.inner.bias.clamp_(-0.1, 0.1)
        return super().body(x)


class Counting(Plain):
    calls = 0

    def body(self, x):
        self.calls += 1
        return super().body(x) / (1 + 0.01 * self.calls)


class Words(nn.Module):
    def __init__(self, kind=nn.Embedding, **options):
        super().__init__()
        self.words, self.outer = kind(WORDS, WIDTH, **options), nn.Linear(WIDTH, 1)

    def forward(self, x):
        words = self.words(x)
        return self.outer((words if words.ndim == 2 else words.mean(1)).tanh())


class ByFrequency(Words):
    """Scales the gradient of a word by its count, as no module says."""

    def forward(self, x):
        words = nn.functional.embedding(x, self.words.weight, scale_grad_by_freq=True)
        return self.outer(words.mean(1).tanh())


class Kinks(nn.Module):
    """As many as there are units, in every layer."""

    def __init__(self):
        super().__init__()
        wide = (nn.Linear(64, 64), nn.ReLU())
        self.layers = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), *wide, nn.MaxPool1d(2), nn.Linear(32, 1))

    def forward(self, x):
        return nn.functional.dropout(self.layers(x), 0.3, training=True)


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
@pytest.mark.parametrize(
    "make",
    [Plain, Checkpointed, Normalised, Words, lambda: Words(padding_idx=1)],
    ids=["plain", "checkpointed", "weight norm", "words", "padded"],
)
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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Words(max_norm=1.0), r"'words' is an Embedding with max_norm=1\.0, which renormalises"),
        (lambda: Words(nn.EmbeddingBag, max_norm=2.0), r"'words' is an EmbeddingBag with max_norm=2\.0.*or freeze it"),
        (lambda: Words(scale_grad_by_freq=True), r"scale_grad_by_freq=True.*train with scale_grad_by_freq=False"),
    ],
)
def test_layers_that_train_otherwise_are_refused_before_the_run(make, message):
    model, data, queries = problem(make)
    with pytest.raises(sp.GradientError, match=message):
        unrolled(model, data)
    model.words.weight.requires_grad_(False)
    if isinstance(model.words, nn.Embedding):
        assert unrolled(model, data).score(queries).values.any()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (ByFrequency, r"differentiates the gradient by 'words\.weight' wrongly.*off central differences"),
        (Cut, r"differentiates the gradient by 'inner\.weight' wrongly.*a detach\(\).*or freeze it"),
        (Clamped, r"changes the weights \['inner\.bias'\] in place"),
        (Counting, "a second pass with the same weights gives another gradient.*counts its passes"),
    ],
)
def test_what_torch_differentiates_wrongly_is_refused_by_name(make, message, seed):
    model, data, queries = problem(make, seed)
    with pytest.raises(sp.GradientError, match=message):
        unrolled(model, data).score(queries)


def test_a_wrong_second_derivative_shows_in_the_scores_that_are_refused(monkeypatch):
    """The guard is not about nothing: without it these are off by a part of them."""
    monkeypatch.setattr(ExactUnrolling, "_prove", lambda self: None)
    for make in (ByFrequency, Cut):
        model, data, queries = problem(make)
        expected = slopes(model, data, queries)
        assert abs(unrolled(model, data).score(queries).values - expected).max() > 1e-3 * abs(expected).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kinks_and_draws_are_no_reason_to_refuse(dtype):
    for seed in range(8):
        model, data, queries = problem(Kinks, seed)
        assert np.isfinite(unrolled(model.to(dtype), data, STEPS[:2]).score(queries).values).all()
