"""Ten thousand questions about 20,000 pictures to one Parquet file; ``--data FOLDER`` says where Fashion-MNIST is."""

import argparse

import torch
from _data import add_data_option, load_images
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import source_proj as sp

parser = argparse.ArgumentParser(description=__doc__)
add_data_option(parser)
parser.add_argument("--queries", type=int, default=10_000, help="pictures of the test set that are asked about")
options = parser.parse_args()
train_set, queries = (
    TensorDataset(*(part[:count] for part in load_images(options.data, "fashion_mnist", split)))
    for split, count in (("train", 20_000), ("t10k", options.queries))
)
model = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
recorder = sp.Recorder(model, optimizer, "run", every=500)
for inputs, targets in (batch for _ in range(3) for batch in DataLoader(train_set, 64, shuffle=True, drop_last=True)):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    recorder.step()
bank = sp.build(model, sp.Classification(), recorder.trajectory(), train_set, "bank", sketch=sp.Sketch(1024))
print(sp.Source(bank, model=model).top_k(queries, k=10, out="strongest.parquet"))
