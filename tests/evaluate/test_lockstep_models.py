"""Stacked models keep what each would keep while it trains, and differ in nothing but what is stacked."""

import numpy as np
import pytest
import torch
from torch import nn

from source_proj.evaluate import retrain, stacked_outputs, train_stacked

N, EPOCHS, BATCH = 11, 3, 3  # of 7: 3 + 3 + 1
SETTING = {"epochs": EPOCHS, "batch_size": BATCH, "lr": 0.1, "momentum": 0.5}


class Keeps(nn.Module):
    """Subtracts a running mean, and scales by the number of its passes; both are put in place in one way or another."""

    def __init__(self, way, persistent=True):
        super().__init__()
        self.way, self.linear = way, nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4), persistent=persistent)
        self.register_buffer("count", torch.tensor(0), persistent=persistent)

    def forward(self, x):
        if self.training:
            mean, count = 0.7 * self.mean + 0.3 * x.detach().mean(0), self.count + 1
            if self.way == "assigned":
                self.mean, self.count = mean, count
            elif self.way == "in place":
                self.mean.copy_(mean)
                self.count += 1
            else:
                self._buffers["mean"] = mean
                self.register_buffer("count", count)
        return self.linear(x - self.mean) / (1 + 0.1 * self.count)


class Drawn(nn.Module):
    """A random matrix that is no parameter: a buffer, or nothing that a state knows."""

    def __init__(self, known):
        super().__init__()
        matrix, self.linear = torch.randn(4, 4, dtype=torch.float64), nn.Linear(4, 3)
        if known:
            self.register_buffer("matrix", matrix)
        else:
            self.matrix = matrix

    def forward(self, x):
        return self.linear(x @ self.matrix)


def nested(way, persistent):
    return nn.Sequential(Keeps(way, persistent), nn.Tanh(), Keeps(way, persistent), nn.Linear(4, 3)).double()


def problem(seed):
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    x = torch.randn(N, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (N,), generator=generator)
    return x, y, [rng.permutation(N)[:7] for _ in range(3)], rng.integers(99, size=3).tolist()


def one_by_one(make, x, y, subset, seed):
    torch.manual_seed(seed)
    model, generator = make(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    for _ in range(EPOCHS):
        for batch in torch.tensor(subset)[torch.randperm(len(subset), generator=generator)].split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("way", ["assigned", "in place", "registered"])
def test_what_a_pass_puts_in_the_place_of_buffers_is_there_for_the_next(way, persistent, seed):
    x, y, subsets, seeds = problem(seed)
    state = train_stacked(lambda: nested(way, persistent), x, y, subsets, seeds, **SETTING)
    outputs = stacked_outputs(lambda: nested(way, persistent), x)(state)
    for i, (subset, own) in enumerate(zip(subsets, seeds, strict=True)):
        model = one_by_one(lambda: nested(way, persistent), x, y, subset, own)
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            torch.testing.assert_close(state[name][i], value.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(outputs[i], model.eval()(x).detach(), rtol=1e-9, atol=1e-12)


def test_draws_that_are_no_buffers_are_refused():
    x, y, subsets, seeds = problem(0)

    def outputs(known, group):
        make = lambda: Drawn(known).double()  # noqa: E731
        return retrain(
            make, x, y, subsets, seeds, **SETTING, group=group, evaluate=lambda state: stacked_outputs(make, x)(state)
        )

    for group in (1, 3):
        found = outputs(True, group)
        for own, subset, seed in zip(found, subsets, seeds, strict=True):
            model = one_by_one(lambda: Drawn(True).double(), x, y, subset, seed)
            torch.testing.assert_close(own, model(x).detach(), rtol=1e-9, atol=1e-12)
        with pytest.raises(ValueError, match=r"differ with the same weights.*must be parameters and buffers"):
            outputs(False, group)
    train_stacked(lambda: Drawn(False).double(), x, y, subsets[:1], seeds[:1], **SETTING)  # one model may draw anything
