"""Queries are asked of the model as it is, and features of queries are of the bank that is asked."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from problems import source
from torch import nn
from torch.utils.data import TensorDataset

import source_proj as sp

OTHERS = {
    "parameters": {"parameters": ["0.*"]},
    "weights of parameters": {"parameter_weights": {"0.*": 0.1}},
    "numbers": {"autocast": "bfloat16"},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_features_of_another_bank_are_refused(blobs, tmp_path, options):
    """Of the same weights and sketch, but of other gradients."""
    problem, bank = blobs
    other = source(problem, problem.build(tmp_path / "other", sketch=bank.sketch, **options))
    method = source(problem, bank)
    for one, two in ((method, other), (other, method)):
        features = one.sketch(problem.queries)
        features.save(tmp_path / "f", overwrite=True)
        for given in (features, sp.QueryFeatures.load(tmp_path / "f")):
            with pytest.raises(sp.MismatchError, match=r"are not the bank's in (parameters|autocast)"):
                two.score(given)
            assert np.array_equal(one.score(given).values, one.score(problem.queries).values)


def test_features_of_another_measurement_are_refused(blobs):
    problem, bank = blobs
    plain, said = source(problem, bank), source(problem, bank, task=sp.Classification(target="predicted"))
    with pytest.raises(sp.MismatchError, match="are not the bank's in measurement"):
        said.score(plain.sketch(problem.queries))


class Configured(nn.Module):
    """Reads what a configuration says, which nothing of torch's knows."""

    def __init__(self, config):
        super().__init__()
        self.layer, self.config = nn.Linear(4, 3), config

    def forward(self, x):
        config = self.config
        return self.layer(x) * (config.inner.scale if hasattr(config, "inner") else config["scale"][0])


CONFIGS = {
    "an object in an object": (
        lambda: SimpleNamespace(inner=SimpleNamespace(scale=1.0)), lambda c: setattr(c.inner, "scale", 2.0)
    ),
    "an array in a dict": (lambda: {"scale": np.ones(3)}, lambda c: c["scale"].__imul__(2.0)),
    "a list in a dict": (lambda: {"scale": [1.0]}, lambda c: c["scale"].__setitem__(0, 2.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_that_was_changed_is_seen(tmp_path, name):
    torch.manual_seed(0)
    make, change = CONFIGS[name]
    model = Configured(make())
    train = TensorDataset(torch.randn(20, 4), torch.randint(3, (20,)))
    queries = TensorDataset(torch.randn(3, 4), torch.randint(3, (3,)))
    run = sp.Trajectory([sp.Checkpoint(model.state_dict(), step=10, lr=0.1)])
    bank = sp.build(model, sp.Classification(), run, train, tmp_path / "bank", sketch=sp.Sketch(8), progress=False)
    method = sp.Source(bank, model=model, progress=False)
    before = method.score(queries).values
    assert np.array_equal(method.score(queries).values, before)
    change(model.config)
    after = method.score(queries).values
    assert not np.array_equal(after, before)
    assert np.array_equal(after, sp.Source(bank, model=model, progress=False).score(queries).values)


class Refusing:
    @property
    def __dict__(self):
        raise RuntimeError("not to be looked into")


@pytest.mark.parametrize(
    "held", [np, Refusing(), globals(), threading.Lock()], ids=["module", "refusing", "names", "lock"]
)
def test_whatever_a_model_holds_queries_are_asked(tmp_path, held):
    model = nn.Linear(4, 3)
    model.held = held
    train = TensorDataset(torch.randn(20, 4), torch.randint(3, (20,)))
    run = sp.Trajectory([sp.Checkpoint(model.state_dict(), step=10, lr=0.1)])
    bank = sp.build(
        nn.Linear(4, 3), sp.Classification(), run, train, tmp_path / "b", sketch=sp.Sketch(8), progress=False
    )
    method = sp.Source(bank, model=model, progress=False)
    assert np.isfinite(method.score(train).values).all()


def test_a_device_that_is_not_there_is_refused_at_once(blobs):
    problem, bank = blobs
    with pytest.raises(ValueError, match=r"device 'xyz' cannot be used here"):
        source(problem, bank, device="xyz")
