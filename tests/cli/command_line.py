"""A module of a user, and the commands that build and ask a bank from it."""

MODULE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

import source_proj as sp

generator = torch.Generator().manual_seed(0)
inputs = torch.randn(48, 5, generator=generator)
labels = (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long()
ready = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))

def other_model():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))

def train_set():
    return TensorDataset(inputs[:40], labels[:40])

def by_stage():
    return {"train": train_set()}

def queries():
    return TensorDataset(inputs[40:43], labels[40:43])

def plain():
    return inputs[40:43]

def narrow():
    return TensorDataset(inputs[40:43, :3], labels[40:43])

def broken():
    values = inputs[:40].clone()
    values[7] = float("nan")
    return TensorDataset(values, labels[:40])

def trajectory():
    return sp.Trajectory.from_recorder("run", segments=[[0], [1, 2]])

def margin():
    built_in = sp.Classification()
    return sp.Task(
        output=built_in.output, loss_derivatives=built_in.loss_derivatives, unit="margin", higher_is_better=True,
        name="margin",
    )
"""

ARGUMENTS = ["--model", "mine:model", "--data", "mine:train_set", "--recorder", "run", "--batch-size", "8"]
ARGUMENTS += ["--sketch-dim", "64", "--segments", "2", "--shard-rows", "16", "--no-progress"]
BUILD = ["build", "bank", *ARGUMENTS]
ASK = ["--model", "mine:model", "--queries", "mine:queries", "--no-progress"]
