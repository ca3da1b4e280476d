"""Gradients of stacked models are those of each by itself, whatever torch's stacking makes of an operation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from source_proj.evaluate import stacked_outputs, train_stacked

N, WORDS = 14, 9
SETTING = {"epochs": 4, "batch_size": 3, "lr": 0.3}


class Words(nn.Module):
    """Means of embedded words."""

    def __init__(self, **options):
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, 5, **options), nn.Linear(5, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.words(x).mean(1).tanh())


class Numbers(nn.Module):
    """Words as float32 numbers that no state knows, whatever the precision of the weights."""

    def __init__(self):
        super().__init__()
        self.table, self.head = torch.linspace(-1, 1, WORDS * 4).view(WORDS, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.table[x].mean(1))


class Threefold(torch.autograd.Function):
    """Doubles; stacked, by a rule that is wrong, it trebles."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient

    @staticmethod
    def vmap(info, in_dims, x):
        return 3 * x, in_dims[0]


class Wrong(Words):
    def forward(self, x):
        return Threefold.apply(super().forward(x))


class Anneals(Words):
    """Counts its passes by itself, as for a temperature."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) / (1 + 0.1 * self.calls)


def problem(seed, models):
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    x, y = torch.randint(WORDS, (N, 6), generator=generator), torch.randint(3, (N,), generator=generator)
    x[:, 4:] = 0
    return x, y, [rng.permutation(N)[:8] for _ in range(models)], rng.integers(99, size=models).tolist()


def loops(make, x, y, subsets, seeds, decay):
    """The naive twin: one model after the other."""
    for subset, seed in zip(subsets, seeds, strict=True):
        torch.manual_seed(seed)
        model, order = make().train(), torch.Generator().manual_seed(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=SETTING["lr"], weight_decay=decay)
        for _ in range(SETTING["epochs"]):
            for batch in torch.randperm(len(subset), generator=order).split(SETTING["batch_size"]):
                optimizer.zero_grad()
                F.cross_entropy(model(x[subset[batch]]), y[subset[batch]]).backward()
                optimizer.step()
        yield model


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("models", [1, 2, 4])
@pytest.mark.parametrize(
    "make",
    [
        Words,
        lambda: Words(padding_idx=0),
        lambda: Words(padding_idx=3),
        lambda: Words(scale_grad_by_freq=True),
        Numbers,
        Anneals,
    ],
    ids=["plain", "padded", "padded elsewhere", "by frequency", "float32 alone", "counting"],
)
def test_stacked_models_are_trained_as_single_ones(make, models):
    x, y, subsets, seeds = problem(models, models)
    stacked = train_stacked(make, x, y, subsets, seeds, weight_decay=0.1, **SETTING)
    for m, model in enumerate(loops(make, x, y, subsets, seeds, 0.1)):
        for name, value in model.named_parameters():
            torch.testing.assert_close(stacked[name][m], value.detach(), rtol=1e-4, atol=1e-6)


def test_what_torch_stacks_wrongly_is_refused():
    x, y, subsets, seeds = problem(0, 3)
    with pytest.raises(ValueError, match=r"of stacked models is not that of single ones.*GroundTruth\.fill"):
        train_stacked(Wrong, x, y, subsets, seeds, **SETTING)


def test_what_draws_at_every_pass_is_trained_all_the_same():
    class Draws(Words):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 + 0.1 * torch.rand(()))

    x, y, subsets, seeds = problem(1, 2)
    state = train_stacked(Draws, x, y, subsets, seeds, **SETTING)
    assert all(value.isfinite().all() for value in state.values())


def test_the_trial_draws_nothing_of_what_training_draws():
    """Dropout of a padded model is that of the same model without a padding row, which stands still for no reason."""

    class Drops(Words):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(super().forward(x), 0.4, self.training)

    x, y, subsets, seeds = problem(2, 3)
    x = x.clamp(min=1)  # the padding row takes no part
    plain, padded = (
        train_stacked(make, x, y, subsets, seeds, **SETTING) for make in (Drops, lambda: Drops(padding_idx=0))
    )
    for name in ("head.weight", "head.bias"):
        torch.testing.assert_close(padded[name], plain[name], rtol=1e-4, atol=1e-6)
    assert stacked_outputs(Drops, x)(plain).shape == (3, N, 3)
