"""A CSV file cleaned of likely wrong labels, and the cleaning verified by retraining."""

import pandas as pd
import torch
from torch import Tensor, nn

import source_proj as sp

train_set, test_set = (torch.tensor(pd.read_csv(f"{name}.csv").to_numpy()).float() for name in ("train", "test"))


def train(kept: Tensor, seed: int, record: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(train_set.shape[1] - 1, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = sp.Recorder(model, optimizer, "run", every=50).step if record else optimizer.zero_grad
    for rows in train_set[torch.as_tensor(kept)[torch.randint(len(kept), (200, 32))]]:  # labels are the last column
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(rows[:, :-1]), rows[:, -1].long()).backward()
        optimizer.step()
        step()
    return model


model, table = train(torch.arange(len(train_set)), seed=0, record=True), pd.read_csv("train.csv")
bank = sp.build(model, sp.Classification(), sp.Trajectory.from_recorder("run"), table, "bank", sketch=sp.Sketch(1024))
cleaning = sp.curate.mislabelled(sp.Source(bank), table["label"])
cleaning.write("train.csv", "train-clean.csv")
print(sp.curate.verify(cleaning, train, lambda m: (m(test_set[:, :-1]).argmax(1) == test_set[:, -1]).float().mean()))
