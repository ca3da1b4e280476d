"""States without names: the model's order passes, and another one of equal shapes is refused by what gradients are."""

import random

import pytest
import torch
from torch import nn

import source_proj as sp
from source_proj.trajectory.optimizers.describe import describe_live

KINDS = [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adam]


def trained(seed, order):
    """A random network, trained by an optimizer that holds its layers in an order; its trajectory and data."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    width, act = draw.choice([8, 12]), draw.choice([nn.Tanh, nn.ReLU])
    layers = [nn.Linear(width, width) for _ in range(draw.choice([2, 3]))]
    model = nn.Sequential(*(part for layer in layers for part in (layer, act())), nn.Linear(width, 3))
    held = [*order(layers), model[-1]]
    kind = draw.choice(KINDS)
    optimizer = kind([p for layer in held for p in layer.parameters()], lr=1e-2)
    inputs, labels = torch.randn(48, width) * torch.rand(width), torch.randint(0, 3, (48,))
    for _ in range(draw.choice([5, 40])):
        chosen = torch.randint(0, 48, (8,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[chosen]), labels[chosen]).backward()
        optimizer.step()
    checkpoint = sp.Checkpoint(model.state_dict(), 10, 1e-2, optimizer.state_dict())
    run = sp.Trajectory([checkpoint], describe_live(optimizer, model))
    return model, run, torch.utils.data.TensorDataset(inputs, labels)


def build(path, model, run, data):
    return sp.build(model, sp.Classification(), run, data, path, sketch=sp.Sketch(dim=8), progress=False)


@pytest.mark.parametrize("seed", range(8))
def test_the_models_order_passes(tmp_path, seed):
    build(tmp_path / "bank", *trained(seed, lambda layers: layers))


@pytest.mark.parametrize("seed", range(8))
def test_another_order_is_refused_by_name(tmp_path, seed):
    with pytest.raises(sp.MismatchError, match=r"the other way round .*model.named_parameters\(\)"):
        build(tmp_path / "bank", *trained(seed, lambda layers: layers[1:] + layers[:1]))
    assert not (tmp_path / "bank" / "zarr.json").exists()
