"""Runs that stand still by their record are told of: copied checkpoints, and learning rates of 0."""

import shutil
import warnings

import pytest
import torch
from torch import nn

import source_proj as sp
from source_proj.gradients import ParameterSpace


def state(seed):
    torch.manual_seed(seed)
    return nn.Linear(3, 2).state_dict()


def resolve(points, **options):
    model = nn.Linear(3, 2)
    return sp.Trajectory(points, **options).resolve(model, ParameterSpace.from_model(model))


def files(folder):
    for name, seed in (("a", 1), ("b", 2)):
        torch.save(state(seed), folder / f"{name}.pt")
    shutil.copy(folder / "a.pt", folder / "copy.pt")
    return lambda name: folder / f"{name}.pt"


@pytest.mark.parametrize("names", ["aab", "aba", "abb", ("a", "copy", "b"), ("a", "b", "copy")])
def test_one_file_at_two_steps_is_told_of_by_both(tmp_path, names):
    at = files(tmp_path)
    points = [sp.Checkpoint(at(name), 10 * (place + 1), lr=0.1) for place, name in enumerate(names)]
    same = [place for place, name in enumerate(names) if name in ("a", "copy")]
    first, second = same if len(same) == 2 else (1, 2)
    said = rf"step={10 * (first + 1)}, .*step={10 * (second + 1)}, .* of stage 'train' hold the same weights"
    with pytest.warns(UserWarning, match=said):
        resolve(points)


def test_equal_dicts_are_taken_as_they_are():
    with warnings.catch_warnings(action="error"):
        resolve([sp.Checkpoint(state(1), step, lr=0.1) for step in (5, 10)])


def test_weights_that_had_no_rate_may_be_the_same(tmp_path):
    at = files(tmp_path)
    points = [sp.Checkpoint(at(name), step) for name, step in (("a", 5), ("copy", 10), ("b", 15), ("b", 20))]
    with warnings.catch_warnings(action="error"):
        resolve(points, lr_schedule=lambda t: 0.1 * (t < 5 or 10 <= t < 15))


def test_a_run_without_any_rate_is_told_of():
    points = [sp.Checkpoint(state(seed), 5 * seed, lr=0.0) for seed in (1, 2)]
    with pytest.warns(UserWarning, match="all learning rates of the run are 0"):
        resolve(points)


def test_a_stage_of_several_may_have_none():
    stages = [sp.Stage(str(seed), [sp.Checkpoint(state(seed), 5, lr=rate)]) for seed, rate in ((1, 0.0), (2, 0.1))]
    model = nn.Linear(3, 2)
    with warnings.catch_warnings(action="error"):
        sp.Trajectory.from_stages(stages).resolve(model, ParameterSpace.from_model(model))


def test_the_state_of_a_lazy_model_is_refused_until_it_has_seen_a_batch():
    model = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match=r"'0\.weight'.* have no shape yet.*call the model on a batch first"):
        sp.Checkpoint(model.state_dict(), step=1)
    model(torch.ones(3, 4))
    assert sp.Checkpoint(model.state_dict(), step=1).load()["0.weight"].shape == (2, 4)
