"""Captured runs that are killed, go on, or are of several processes end with the rows of one that was left alone."""

import gc
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from captured_runs import (
    Twin,
    batches_of,
    data_for,
    example_gradients,
    loss_of,
    mlp,
    rows_of,
    sampled_gradients,
    size_of,
    train,
)
from killed_programs import kill_at_random
from preloaded import preloaded
from torch import nn

import source_proj as sp
from source_proj.bank.capture.sums import SegmentSums

SETTING = {"steps": 40, "every": 4, "segment_ends": [16], "examples": 12}


@pytest.fixture(scope="module", params=[0, 3], ids=["empirical Fisher", "labels drawn"])
def setting(request):
    return {**SETTING, "draw_every": request.param}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, setting):
    recorder = train(tmp_path_factory.mktemp("whole") / "run", **setting)
    return recorder.bank(storage="float32"), recorder._model.state_dict()


def same(recorder, uninterrupted):
    bank = recorder.bank(storage="float32")
    state = recorder._model.state_dict()
    return (
        all(torch.equal(state[name], value) for name, value in uninterrupted[1].items())
        and all(torch.equal(rows_of(bank, s), rows_of(uninterrupted[0], s)) for s in (0, 1))
        and bank.trajectory.curvatures == uninterrupted[0].trajectory.curvatures
    )


def test_a_run_that_is_left_and_taken_up_again(tmp_path, uninterrupted, setting):
    for until in (2, 7, 16, 18):
        train(tmp_path / "run", **{**setting, "steps": until}).close()
    recorder = train(tmp_path / "run", **setting)
    kept = sorted(file.name for file in (tmp_path / "run").glob("capture_*"))
    assert kept == ["capture_00000016.pt", "capture_00000040.pt"]
    assert same(recorder, uninterrupted)


IMPORTS = f"""
import signal, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
torch.set_num_threads(1)
from captured_runs import train
"""


def test_killed_at_random_moments(tmp_path, uninterrupted, setting):
    """SIGKILL in the middle of anything; each new process goes on; the last one ends with the same rows and weights."""
    work = f"train({str(tmp_path / 'run')!r}, pause=lambda: time.sleep(0.01), **{setting!r})\nsignal.pause()"
    kill_at_random(IMPORTS, work, 2, within=(0.05, 0.5))
    assert same(train(tmp_path / "run", **setting), uninterrupted)


class Killed(BaseException):
    """Stands for a SIGKILL at one exact place."""


@pytest.mark.parametrize("call", [2, 5, 8, 9, 14, 17, 18, 23])
def test_killed_where_files_change(tmp_path, uninterrupted, monkeypatch, call, setting):
    """The process dies just before or after the n-th file gets its name."""
    count, real = 0, os.replace

    def replace(source, target):
        nonlocal count
        count += 1
        if count == (call + 1) // 2 and call % 2:
            raise Killed
        real(source, target)
        if count == (call + 1) // 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            train(tmp_path / "run", **setting)
    assert same(train(tmp_path / "run", **setting), uninterrupted)


def test_a_capture_of_another_sketch_or_none_is_not_gone_on_with(tmp_path):
    train(tmp_path / "run").close()
    with pytest.raises(sp.MismatchError, match="sketch of the recorded capture"):
        train(tmp_path / "run", capture=sp.Sketch(16))
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sp.Recorder(model, optimizer, tmp_path / "plain", every=1).close()
    plain = sp.Recorder(model, optimizer, tmp_path / "plain", every=1)
    optimizer.step()
    plain.step()
    plain.close()
    again = sp.Recorder(
        model, optimizer, tmp_path / "plain", every=1, capture=sp.Sketch(8), task=sp.Classification()
    )  # fmt: skip
    with pytest.raises(sp.MismatchError, match="recorded without capture="):
        again.restore()


def test_a_capture_of_an_older_version_is_told_from_a_damaged_one(tmp_path, monkeypatch):
    content = SegmentSums.content
    monkeypatch.setattr(SegmentSums, "content", lambda self: {k: v for k, v in content(self).items() if k != "passes"})
    train(tmp_path / "run").close()
    with pytest.raises(sp.MismatchError, match="recorded by an older version"):
        train(tmp_path / "run")


def worker(rank, folder, draw_every):
    """Train until step 5 and stop, then go on from what the files hold."""
    torch.set_num_threads(1)
    for until in (5, 8):
        session(rank, folder, until, draw_every)


def session(rank, folder, until, draw_every):
    store = dist.FileStore(str(folder / f"store-{until}"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(rank)  # DDP gives all the first one's weights
    model = mlp()
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    inputs, labels = data_for(model, 12)
    recorder = sp.Recorder(
        model, optimizer, folder / "run", every=3, capture=sp.Sketch(size_of(model), "identity"),
        task=sp.Classification(), draw_every=draw_every,
    )  # fmt: skip
    start = recorder.restore()
    for index in batches_of(12, 4, 8)[start:until]:
        own = index[2 * rank : 2 * rank + 2]
        optimizer.zero_grad()
        loss_of(parallel, inputs[own], labels[own], told=draw_every > 0).backward()
        optimizer.step()
        recorder.step(ids=own)
    if until == 8:
        bank = recorder.bank(storage="float32")
        assert bank.finalized
    recorder.close()
    dist.barrier()
    del parallel  # first: where its reducer holds the group last, torch joins a thread that waits for the GIL
    gc.collect()
    dist.destroy_process_group()


@pytest.mark.parametrize("draw_every", [0, 2])
def test_two_processes_capture_what_one_would_have(tmp_path, draw_every):
    """Each its own half of every batch, stopped between checkpoints and taken up again."""
    preloaded()
    torch.multiprocessing.start_processes(worker, (tmp_path, draw_every), nprocs=2, start_method="forkserver")
    bank = sp.open(tmp_path / "run" / "bank")
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    inputs, labels = data_for(model, 12)
    twin, factors = Twin(12, size_of(model)), []
    for step, index in enumerate(batches_of(12, 4, 8)):
        twin.add(index, example_gradients(model, inputs[index], labels[index]), 0.1)
        if draw_every and step % draw_every == 0:
            halves = enumerate(index.split(2))
            factors += [
                sampled_gradients(model, inputs[own], labels[own], step // draw_every, rank) for rank, own in halves
            ]
        optimizer.zero_grad()
        loss_of(model, inputs[index], labels[index]).backward()
        optimizer.step()
    expected = twin.bank_rows()
    assert float((rows_of(bank) - expected).norm()) <= 1e-5 * float(expected.norm())
    curvature = bank.stages[0].captured_curvature(0)[0]
    drawn = torch.cat(factors) if draw_every else None
    expected = twin.bank_curvature() if drawn is None else drawn.T @ drawn / len(drawn)
    assert float((curvature - expected).norm()) <= 1e-5 * float(curvature.norm())
    assert [point.step for point in bank.query_points()] == [3, 6, 8]
