"""Steps of random models in which parameters meet the examples outside of layers, or layers see no batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from random_steps import VOCABULARY, Batch, D, Step, T, layer, linear, step
from torch import Tensor, nn

__all__ = ["BARE"]

HEADS = 2


def parameter(owner: nn.Module, *shape: int) -> nn.Parameter:
    made = nn.Parameter(torch.randn(shape) / 2)
    owner.register_parameter(f"parameter_{len(owner._parameters)}", made)
    return made


def heads_of(h: Tensor) -> Tensor:
    """(B, T, D) → (B, heads, T, D / heads)."""
    return h.unflatten(-1, (HEADS, -1)).transpose(1, 2)


@step
def class_token(owner: nn.Module) -> Step:
    token, places = parameter(owner, 1, 1, D), parameter(owner, 1, T + 1, D)
    return lambda h, _: (torch.cat([token.expand(len(h), -1, -1), h], 1) + places)[:, 1:].cumsum(1)


@step
def bias_by_distance(owner: nn.Module) -> Step:
    table = layer(owner, nn.Embedding(2 * T, HEADS))

    def run(h: Tensor, _: Batch) -> Tensor:
        places = torch.arange(T)
        bias = table(places[:, None] - places[None] + T).permute(2, 0, 1)[None]
        x = heads_of(h)
        return (((x @ x.mT + bias).softmax(-1)) @ x).transpose(1, 2).flatten(2)

    return run


@step
def mlp_of_places(owner: nn.Module) -> Step:
    inside, outside = layer(owner, nn.Linear(1, 3)), layer(owner, nn.Linear(3, T))

    def run(h: Tensor, _: Batch) -> Tensor:
        mixing = outside(inside(torch.linspace(-1, 1, T)[:, None]).relu()).softmax(-1)
        return mixing.T @ h

    return run


@step
def layer_for_both(owner: nn.Module) -> Step:
    made = linear(owner)
    return lambda h, _: made(h) * made(torch.linspace(-1, 1, T * D).view(T, D)).mean(0)


@step
def contracted(owner: nn.Module) -> Step:
    inside, outside = parameter(owner, D, HEADS, 3), parameter(owner, HEADS, 3, D)
    scale = parameter(owner, T, D)

    def run(h: Tensor, _: Batch) -> Tensor:
        x = torch.einsum("btd,dhe->bhte", h, inside).tanh()
        return torch.einsum("bhte,hed->btd", x, outside) + torch.einsum("...td,td->...d", h, scale)[:, None]

    return run


@step
def looked_up(owner: nn.Module) -> Step:
    rows, pairs = parameter(owner, VOCABULARY, D), parameter(owner, VOCABULARY, 2, D)

    def run(h: Tensor, batch: Batch) -> Tensor:
        chosen = pairs[batch["ids"], batch["mask"].long()]
        return h * rows.sigmoid()[batch["ids"]] + chosen + F.embedding(batch["ids"], rows.exp(), 0)

    return run


@step
def from_the_left(owner: nn.Module) -> Step:
    mixing, matrices, vector = parameter(owner, T, T), parameter(owner, HEADS, D // HEADS, 2), parameter(owner, T)

    def run(h: Tensor, _: Batch) -> Tensor:
        x = mixing.softmax(-1) @ h
        by_head = (heads_of(x) @ matrices).transpose(1, 2).flatten(2)
        return by_head + (vector @ h)[:, None]

    return run


@step
def made_kernel(owner: nn.Module) -> Step:
    kernel, bias = parameter(owner, D, D // 2, 3), parameter(owner, D)

    def run(h: Tensor, _: Batch) -> Tensor:
        flat = kernel.flatten(1)
        standard = ((flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + 0.1)).view_as(kernel)
        return F.conv1d(h.mT, standard, bias, padding=1, groups=2).mT

    return run


@step
def repeated_table(owner: nn.Module) -> Step:
    table = parameter(owner, HEADS, D // HEADS, D // HEADS)

    def run(h: Tensor, _: Batch) -> Tensor:
        x = heads_of(h).flatten(0, 1)
        return torch.bmm(x, table.repeat(len(h), 1, 1)).unflatten(0, (-1, HEADS)).transpose(1, 2).flatten(2)

    return run


BARE = """
    bias_by_distance class_token contracted from_the_left layer_for_both looked_up made_kernel mlp_of_places
    raw repeated_table
"""
