"""Banks of mean rows, condensed or captured: what curation says of them is what it says of their checkpoints."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import source_proj as sp
from source_proj import curate


@pytest.mark.parametrize("segments", [1, 2, 3])
def test_a_condensed_bank_disagrees_as_the_bank_that_it_was_made_of(tmp_path, segments):
    generator = torch.Generator().manual_seed(segments)
    inputs = torch.randn(30, 5, generator=generator)
    labels = (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0.5).long()
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    points = []
    for step in range(1, 61):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        if step % 10 == 0:
            state = {name: value.clone() for name, value in model.state_dict().items()}
            points.append(sp.Checkpoint(state, step, lr=0.2))
    run = sp.Trajectory(points, sp.SGD(), segments=segments)
    bank = sp.build(
        model, sp.Classification(), run, TensorDataset(inputs, labels), tmp_path / "bank", sketch=sp.Sketch(64),
        storage="float32", progress=False,
    )  # fmt: skip
    condensed = sp.condense(bank, tmp_path / "condensed", progress=False)
    assert condensed.stages[0].n_checkpoints == segments
    plain, mean = (
        curate.mislabelled(sp.Source(each, model=model, progress=False), labels, n=29, by="disagreement")
        for each in (bank, condensed)
    )
    expected = dict(zip(plain.ids, plain.values["disagreement"], strict=True))
    largest = max(map(abs, expected.values()))
    common = [its_id for its_id in mean.ids if its_id in expected]  # both leave one out, of which rounding decides
    assert len(common) >= 28
    found = dict(zip(mean.ids, mean.values["disagreement"], strict=True))
    np.testing.assert_allclose([found[i] for i in common], [expected[i] for i in common], atol=1e-4 * largest)
    copies = [curate.near_duplicates(each, threshold=0.9, progress=False) for each in (bank, condensed)]
    assert all(set(each.ids) <= set(range(30)) for each in copies)


def test_a_captured_bank_says_which_class_each_example_harms(tmp_path):
    torch.manual_seed(0)
    inputs = torch.randn(40, 5)
    labels = (inputs[:, 0] > 0).long()
    labels[:4] = 1 - labels[:4]
    data = sp.IndexedDataset(TensorDataset(inputs, labels))
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    recorder = sp.Recorder(
        model, optimizer, tmp_path / "run", every=10, capture=sp.Sketch(64), task=sp.Classification(), examples=40
    )
    for _ in range(20):
        for ids, (x, y) in DataLoader(data, batch_size=20, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            recorder.step(ids=ids)
    source = sp.Source(recorder.bank(), model=model, progress=False)
    named = curate.mislabelled(source, labels, n=4, by="disagreement")
    assert len(set(named.ids) & set(range(4))) >= 3
    assert (named.values["rival"] == 1 - labels[named.ids].numpy()).all()
