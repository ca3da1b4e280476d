"""A small classifier's run and its bank, with copies and wrong labels in the training set."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import source_proj as sp

COPIES = {40: 3, 41: 3, 42: 17}  # position of each copy, and of what it copies


@pytest.fixture(scope="package")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 5, generator=generator)
    labels = (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0.5).long()
    for copy, original in COPIES.items():
        inputs[copy], labels[copy] = inputs[original], labels[original]
    train_set = TensorDataset(inputs[:44], labels[:44])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = sp.Recorder(model, optimizer, folder / "run", every=20)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[:44]), labels[:44]).backward()
        optimizer.step()
        recorder.step()
    bank = sp.build(
        model, sp.Classification(), recorder.trajectory(), train_set, folder / "bank", sketch=sp.Sketch(dim=128),
        storage="float32", batch_size=11, progress=False,
    )  # fmt: skip
    queries = TensorDataset(inputs[44:], labels[44:])
    source = sp.Source(bank, model=model, progress=False)
    return SimpleNamespace(
        copies=COPIES, model=model, bank=bank, source=source, train_set=train_set, queries=queries, labels=labels[:44]
    )
