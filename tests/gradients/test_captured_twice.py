"""Two captures of one model at a time."""

import pytest
import torch
from torch import nn

import source_proj as sp
from source_proj.gradients import ParameterSpace
from source_proj.gradients.training import TrainingPath


def path_of(model):
    space = ParameterSpace.from_model(model)
    return TrainingPath(model, space, sp.Sketch(space.size, "identity"))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(3, 2, batch_first=True)

    def forward(self, x):
        return self.layer(x)[0].sum(1)


def test_modules_that_are_opened_are_captured_by_one_at_a_time():
    """The first pass would end with one that took the other's taps for a fault of the model."""
    model = Recurrent()
    first = path_of(model)
    with pytest.raises(sp.GradientError, match=r"another Recorder .* call its close\(\) first"):
        path_of(model)
    first.close()
    second = path_of(model)
    model(torch.randn(4, 5, 3, device="cpu", dtype=torch.float32)).sum().backward()
    assert not first.passes
    expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    torch.testing.assert_close(second.passes[0].rows.sum(0), expected)


def test_plain_layers_are_captured_by_several():
    model = nn.Linear(3, 2)
    paths = [path_of(model), path_of(model)]
    model(torch.randn(4, 3, device="cpu", dtype=torch.float32)).sum().backward()
    torch.testing.assert_close(paths[0].passes[0].rows, paths[1].passes[0].rows)
