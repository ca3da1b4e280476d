"""Files of one Lightning run make a stage; those of two are refused, and the message names both and what to do."""

import random
import shutil

import pytest
import torch
from torch import nn

import source_proj as sp

KINDS = {"sgd": lambda p: torch.optim.SGD(p, lr=0.1), "adam": lambda p: torch.optim.AdamW(p, lr=0.1)}


def write(directory, seed, steps, kind="sgd"):
    """A run by hand, saved as Lightning saves."""
    torch.manual_seed(seed)
    model, data = nn.Linear(3, 2), torch.randn(16, 3)
    optimizer = KINDS[kind](model.parameters())
    directory.mkdir(parents=True, exist_ok=True)
    for step in range(1, max(steps) + 1):
        optimizer.zero_grad()
        (model(data).square().mean() + model.bias[0]).backward()
        optimizer.step()
        if step in steps:
            content = {
                "global_step": step,
                "state_dict": model.state_dict(),
                "optimizer_states": [optimizer.state_dict()],
                "lr_schedulers": [],
            }
            torch.save(content, directory / f"epoch=0-step={step}.ckpt")
    return directory


def steps_of(directory, **options):
    return [checkpoint.step for checkpoint in sp.Trajectory.from_lightning(directory, **options).stages[0].checkpoints]


@pytest.mark.parametrize("seed", range(3))
def test_two_folders_are_two_runs(tmp_path, seed):
    own, its = ([random.Random(seed + n).randrange(5 + 20 * n, 20 + 20 * n) for n in range(a, a + 3)] for a in (0, 3))
    first = write(tmp_path / "version_0/checkpoints", 0, own)
    second = write(tmp_path / "version_1/checkpoints", 1, its)
    with pytest.raises(sp.MismatchError, match=r"version_\d/checkpoints' and '.*version_\d/.* give the one folder"):
        steps_of(tmp_path)
    assert (steps_of(first), steps_of(second)) == (sorted(own), sorted(its))
    assert steps_of(tmp_path, steps=own) == sorted(own)


def test_files_of_one_step_hold_the_same_weights(tmp_path):
    write(tmp_path / "version_0", 0, [10, 20, 30])
    write(tmp_path / "version_1", 1, [10, 15])
    with pytest.raises(
        sp.MismatchError, match=r"version_0/.*=10.ckpt' and '.*version_1/.*=10.ckpt' are both of global"
    ):
        steps_of(tmp_path)
    shutil.copy(tmp_path / "version_1/epoch=0-step=10.ckpt", tmp_path / "version_0/epoch=0-step=10-v1.ckpt")
    with pytest.raises(sp.MismatchError, match=r"step=10-v1.ckpt' and '.*different weights"):
        steps_of(tmp_path / "version_0")
    assert steps_of(tmp_path / "version_0", steps=[20, 30]) == [20, 30]


@pytest.mark.parametrize("place", [".", "copies/deep"])
def test_a_copy_of_the_last_file_is_no_other_run(tmp_path, place):
    run = write(tmp_path / "version_0/checkpoints", 0, [10, 20, 30], "adam")
    (run / place).mkdir(parents=True, exist_ok=True)
    shutil.copy(run / "epoch=0-step=30.ckpt", run / place / "last.ckpt")
    shutil.copy(run / "epoch=0-step=20.ckpt", run / place / "best-v3.ckpt")
    stage = sp.Trajectory.from_lightning(tmp_path).stages[0]
    assert [checkpoint.step for checkpoint in stage.checkpoints] == [10, 20, 30]
    assert {checkpoint.path.parent for checkpoint in stage.checkpoints} == {run}


def test_two_runs_in_one_folder_are_told_apart_by_their_moments(tmp_path):
    write(tmp_path, 0, [10, 20, 30], "adam")
    write(tmp_path, 1, [12, 22], "adam")
    with pytest.raises(
        sp.MismatchError, match=r"second moments in .*=10.ckpt' cannot have become those in .*=12.ckpt'"
    ):
        steps_of(tmp_path)
    assert steps_of(tmp_path, steps=[10, 20, 30]) == [10, 20, 30]
