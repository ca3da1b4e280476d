"""The README's ten lines, run: which training digits made a network answer as it does?

Runs in seconds: ``python examples/quickstart.py``.
"""

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import source_proj as sp

# What you have already: data, a model, an optimizer, and a directory to write to.
torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
digits = TensorDataset(torch.from_numpy(pixels / 16).float(), torch.from_numpy(labels))
train_set, queries = Subset(digits, range(1500)), Subset(digits, range(1500, 1510))
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
batches = [batch for _ in range(10) for batch in DataLoader(train_set, batch_size=64, shuffle=True)]
folder = Path(tempfile.mkdtemp())

recorder = sp.Recorder(model, optimizer, folder / "run", every=60)
for inputs, targets in batches:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    recorder.step()
bank = sp.build(model, sp.Classification(), recorder.trajectory(), train_set, folder / "bank", sketch=sp.Sketch(1024))
source = sp.Source(bank, model=model)
print(source.helpful(queries, k=3))
print(source.harmful(queries, k=3))
