"""Stacked training takes what a loop of one's own takes: frozen and idle parameters, indices of any library."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from source_proj.evaluate import half_subsets, retrain, stacked_outputs, train_stacked

X, Y = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)).double(), torch.arange(40) % 3
SUBSETS, SEEDS = [np.flatnonzero(mask) for mask in half_subsets(40, 3)], [5, 0, 9]
SETTING = {"epochs": 2, "batch_size": 6, "lr": 0.05}
OPTIMIZERS = {
    "SGD": (None, lambda p: torch.optim.SGD(p, lr=0.05)),
    "AdamW": (torch.optim.AdamW, lambda p: torch.optim.AdamW(p, lr=0.05)),
}


class Net(nn.Module):
    """Some of its layers are frozen, and others take no part."""

    def __init__(self, frozen, idle):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4).double() for _ in range(4)])
        self.head, self.idle = nn.Linear(4, 3).double(), idle
        for place in frozen:
            self.layers[place].weight.requires_grad_(False)

    def forward(self, x):
        for place, layer in enumerate(self.layers):
            x = x if place in self.idle else layer(x).tanh()
        return self.head(x)


def looped(make_model, optimizer, subset, seed):
    """One model, trained as anyone would."""
    torch.manual_seed(seed)
    model = make_model()
    steps = optimizer(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    for _ in range(SETTING["epochs"]):
        order = torch.from_numpy(subset)[torch.randperm(len(subset), generator=generator)]
        for batch in order.split(SETTING["batch_size"]):
            steps.zero_grad()
            nn.functional.cross_entropy(model(X[batch]), Y[batch]).backward()
            steps.step()
    return model.state_dict()


PLACES = st.sets(st.integers(0, 3))


@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(max_examples=25)
@given(PLACES, PLACES)
def test_frozen_and_idle_parameters_are_as_in_a_loop(name, frozen, idle):
    make, alone = OPTIMIZERS[name]
    states = train_stacked(lambda: Net(frozen, idle), X, Y, SUBSETS, SEEDS, optimizer=make, **SETTING)
    for place, (subset, seed) in enumerate(zip(SUBSETS, SEEDS, strict=True)):
        for key, expected in looped(lambda: Net(frozen, idle), alone, subset, seed).items():
            torch.testing.assert_close(states[key][place], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "kind", [torch.tensor, list, tuple, lambda s: s.astype(np.uint8), lambda s: np.array(s[::-1])[::-1]]
)
@pytest.mark.parametrize("seeds", [np.array(SEEDS), torch.tensor(SEEDS), [np.uint8(seed) for seed in SEEDS]])
def test_indices_seeds_and_data_of_any_library_are_the_same(kind, seeds):
    def trained(subsets, seeds, inputs, targets):
        evaluate = stacked_outputs(lambda: Net((), ()), inputs)
        return retrain(
            lambda: Net((), ()), inputs, targets, subsets, seeds, **SETTING, evaluate=evaluate, progress=False
        )

    expected = trained(SUBSETS, SEEDS, X, Y)
    assert torch.equal(trained([kind(subset) for subset in SUBSETS], seeds, X.numpy(), Y.numpy()), expected)


@pytest.mark.parametrize("seed", [0.5, "1", None])
def test_what_is_no_seed_is_named(seed):
    with pytest.raises(TypeError, match=f"a seed must be a whole number, got {seed!r}"):
        train_stacked(lambda: Net((), ()), X, Y, SUBSETS, [0, 1, seed], **SETTING)
