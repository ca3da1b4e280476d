"""Runs and checkpoints from strangers, or from a bad disk: refused by name, with little memory, and no code run."""

import json
import os

import pytest
import torch
from recorded_runs import advance, linear, recorded
from torch import nn

from source_proj._errors import MismatchError, SourceProjError
from source_proj.trajectory import Adam, Checkpoint, Recorder, Trajectory, moments


@pytest.mark.parametrize("entry", ["stage", "trained", "resume", "checkpoints"])
def test_a_changed_record_is_refused(tmp_path, entry):
    recorded(tmp_path).close()
    file = tmp_path / "trajectory.json"
    content = json.loads(file.read_text())
    content[entry] = content[entry][:-1]
    file.write_text(json.dumps(content))
    with pytest.raises(MismatchError, match=r"trajectory.json.*not that of its digest: it was changed"):
        Trajectory.from_recorder(tmp_path)


def test_another_learning_rate_is_noticed(tmp_path):
    recorded(tmp_path).close()
    file = tmp_path / "trajectory.json"
    assert "[0.1, " in file.read_text()
    file.write_text(file.read_text().replace("[0.1, ", "[0.3, "))
    with pytest.raises(MismatchError, match="not that of its digest"):
        Trajectory.from_recorder(tmp_path)


def test_bits_of_weights_are_compared_when_they_are_read(tmp_path):
    recorded(tmp_path).close()
    file = tmp_path / "step_00000001.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(MismatchError, match=r"step_00000001.pt.*was recorded"):
        Trajectory.from_recorder(tmp_path)


def read_and_restored(directory):
    Trajectory.from_recorder(directory)
    return Recorder(*linear(), directory).restore()


@pytest.mark.parametrize("name", ["trajectory.json", "step_00000001.pt", "optimizer_00000002.pt", "recorder.lock"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "zeros", "loop"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, name, kind):
    recorded(tmp_path).close()
    path = tmp_path / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "zeros" else name)
    with pytest.raises(SourceProjError, match=name):
        read_and_restored(tmp_path)


def test_a_state_that_does_not_fit_what_is_trained(tmp_path):
    model, optimizer = linear()
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    recorder = Recorder(model, optimizer, tmp_path, every=1, also=[schedule])
    advance(recorder)
    recorder.close()
    model, optimizer = linear()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MismatchError, match=r"optimizer_00000001.pt.*1 things were recorded as also=, and 0 are given"):
        Recorder(model, optimizer, tmp_path, every=1).restore()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def saved(path, content):
    torch.save(content, path)
    return Checkpoint(path, 1)


def test_a_few_bytes_that_claim_terabytes_are_refused(tmp_path):
    with pytest.raises(MismatchError, match=r"a\.pt.*claim 4398046511\d* bytes more than it has"):
        saved(tmp_path / "a.pt", {"weight": torch.zeros(1).expand(1 << 20, 1 << 20)}).load()
    mask = torch.ones(1, 8).expand(8, 8)  # what a model may register, and torch saves as one row
    assert torch.equal(saved(tmp_path / "b.pt", {"mask": mask}).load()["mask"], mask)


@pytest.mark.parametrize("kind", [torch.complex64, torch.int32])
def test_numbers_of_another_kind_are_not_cast_silently(tmp_path, kind):
    model, weight = nn.Linear(3, 2, bias=False), torch.zeros(2, 3, dtype=kind)
    with pytest.raises(MismatchError, match="of another kind of number: weight torch"):
        saved(tmp_path / "a.pt", {"weight": weight}).load_into(model)


def endless():
    content = {}
    content["model"] = content
    return content


@pytest.mark.parametrize(
    "content",
    [endless(), {5: torch.zeros(1)}, {"w": torch.zeros(1, device="meta")}, {"w": torch.zeros(3).to_sparse()}],
    ids=["endless", "no name", "no numbers", "sparse"],
)
def test_what_holds_no_state_is_refused_by_name(tmp_path, content):
    with pytest.raises(MismatchError, match=r"a\.pt"):
        saved(tmp_path / "a.pt", content).load()


@pytest.mark.parametrize("value", [float("nan"), -1.0, float("inf")])
def test_second_moments_are_means_of_squares(tmp_path, value):
    model = nn.Linear(2, 1, bias=False)
    entry = {"step": torch.tensor(1.0), "exp_avg_sq": torch.tensor([[1.0, value]])}
    torch.save({"state": {0: entry}, "param_groups": [{"params": [0]}]}, tmp_path / "optimizer.pt")
    checkpoint = Checkpoint(model.state_dict(), 1, 0.1, tmp_path / "optimizer.pt")
    with pytest.raises(MismatchError, match=r"second moment of 'weight' .* below 0 or not finite"):
        list(moments(checkpoint, Adam(), model))


@pytest.mark.parametrize("state", [{0: 5}, {0: {"exp_avg_sq": "x"}}, {"weight": None}])
def test_other_things_in_the_place_of_moments(tmp_path, state):
    model = nn.Linear(2, 1, bias=False)
    torch.save({"state": state, "param_groups": [{"params": [0]}]}, tmp_path / "optimizer.pt")
    checkpoint = Checkpoint(model.state_dict(), 1, 0.1, tmp_path / "optimizer.pt")
    with pytest.raises(MismatchError, match=r"Checkpoint.*optimizer.pt"):
        list(moments(checkpoint, Adam(), model))


def test_what_a_kill_left_goes_when_a_whole_run_is_restored(tmp_path):
    recorded(tmp_path).close()
    left = [tmp_path / "optimizer_00000001.pt", tmp_path / "step_00000007.pt", tmp_path / "x.0123.partial"]
    for file in left:
        file.write_bytes(b"half")
    (tmp_path / "step_00000009.pt").mkdir()  # somebody's own
    before = sorted(file.name for file in tmp_path.iterdir() if file not in left)
    assert Recorder(*linear(), tmp_path, every=1).restore() == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == before
