"""Small runs for the tests of the Recorder."""

import functools
import json
import time

import torch
from torch import nn
from torch.optim import lr_scheduler

from source_proj._io.json_records import write_record
from source_proj.trajectory import Recorder

STEPS = 40


def on_one_thread(function):
    """Threads that wait for each other take seconds over tiny models on a busy machine."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return run


@on_one_thread
def train(directory, until=STEPS, steps=STEPS, every=5, pause=0.0):
    """A run with momentum, a cosine schedule, dropout, batch norm, and batches drawn from torch's random state."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 3))
    data, labels = torch.randn(64, 4), torch.randint(3, (64,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    recorder = Recorder(model, optimizer, directory, every=every, at=[3], also=[scheduler])
    start = recorder.restore()
    for _ in range(start, until):
        index = torch.randint(64, (8,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[index]), labels[index]).backward()
        optimizer.step()
        scheduler.step()
        recorder.step()
        time.sleep(pause)
    return recorder, model, start


def described(run, directory=None):
    """The records of a run's stages, as JSON, without the directory that they lie in."""
    stages = json.dumps([write_record(stage.describe()) for stage in run.stages])
    return json.loads(stages.replace(str(directory), "DIR"))


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def advance(recorder):
    """One optimizer step, without gradients, and the recorder's."""
    recorder._optimizer.step()
    recorder.step()


def linear(lr=0.1, **settings):
    model = nn.Linear(2, 1)
    return model, torch.optim.SGD(model.parameters(), lr=lr, **settings)


def two_groups(**second):
    model = nn.Linear(2, 1)
    groups = [{"params": [model.weight]}, {"params": [model.bias], **second}]
    return model, torch.optim.SGD(groups, lr=0.1, momentum=0.5)


def recorded(directory, stage="train"):
    recorder = Recorder(*linear(), directory, every=1, stage=stage)
    advance(recorder)
    advance(recorder)
    return recorder
