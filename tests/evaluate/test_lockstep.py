"""Stacked models are trained as each would be by its own optimizer, or the optimizer is refused by name."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from source_proj.evaluate import stacked_outputs, train_stacked

N, SETTING = 20, {"epochs": 2, "batch_size": 4}
RULES = {
    "no decay on biases": lambda p: p.ndim < 2,
    "by size": lambda p: p.numel() > 6,
    "by last axis": lambda p: p.shape[-1] == 3,
    "all alike": lambda p: True,
}


class Clipped(torch.optim.SGD):
    """Clips to a norm over all parameters within its step."""

    def step(self, closure=None):
        torch.nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 10.0)
        return super().step(closure)


class Normed(torch.optim.SGD):
    """Divides each parameter's gradient by its norm, as LARS does."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad /= p.grad.norm()
        return super().step(closure)


class ClippedLater(torch.optim.SGD):
    """Clips once it has warmed up, at a norm that no gradient of the first steps is below."""

    taken = 0

    def step(self, closure=None):
        self.taken += 1
        if self.taken > 5:
            torch.nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 0.01)
        return super().step(closure)


class Lookahead(torch.optim.SGD):
    """Every fifth step goes half of the way from where the weights were (Zhang et al. 2019, arXiv 1907.08610)."""

    def __init__(self, parameters, lr=0.1):
        super().__init__(parameters, lr=lr)
        self.taken = 0
        for p in self.weights():
            self.state[p]["slow"] = p.detach().clone()

    def weights(self):
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        self.taken += 1
        if self.taken % 5 == 0:
            for p in self.weights():
                p.copy_(self.state[p]["slow"].lerp_(p, 0.5))


class Remembering(Lookahead):
    """Keeps where the weights were in a list of its own, of which nothing that stacks models can know."""

    def __init__(self, parameters, lr=0.1):
        super().__init__(parameters, lr=lr)
        self.slow = [self.state.pop(p)["slow"] for p in self.weights()]

    @torch.no_grad()
    def step(self, closure=None):
        torch.optim.SGD.step(self, closure)
        self.taken += 1
        if self.taken % 5 == 0:
            for p, slow in zip(self.weights(), self.slow, strict=True):
                p.copy_(slow.lerp(p, 0.5))


def with_hook(parameters):
    optimizer = torch.optim.AdamW(parameters, eps=1.0)
    optimizer.register_step_pre_hook(lambda *_: torch.nn.utils.clip_grad_norm_(parameters, 1.0))
    return optimizer


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 3)).double()


def grouped(make, rule, parameters):
    chosen = [p for p in parameters if rule(p)]
    rest = [p for p in parameters if not rule(p)]
    groups = [{"params": chosen, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.5}]
    return make([group for group in groups if group["params"]], lr=0.0)


def one_by_one(make_optimizer, x, y, subset, seed, rate):
    torch.manual_seed(seed)
    model = network()
    optimizer = make_optimizer(list(model.parameters()))
    generator, count = torch.Generator().manual_seed(seed), 0
    for _ in range(SETTING["epochs"]):
        for batch in torch.tensor(subset)[torch.randperm(len(subset), generator=generator)].split(4):
            for group in optimizer.param_groups:
                group["lr"] = rate(count)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            count += 1
    return model


OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "adam": torch.optim.Adam,
    "adamw": partial(torch.optim.AdamW, amsgrad=True, foreach=True),
    "fused": partial(torch.optim.AdamW, fused=True),
    "adagrad": partial(torch.optim.Adagrad, initial_accumulator_value=0.3),
    "rmsprop": partial(torch.optim.RMSprop, momentum=0.5, centered=True),
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "lookahead": Lookahead,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(max_examples=4)
@given(seed=st.integers(0, 2**20), rule=st.sampled_from(list(RULES)), count=st.integers(1, 3))
def test_groups_by_shape_are_those_of_one_models_parameters(name, seed, rule, count):
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    x = torch.randn(N, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (N,), generator=generator)
    subsets = [rng.permutation(N)[:9] for _ in range(count)]
    seeds = rng.integers(99, size=count).tolist()
    make, rate = partial(grouped, OPTIMIZERS[name], RULES[rule]), lambda step: 0.05 / (1 + step)
    state = train_stacked(network, x, y, subsets, seeds, **SETTING, lr=rate, optimizer=make)
    outputs = stacked_outputs(network, x)(state)
    for subset, own, got in zip(subsets, seeds, outputs, strict=True):
        expected = one_by_one(make, x, y, subset, own, rate)(x).detach()
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def trained(optimizer):
    x, y = torch.randn(N, 3, dtype=torch.float64), torch.zeros(N, dtype=torch.int64)
    return train_stacked(network, x, y, [np.arange(8)] * 2, [0, 1], **SETTING, lr=0.1, optimizer=optimizer)


def muon(parameters):
    return torch.optim.Muon([p for p in parameters if p.ndim == 2])


NOT_ALONE = {
    "Adafactor": torch.optim.Adafactor,
    "LBFGS": torch.optim.LBFGS,
    "SparseAdam": torch.optim.SparseAdam,
    "Clipped": Clipped,
    "Normed": Normed,
    "ClippedLater": ClippedLater,
    "Remembering": Remembering,
    "AdamW": with_hook,
    **({"Muon": muon} if hasattr(torch.optim, "Muon") else {}),
}


@pytest.mark.parametrize("name", NOT_ALONE)
def test_what_does_not_act_on_each_number_alone_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"{name} (does not act|cannot take).*one by one"):
        trained(NOT_ALONE[name])
    with pytest.raises(ValueError, match=rf"{name} (does not act|cannot take)"):
        trained(lambda parameters: grouped_alone(NOT_ALONE[name], parameters))


def grouped_alone(make, parameters):
    """Of no rate at first, as where a schedule warms up."""
    optimizer = make(parameters)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    return optimizer


def test_an_optimizer_of_something_else_is_refused():
    with pytest.raises(ValueError, match="1 parameters of the SGD are not among those"):
        trained(lambda parameters: torch.optim.SGD([nn.Parameter(torch.zeros(3))]))
    with pytest.raises(TypeError, match="must be a function of parameters"):
        trained(lambda parameters: None)
    with pytest.raises(ValueError, match=r"learning rates \[0.1, 0.2\], and lr= sets one for all"):
        trained(
            lambda parameters: torch.optim.SGD([{"params": parameters[:1], "lr": 0.2}, {"params": parameters[1:]}], 0.1)
        )
