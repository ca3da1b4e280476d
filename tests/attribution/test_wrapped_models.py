"""A model is the same one within DataParallel and torch.compile, for banks, queries and their parameters' names."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import TensorDataset

import source_proj as sp
from source_proj.trajectory.placement import unwrapped


class OptimizedModule(nn.Module):
    """Names as torch.compile makes them, without its half minute of imports."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model

    def forward(self, x):
        return self._orig_mod(x)


def plain(model):
    return model


def both(model):
    return nn.DataParallel(OptimizedModule(model))


WRAPPERS = [plain, nn.DataParallel, AveragedModel, OptimizedModule, both]


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def data(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 3, generator=generator), torch.randint(0, 2, (n,), generator=generator))


def trajectory(wrap=plain):
    return sp.Trajectory([sp.Checkpoint(wrap(network(s)).state_dict(), step=5 * s, lr=0.1) for s in (1, 2, 3)])


OPTIONS = {"sketch": sp.Sketch(16), "storage": "float32", "progress": False}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "bank"
    bank = sp.build(network(), sp.Classification(), trajectory(), data(20), path, **OPTIONS)
    return bank, np.asarray(sp.Source(bank, model=network(), progress=False).score(data(4, 1)))


@pytest.mark.parametrize("built", WRAPPERS)
@pytest.mark.parametrize("asked", WRAPPERS)
def test_a_bank_built_with_one_is_asked_with_another(tmp_path, reference, built, asked):
    bank = sp.build(built(network()), sp.Classification(), trajectory(built), data(20), tmp_path / "bank", **OPTIONS)
    assert bank.fingerprint == reference[0].fingerprint or built is not plain
    scores = sp.Source(bank, model=asked(network()), progress=False).score(data(4, 1))
    assert np.array_equal(np.asarray(scores), reference[1])


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_all_that_takes_a_model_takes_the_one_within(tmp_path, reference, wrap):
    bank = sp.build(network(), sp.Classification(), trajectory(), data(20), tmp_path / "bank", **OPTIONS)
    asked = {"model": wrap(network()), "train_set": data(20), "progress": False}
    plainly = {**asked, "model": network()}
    assert np.array_equal(*(np.asarray(sp.RepSim(bank, **each).score(data(4, 1))) for each in (asked, plainly)))
    bank.append(wrap(network()), sp.Classification(), data(6, 2), progress=False)
    assert np.asarray(sp.GradDot(bank, model=wrap(network()), progress=False).score(data(4, 1))).shape == (4, 26)


def test_a_class_derived_from_a_wrapper_is_left_as_it_is():
    class Halved(nn.DataParallel):
        def forward(self, x):
            return super().forward(x) / 2

    wrapped = Halved(network())
    assert unwrapped(wrapped) is wrapped
    assert unwrapped("model") == "model"


def test_what_torch_compile_returns_is_unwrapped():
    model = network()
    assert unwrapped(torch.compile(model, backend="eager")) is model
