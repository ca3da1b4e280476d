"""The time factor, against simulations of torch's own SGD."""

import json

import pytest
import torch

from source_proj.trajectory import SGD
from source_proj.trajectory.record import read_optimizer, write_optimizer

SETTINGS = [
    {},
    {"dampening": 0.5},
    {"momentum": 0.5},
    {"momentum": 0.9},
    {"momentum": 0.8, "dampening": 0.3},
    {"momentum": 0.7, "nesterov": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_time_factor_is_the_total_displacement_of_one_gradient(settings):
    """Two runs under a constant gradient, one with a pulse on top; the first gradient, undampened in torch, is past."""
    displaced = []
    for pulse in (0.0, 1.0):
        weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        optimizer = torch.optim.SGD([weight], lr=0.1, **settings)
        for step in range(400):
            weight.grad = torch.tensor(0.3 + (pulse if step == 3 else 0.0), dtype=torch.float64)
            optimizer.step()
        displaced.append(weight.item())
    assert displaced[0] - displaced[1] == pytest.approx(0.1 * SGD(**settings).time_factor, rel=1e-12)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_speed_under_a_constant_gradient(settings):
    """The steady speed of a constant gradient is lr · time_factor a step."""
    weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=0.1, **settings)
    before = 0.0
    for _ in range(500):
        before = weight.item()
        weight.grad = torch.ones((), dtype=torch.float64)
        optimizer.step()
    assert before - weight.item() == pytest.approx(0.1 * SGD(**settings).time_factor, rel=1e-11)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_description_round_trip(settings):
    optimizer = SGD(weight_decay=1e-3, **settings)
    assert read_optimizer(json.loads(json.dumps(write_optimizer(optimizer)))) == optimizer


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentum": 1.0}, "momentum must lie in.*1.0"),
        ({"momentum": -0.1}, "momentum must lie in.*-0.1"),
        ({"momentum": float("nan")}, "momentum must lie in.*nan"),
        ({"dampening": 1.0}, "dampening must lie in"),
        ({"weight_decay": -1.0}, "weight_decay must be finite.*-1.0"),
        ({"weight_decay": float("inf")}, "weight_decay must be finite"),
        ({"nesterov": True}, "Nesterov.*momentum=0.0"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "Nesterov.*dampening=0.1"),
    ],
)
def test_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        SGD(**settings)


def test_foreign_descriptions_are_refused():
    with pytest.raises(ValueError, match=r"its name is 'Nadam', and known optimizers are .*Adam"):
        read_optimizer({"name": "Nadam", "weight_decay": 0.0})
    with pytest.raises(ValueError, match="unknown entry 'betas'"):
        read_optimizer({**write_optimizer(SGD()), "betas": [0.9, 0.99]})
