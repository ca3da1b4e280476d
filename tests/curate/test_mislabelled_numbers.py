"""Wrong targets of a regression: numbers are no classes, even where some are there twice."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import source_proj as sp
from source_proj import curate

N, WRONG = 200, 12


@pytest.fixture(scope="module")
def regression(tmp_path_factory):
    """A trained network, its bank, its targets, of which some were changed, and which."""
    folder, generator = tmp_path_factory.mktemp("regression"), torch.Generator().manual_seed(3)
    x = torch.randn(N, 5, generator=generator)
    y = (x @ torch.randn(5, generator=generator) * 5).round() / 5  # many of them several times
    wrong = torch.randperm(N, generator=generator)[:WRONG]
    y[wrong] = -y[wrong] + 4 * torch.sign(-y[wrong])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    recorder = sp.Recorder(model, optimizer, folder / "run", every=100)
    for _ in range(300):
        batch = torch.randint(N, (32,), generator=generator)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[batch])[:, 0], y[batch]).backward()
        optimizer.step()
        recorder.step()
    data = TensorDataset(x, y)
    bank = sp.build(
        model, sp.Regression(), recorder.trajectory(), data, folder / "bank", sketch=sp.Sketch(64), progress=False
    )
    return sp.Source(bank, progress=False), y, set(wrong.tolist())


@pytest.mark.parametrize("by", ["error", "self_influence"])
def test_wrong_targets_are_found_among_all(regression, by):
    source, y, wrong = regression
    values = np.asarray(source.self_influence()) if by == "self_influence" else None
    named = curate.mislabelled(source, y, by=by)
    assert len(wrong & set(named.ids)) >= WRONG - 3
    ranked = curate.mislabelled(source, y, n=WRONG, by=by)
    assert ranked.ids == named.ids[:WRONG]
    for rank, (reason, place) in enumerate(zip(named.reasons, named.ids, strict=True), start=1):
        assert reason.startswith(f"labelled {float(y[place]):.4g}, it")
        assert reason.endswith(f"rank {rank} of {N}")
    if values is not None:
        assert named.ids == np.argsort(-values, kind="stable")[: len(named)].tolist()


def test_no_class_disagrees_about_a_number(regression):
    source, y, _ = regression
    with pytest.raises(ValueError, match="labels are numbers, and no class disagrees"):
        curate.mislabelled(source, y, by="disagreement")
