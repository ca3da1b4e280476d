"""Steps of random models (B, T, D) → (B, T, D): each step is a way of using layers that people write.

A step is a function of a module (to put layers into) that returns what is called with the hidden state and the batch.
Every step gives each example what it would get alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

D, T, VOCABULARY = 4, 6, 9
Batch = dict[str, Tensor]
Step = Callable[[Tensor, Batch], Tensor]
STEPS: dict[str, Callable[[nn.Module], Step]] = {}


def step(build: Callable[[nn.Module], Step]) -> Callable[[nn.Module], Step]:
    """Register a step under its name."""
    STEPS[build.__name__] = build
    return build


def layer(owner: nn.Module, made: nn.Module) -> nn.Module:
    """Put a layer into a module."""
    owner.add_module(f"layer_{len(owner._modules)}", made)
    return made


def linear(owner: nn.Module, bias: bool = True) -> nn.Module:
    return layer(owner, nn.Linear(D, D, bias=bias))


class Conv1D(nn.Module):
    """The layer of this name in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.nf = D
        self.weight, self.bias = nn.Parameter(torch.randn(D, D)), nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, D), self.weight).view(x.shape)


class LlamaRMSNorm(nn.Module):
    """The layer of this name in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(D)), 1e-2

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


# Layers of every rule ------------------------------------------------------------------------------------------------


@step
def plain(owner: nn.Module) -> Step:
    made = linear(owner)
    return lambda h, _: made(h)


@step
def conv1d_of_transformers(owner: nn.Module) -> Step:
    made = layer(owner, Conv1D())
    return lambda h, _: made(h)


@step
def convolution(owner: nn.Module) -> Step:
    made = layer(owner, nn.Conv1d(D, D, 3, padding=1, groups=2))
    return lambda h, _: made(h.transpose(1, 2)).transpose(1, 2)


@step
def image(owner: nn.Module) -> Step:
    made = layer(owner, nn.Conv2d(1, 1, 3, padding=1))
    return lambda h, _: made(h[:, None])[:, 0]


@step
def normalised(owner: nn.Module) -> Step:
    norms = [layer(owner, made) for made in (nn.LayerNorm(D), nn.RMSNorm(D, eps=1e-2), LlamaRMSNorm())]
    return lambda h, _: norms[0](h) + norms[1](h) + norms[2](h)


@step
def channels(owner: nn.Module) -> Step:
    group, batch = layer(owner, nn.GroupNorm(2, D)), layer(owner, nn.BatchNorm1d(D))
    batch.running_mean.normal_()
    return lambda h, _: (group(h.transpose(1, 2)) + batch(h.transpose(1, 2))).transpose(1, 2)


@step
def positions(owner: nn.Module) -> Step:
    table, project = layer(owner, nn.Embedding(T, D)), linear(owner)
    return lambda h, _: h + project(table(torch.arange(T)))


@step
def embedded(owner: nn.Module) -> Step:
    table = layer(owner, nn.Embedding(VOCABULARY, D, padding_idx=0))
    return lambda h, batch: h + table(batch["ids"])


# Weights used again, elsewhere, or not at all ------------------------------------------------------------------------


@step
def reused(owner: nn.Module) -> Step:
    made = linear(owner)
    return lambda h, _: made(made(h).tanh())


@step
def tied(owner: nn.Module) -> Step:
    table, head = layer(owner, nn.Embedding(VOCABULARY, D)), layer(owner, nn.Linear(D, VOCABULARY, bias=False))
    head.weight = table.weight
    return lambda h, batch: h + head(h + table(batch["ids"])).softmax(-1)[..., :D]


@step
def functional(owner: nn.Module) -> Step:
    made = linear(owner)
    return lambda h, _: made(h) + F.linear(h.tanh(), made.weight.T)


@step
def functional_for_some(owner: nn.Module) -> Step:
    made = linear(owner)

    def run(h: Tensor, batch: Batch) -> Tensor:
        h, chosen = made(h), batch["flag"]
        return torch.where(chosen[:, None, None], F.linear(h, made.weight), h) if bool(chosen.any()) else h

    return run


@step
def functional_on_a_slice(owner: nn.Module) -> Step:
    made = linear(owner)

    def run(h: Tensor, batch: Batch) -> Tensor:
        out = made(h).clone()
        chosen = batch["flag"].nonzero()[:, 0]
        out[chosen] = F.linear(h[chosen], made.weight)
        return out

    return run


@step
def raw(owner: nn.Module) -> Step:
    owner.scale = nn.Parameter(torch.rand(D))
    return lambda h, _: h * owner.scale


@step
def unused(owner: nn.Module) -> Step:
    linear(owner)
    return lambda h, _: h


@step
def parametrised(owner: nn.Module) -> Step:
    made = layer(owner, parametrizations.weight_norm(nn.Linear(D, D)))
    return lambda h, _: made(h)


@step
def spectral(owner: nn.Module) -> Step:
    made = layer(owner, parametrizations.spectral_norm(nn.Linear(D, D)))
    return lambda h, _: made(h)


# In place, without gradient, computed again --------------------------------------------------------------------------


@step
def in_place(owner: nn.Module) -> Step:
    made = linear(owner)

    def run(h: Tensor, _: Batch) -> Tensor:
        out = made(h)
        out += h
        return F.relu(out, inplace=True)

    return run


@step
def written_into(owner: nn.Module) -> Step:
    made = linear(owner)

    def run(h: Tensor, _: Batch) -> Tensor:
        out = torch.zeros_like(h)
        for b in range(len(h)):
            out[b] = made(h[b : b + 1])[0]
        return out

    return run


@step
def detached(owner: nn.Module) -> Step:
    first, second = linear(owner), linear(owner)

    def run(h: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            apart = first(h)
        h = second(h) + apart + first(h)
        return torch.where(batch["flag"][:, None, None], h.detach(), h)

    return run


@step
def checkpointed(owner: nn.Module) -> Step:
    made = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))
    layer(owner, made)
    return lambda h, _: checkpoint(made, h, use_reentrant=False)


# Examples in other places --------------------------------------------------------------------------------------------


@step
def flattened(owner: nn.Module) -> Step:
    made, norm = linear(owner), layer(owner, nn.LayerNorm(D))
    return lambda h, _: norm(made(h.flatten(0, 1))).view(h.shape)


@step
def time_major(owner: nn.Module) -> Step:
    made = linear(owner)
    return lambda h, _: made(h.transpose(0, 1)).transpose(0, 1)


@step
def by_time(owner: nn.Module) -> Step:
    made = linear(owner)
    return lambda h, _: torch.stack([made(h[:, t]) for t in range(T)], 1)


@step
def by_example(owner: nn.Module) -> Step:
    made = linear(owner)
    return lambda h, _: torch.stack([made(example) for example in h])


@step
def in_halves(owner: nn.Module) -> Step:
    made = linear(owner)
    return lambda h, _: torch.cat([made(h[: len(h) // 2]), made(h[len(h) // 2 :])])


@step
def backwards(owner: nn.Module) -> Step:
    made = linear(owner)
    return lambda h, _: made(h.flip(0)).flip(0)


@step
def sorted_by_length(owner: nn.Module) -> Step:
    made = linear(owner)

    def run(h: Tensor, batch: Batch) -> Tensor:
        order = batch["mask"].sum(1).argsort()
        return made(h[order])[order.argsort()]

    return run


@step
def permuted_by_product(owner: nn.Module) -> Step:
    made = linear(owner)

    def run(h: Tensor, batch: Batch) -> Tensor:
        matrix = F.one_hot(batch["ids"][:, 0].argsort(), len(h)).float()
        return (matrix.T @ made((matrix @ h.flatten(1)).view(h.shape)).flatten(1)).view(h.shape)

    return run


@step
def repeated(owner: nn.Module) -> Step:
    made = linear(owner)
    return lambda h, _: made(h.repeat_interleave(2, 0)).unflatten(0, (-1, 2)).mean(1)


@step
def selected_again(owner: nn.Module) -> Step:
    made = linear(owner)

    def run(h: Tensor, _: Batch) -> Tensor:
        places = torch.arange(len(h)).repeat(2)
        both = made(h.index_select(0, places))
        return both[: len(h)] + both[len(h) :].tanh()

    return run
