"""Two runs in one output_dir are told apart by what they logged, kept and wrote; a run that is resumed stays one."""

import os
import random
import shutil

import pytest
import torch
from torch import nn
from trainer_runs import copied, edit_state, examples, train

import source_proj as sp
from source_proj.integrations.moments_follow import moments_contradict

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "eval_data": examples()[:4]}
UNLOGGED = {"logging_steps": 500, "save_steps": 4}


def steps_of(directory, **options):
    stage = sp.Trajectory.from_hf_trainer(directory, max_grad_norm=0, **options).stages[0]
    return [checkpoint.step for checkpoint in stage.checkpoints]


def spliced(directory, first, second):
    """A run of 9 steps, then another of 4 steps in the same folder."""
    train(directory, **{"max_steps": 9, "save_steps": 3, **first})
    train(directory, **{"max_steps": 4, "save_steps": 2, **second})
    return directory


def assert_two_runs(directory, evidence):
    with pytest.raises(sp.MismatchError, match=rf"{evidence}.*steps= \(those of 'checkpoint-9' are \[3, 6, 9\]"):
        steps_of(directory)
    assert steps_of(directory, steps=[6, 9]) == [6, 9]


SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def test_what_was_logged_of_common_steps_tells_runs_of_equal_rates_apart(tmp_path):
    run = spliced(tmp_path, SGD, {**SGD, "seed": 1})
    assert_two_runs(run, "checkpoint-2' logged the loss .* at step 1, and 'checkpoint-3' has")
    assert steps_of(run, steps=[2, 4]) == [2, 4]


def written(directory, order, *, as_a_trainer=True):
    """Give files the times of folders written in an order, a minute each."""
    for minute, step in enumerate(order):
        files = ["model.safetensors", "training_args.bin", "optimizer.pt", "scheduler.pt", "trainer_state.json"]
        for second, name in enumerate(files if as_a_trainer else sorted(files)):
            time = 1_700_000_000 + 60 * minute + second
            os.utime(directory / f"checkpoint-{step}" / name, (time, time))
    return directory


def test_times_and_arguments_tell_runs_apart_that_logged_nothing(tmp_path):
    quiet = {**SGD, "logging_steps": 500}
    run = spliced(tmp_path, quiet, {**quiet, "seed": 1, "learning_rate": 0.05})
    assert_two_runs(
        written(run, [3, 6, 9, 2, 4]), "checkpoint-2' was written after 'checkpoint-3', with seed=1 and not 42"
    )


@pytest.mark.parametrize("change", [{"seed": 1}, {"data": examples()[::-1]}, {"learning_rate": 2e-2}])
def test_moments_tell_runs_apart_that_logged_nothing(tmp_path, change):
    quiet = {"logging_steps": 500, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    run = written(spliced(tmp_path, quiet, {**quiet, **change}), [2, 3, 4, 6, 9])
    assert_two_runs(run, "second moments .*checkpoint-2' cannot have become those of 'checkpoint-3'")


def test_counts_that_shrink_tell_runs_apart(tmp_path):
    train(tmp_path, **SGD, **UNLOGGED)
    edit_state(tmp_path, 8, lambda state: state.update(total_flos=2 * state["total_flos"]))
    with pytest.raises(sp.MismatchError, match=r"checkpoint-8' has total_flos=.*and 'checkpoint-12', which is later"):
        steps_of(tmp_path)


@pytest.mark.parametrize("options", [{}, UNLOGGED, {**SGD, **UNLOGGED}, {**SGD, **EVALUATED}])
def test_a_resumed_run_stays_one(tmp_path, options):
    """Whatever changes from process to process, whatever times a copy has, and with a log of NaN."""
    schedule = {"lr_scheduler_type": "constant"}
    train(tmp_path / "run", **{**options, **schedule}, stop=10)
    changed = {**options, **schedule, "seed": 7, "data_seed": 3, "learning_rate": 5e-3, "num_train_epochs": 3}
    train(tmp_path / "run", **changed, resume=str(tmp_path / "run/checkpoint-8"), stop=18)
    last = {**changed, "learning_rate": 2e-3, "per_device_train_batch_size": 2, "ignore_data_skip": True}
    train(tmp_path / "run", **last, resume=str(tmp_path / "run/checkpoint-16"), max_steps=24)
    folders = sorted(int(f.name.removeprefix("checkpoint-")) for f in (tmp_path / "run").glob("checkpoint-*"))
    expected = [step for step in folders if step not in (10, 18)]
    for abandoned in {*folders} - {*expected}:
        shutil.rmtree(tmp_path / f"run/checkpoint-{abandoned}")
    for step in expected:
        edit_state(tmp_path / "run", step, lambda s: [e.update(grad_norm=float("nan")) for e in s["log_history"][:1]])
    assert steps_of(tmp_path / "run") == expected
    copy = copied(tmp_path / "run", tmp_path / "copy")
    for seed in range(3):
        order = random.Random(seed).sample(expected, len(expected))
        assert steps_of(written(copy, order, as_a_trainer=False)) == expected


KINDS = {
    "Adam": lambda p: torch.optim.Adam(p, betas=(0.8, 0.95)),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, amsgrad=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
}


def states(kind, seed, steps=40):
    """Of every step; some have no gradient, some a huge one."""
    torch.manual_seed(seed)
    model, rng = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), random.Random(seed)
    optimizer = KINDS[kind](model.parameters())
    kept = []
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.randn(6, 4)).square().mean() * rng.choice([0.0, 1e-3, 1.0, 100.0])).backward()
        optimizer.step()
        state = optimizer.state_dict()
        copies = {n: {k: v.clone() for k, v in entry.items()} for n, entry in state["state"].items()}
        kept.append({"state": copies, "param_groups": state["param_groups"]})
    return kept


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_moments_of_one_run_follow_and_of_two_runs_do_not(kind, seed):
    own, other = states(kind, seed), states(kind, seed + 100)
    pairs = [sorted(random.Random(n).sample(range(40), 2)) for n in range(30)]
    assert not any(moments_contradict(own[a], own[b]) for a, b in pairs)
    near = [(a, a + 3) for a in range(2, 37)]
    assert sum(moments_contradict(own[a], other[b]) for a, b in near) > len(near) // 2


def test_nothing_is_said_of_states_without_second_moments_or_with_a_new_count():
    own, other = states("Adam", 0), states("Adam", 1)
    assert not moments_contradict(own[20], other[3])  # begun anew: no state of a later update
    model = nn.Linear(2, 2)
    plain = torch.optim.SGD(model.parameters(), lr=0.1).state_dict()
    assert not moments_contradict(plain, plain)
