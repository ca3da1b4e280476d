import importlib
import time
from dataclasses import asdict

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import source_proj as sp

module = importlib.import_module("source_proj.distribute.plan")  # whose name the function has too

N = 400


def make(n=N):
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(n, 20, generator=generator), torch.randint(0, 3, (n,), generator=generator)
    return TensorDataset(inputs, labels)


def run(checkpoints=2, width=30):
    def model():
        return nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, 3))

    return model(), sp.Trajectory([sp.Checkpoint(model().state_dict(), step=s + 1, lr=0.1) for s in range(checkpoints)])


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "_TRIALS", 1)


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tempfile.tempdir", str(folder))
        patched.setattr(module, "_TRIALS", 1)
        model, trajectory = run()
        options = {"sketch": sp.Sketch(dim=64), "batch_size": 10, "workers": 3, "shard_rows": 50}
        made = sp.plan(model, sp.Classification(), trajectory, make(), **options)
    assert list(folder.iterdir()) == []
    return made


def test_what_can_be_counted_is_exact(planned, tmp_path):
    model, trajectory = run()
    options = {"sketch": sp.Sketch(dim=64), "batch_size": 10, "shard_rows": 50, "progress": False}
    bank = sp.build(model, sp.Classification(), trajectory, make(), tmp_path / "bank", **options)
    assert (planned.examples, planned.passes) == (N, 2)
    assert planned.batches == 2 * 40
    assert planned.shards == sum(part.spec.n_shards * part.n_checkpoints for part in bank.parts) == 16
    assert planned.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert planned.bytes["rows"] == 2 * N * 64
    assert planned.bytes["marks"] < bank.nbytes()["marks"] < 1.5 * planned.bytes["marks"] + 1000


def test_a_stage_and_a_draw_are_passes_of_their_own():
    model, trajectory = run(3)
    data = DataLoader(make(), batch_size=20)
    planned = sp.plan(model, sp.Classification(), trajectory, data, sketch=sp.Sketch(dim=8), sampled_fisher=2)
    assert planned.passes == 3 * 3
    assert planned.batches == 3 * 20
    assert planned.bytes["rows"] == 3 * N * 8 * 3


def test_time_is_that_of_its_parts(planned):
    assert planned.seconds == pytest.approx(sum(planned.parts.values()))
    assert planned.seconds_each == pytest.approx(planned.seconds / 3)
    assert planned.parts[planned.dominates] == max(planned.parts.values())
    assert all(value >= 0 for value in planned.parts.values())
    assert planned.dominates in str(planned)


def test_sizes_that_are_suggested_fit():
    model, trajectory = run()
    task, data = sp.Classification(), make()
    largest = sp.plan(model, task, trajectory, data, batch_size=10, sketch=sp.Sketch(dim=64))
    assert largest.parameters < largest.dim <= 2 * largest.parameters
    small = sp.plan(model, task, trajectory, data, batch_size=10, disk=200_000, workers=40, sketch=sp.Sketch(dim=64))
    assert 2 * N * small.dim <= 200_000 < 2 * N * 2 * small.dim + 2 * N * 20
    assert small.shard_rows == 10  # else some of 40 workers would have nothing to do
    assert small.checkpoints == 2


@pytest.mark.parametrize("workers", [0, -1, True, 1.5])
def test_workers_that_are_no_number_are_refused(workers):
    model, trajectory = run()
    with pytest.raises(ValueError, match="workers must be a number of at least 1"):
        sp.plan(model, sp.Classification(), trajectory, make(), workers=workers)


def test_planned_and_real_time(tmp_path):
    """Of one order of magnitude on any machine, however busy; prints the ratio."""
    model, trajectory = run(width=400)
    options = {"sketch": sp.Sketch(dim=512), "batch_size": 50, "shard_rows": 500}
    data = make(4000)
    planned = sp.plan(model, sp.Classification(), trajectory, data, **options)
    start = time.perf_counter()
    sp.build(model, sp.Classification(), trajectory, data, tmp_path / "bank", progress=False, **options)
    ratio = planned.seconds / (time.perf_counter() - start)
    print(f"planned over real time: {ratio:.2f}; {asdict(planned)}")
    assert 0.1 < ratio < 10
