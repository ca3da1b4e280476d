"""A step that is skipped is none: times, shares and preconditioners are those of the same updates without it."""

import copy
import hashlib
import json
import math
import random
from dataclasses import replace

import pytest
import torch
from skipped_runs import ROWS, Step, made_until, of_torch, random_steps, record, without_skips
from torch import nn
from torch.amp.grad_scaler import GradScaler

from source_proj.gradients import ParameterSpace
from source_proj.trajectory import Adagrad, Checkpoint, Recorder, Stage, Trajectory, moments
from source_proj.trajectory.recording.run_files import RecordedRun

MODES = [("scalar", 1), ("shared", 1), ("factored_per_segment", 4), ("per_segment", 4)]
MOVING = {
    "adam": ("Adam", {}),
    "adamw": ("AdamW", {"weight_decay": 0.0}),
    "nadam": ("NAdam", {}),
    "radam": ("RAdam", {"betas": (0.9, 0.99)}),
    "rmsprop": ("RMSprop", {"alpha": 0.9}),
    "adagrad": ("Adagrad", {"lr_decay": 0.05}),
}
COUNTING = ["nadam", "radam", "rmsprop", "adagrad", "adafactor", "schedule-free adamw"]


def cuts(steps, seed):
    """Steps to record at, with an update between any two, and the numbers of updates until then."""
    draw = random.Random(seed)
    chosen = sorted({*draw.sample(range(1, len(steps) + 1), 6), len(steps)})
    by_updates = {made_until(steps, step): step for step in chosen if made_until(steps, step)}
    return list(by_updates.values()), list(by_updates)


def derived(stage, model, **changes):
    """All that a bank keeps of a stage, but the steps and the places of its files."""
    run = Trajectory.from_stages([replace(stage, **changes)])
    resolved = run.resolve(model, ParameterSpace.from_model(model)).record
    (record,) = resolved.stages
    hashes = [checkpoint.hash for checkpoint in (*record.checkpoints, record.final)]
    return (
        resolved.metrics, hashes, record.optimizer, record.lr_integrals, record.lr_sums, record.time_factor,
        record.scalars, record.decays, record.metrics, record.cut(),
    )  # fmt: skip


def agree(one, other, model):
    """Two stages of the same updates are the same to the last bit."""
    assert one.lr_integrals == other.lr_integrals
    assert one.plain_shares == other.plain_shares
    assert one.interval_times == other.interval_times
    for changes in ({}, {"preconditioner": "per_segment", "segments": 2}, {"preconditioner": "factored"}):
        if len(one.checkpoints) >= changes.get("segments", 1):
            assert derived(one, model, **changes) == derived(other, model, **changes)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("row", ROWS)
def test_skipped_steps_change_nothing(row, seed, tmp_path):
    steps = random_steps(seed)
    at, updates = cuts(steps, seed)
    steps = steps[: at[-1]]
    plain, model = record(row, tmp_path / "plain", without_skips(steps), at=updates)
    skipped, _ = record(row, tmp_path / "skipped", steps, at=at)
    stops = sorted(random.Random(seed).sample(range(1, len(steps)), 3))
    again, _ = record(row, tmp_path / "again", steps, at=at, stop=stops)
    stages = [recorder.stage() for recorder in (plain, skipped, again)]
    assert list(stages[1].skipped) == list(stages[2].skipped) == [t for t, step in enumerate(steps) if step[1] is None]
    agree(stages[0], stages[1], model)
    agree(stages[0], stages[2], model)
    agree(stages[0], Stage.from_recorder(tmp_path / "again"), model)


@pytest.mark.parametrize(("every", "seed"), [(1, 0), (2, 1), (5, 2)])
@pytest.mark.parametrize("row", [row for row in ROWS if row != "schedule-free sgd"])
def test_intervals_without_an_update_take_no_time(row, seed, every, tmp_path):
    """Also those before the first update, where there is no second moment yet."""
    steps = [Step(0.1, None), Step(0.1, None), *random_steps(seed, 24, skips=0.6)]
    recorder, model = record(row, tmp_path / "skipped", steps, every=every)
    stage = recorder.stage()
    at = [made_until(steps, checkpoint.step) for checkpoint in stage.checkpoints]
    plain = record(row, tmp_path / "plain", without_skips(steps), at=[max(1, count) for count in at])[0].stage()
    known = {0: 0.0, **dict(zip(sorted({*at} - {0}), plain.lr_integrals, strict=False))}
    assert stage.lr_integrals == [known[count] for count in at]
    shares = dict(zip(sorted({*at} - {0}), plain.plain_shares, strict=False))
    for place, (before, count) in enumerate(zip([0, *at], at, strict=False)):
        assert stage.plain_shares[place] == (shares[count] if count > before else 0.0)
    for mode, segments in (("scalar", 1), ("shared", 1), ("scalar", len(at)), ("per_segment", len(at) // 2)):
        if segments and (mode != "per_segment" or at[0]):
            derived(stage, model, preconditioner=mode, segments=segments)


@pytest.mark.parametrize("row", [row for row in ROWS if not row.startswith("schedule-free")])
def test_a_segment_may_have_nothing_but_skipped_steps(row, tmp_path):
    steps = [Step(0.1, 0), Step(0.1, 1), Step(0.1, None), Step(0.1, 2)]
    recorder, model = record(row, tmp_path, steps, every=1)
    for mode, segments in MODES:
        *_, cut = derived(recorder.stage(), model, preconditioner=mode, segments=segments)
        assert [segment.time > 0 for segment in cut] == ([True] if segments == 1 else [True, True, False, True])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("row", MOVING)
def test_times_are_what_the_weights_moved(row, seed, tmp_path, monkeypatch):
    """Under a gradient of two everything is known: from checkpoint to checkpoint, weights move by P times the time."""
    name, options = MOVING[row]
    monkeypatch.setitem(ROWS, row, of_torch(name, eps=1e-12, **options))
    steps = random_steps(seed, 40)
    recorder, model = record(
        row, tmp_path, steps, lambda _, like: torch.full_like(like, 2.0), dtype=torch.float64, every=3
    )
    stage = recorder.stage()
    states = [checkpoint.load() for checkpoint in stage.checkpoints]
    for place in range(1, len(states)):
        moved = states[place - 1]["weight"] - states[place]["weight"]
        time = stage.lr_integrals[place] - stage.lr_integrals[place - 1]
        if time:
            found = dict(moments(stage.checkpoints[place], stage.optimizer, model, stage.plain_shares[place]))
            torch.testing.assert_close(moved, 2 * time * found["weight"].preconditioner, rtol=1e-6, atol=1e-12)
        else:
            assert not moved.any()


@pytest.mark.parametrize("row", [*COUNTING[:-1], "adam"])
def test_an_optimizer_that_goes_on_keeps_its_count(row, tmp_path):
    steps = [Step(0.1, None), *random_steps(3)]
    before = [Step(0.1, 100 + number) for number in range(3)]
    at, updates = cuts(steps, 3)
    steps = steps[: at[-1]]
    plain, model = record(row, tmp_path / "plain", without_skips(steps), before=before, at=updates)
    skipped, _ = record(row, tmp_path / "skipped", steps, before=before, at=at, stop=[11])
    agree(plain.stage(), skipped.stage(), model)
    alone, _ = record(row, tmp_path / "alone", without_skips(steps), at=updates)
    counts = row != "adam"
    assert (alone.stage().lr_integrals != plain.stage().lr_integrals) is counts


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["Adagrad", "AdamW"])
def test_steps_that_a_grad_scaler_skips(kind, fused, tmp_path):
    """A fused optimizer is called all the same, and skips within its step."""

    def run(overflowing, directory, at):
        torch.manual_seed(0)
        model, scaler = nn.Linear(3, 2), GradScaler("cpu", init_scale=4.0)
        optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.1, fused=fused)
        recorder, data = Recorder(model, optimizer, directory, at=at, also=[scaler]), torch.randn(20, 4, 3)
        made = 0
        for number in range(10):
            if number in overflowing:
                continue_with = data[0] * math.inf
            else:
                continue_with, made = data[made], made + 1
            optimizer.zero_grad()
            scaler.scale(model(continue_with).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            recorder.step()
            if made == 7 and number + 1 not in overflowing:
                break
        return recorder.stage(), model

    plain, model = run((), tmp_path / "plain", [3, 7])
    skipped, _ = run((0, 2, 5), tmp_path / "skipped", [5, 10])
    assert skipped.skipped == (0, 2, 5)
    assert plain.skipped == ()
    assert skipped.lr_integrals == plain.lr_integrals
    assert [c.step for c in skipped.checkpoints] == [5, 10]
    for one, other in zip(plain.checkpoints, skipped.checkpoints, strict=True):
        mine, its = (dict(moments(c, plain.optimizer, model))["weight"].second for c in (one, other))
        torch.testing.assert_close(mine, its)


def untold(directory):
    """Make a record what the version before wrote, which did not say which steps were skipped."""
    path = directory / "trajectory.json"
    content = json.loads(path.read_text())
    del content["digest"]
    content["version"] = 5
    for checkpoint in content["checkpoints"]:
        del checkpoint["skipped"]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**content, "digest": digest}))


@pytest.mark.parametrize(("skips", "zeros"), [(0.4, 0.0), (0.0, 0.3)])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("row", COUNTING)
def test_records_that_do_not_say_are_settled_by_the_states_own_count(row, seed, skips, zeros, tmp_path):
    steps = [step for step in random_steps(seed, 30, skips, zeros) if step.rate or not skips]
    numbers = iter(range(30))
    steps = [Step(rate, None if update is None else next(numbers)) for rate, update in steps]
    at, updates = cuts(steps, seed)
    steps = steps[: at[-1]]
    plain, model = record(row, tmp_path / "plain", without_skips(steps), at=updates)
    record(row, tmp_path / "untold", steps[:15], at=at)[0].close()
    untold(tmp_path / "untold")
    skipped, _ = record(row, tmp_path / "untold", steps, at=at)  # goes on
    stage = skipped.stage()
    assert stage.skipped is None or at[0] > 15
    agree(plain.stage(), stage, model)
    assert RecordedRun.read(tmp_path / "untold").skipped() == stage.skipped


def test_a_warm_up_from_0_was_made_where_later_steps_were_skipped():
    """Of rates of 0, the state says how many were skipped: the last ones."""
    state = {"state": {0: {"step": torch.tensor(3.0), "sum": torch.ones(2, 3)}}, "param_groups": []}
    rates, weights = [0.0, 0.1, 0.0, 0.2], {"w": torch.zeros(2, 3)}
    stage = Stage("train", [Checkpoint(weights, 4, optimizer_state=state)], Adagrad(), lr_schedule=rates)
    assert stage.lr_integrals == pytest.approx([0.1 * math.sqrt(3 / 2) + 0.2])
    told = replace(stage, skipped=[0])
    assert told.lr_integrals == pytest.approx([0.1 * math.sqrt(3 / 1) + 0.2 * math.sqrt(3 / 3)])


def test_a_stage_may_be_told_which_updates_were_skipped():
    weights = {"w": torch.zeros(2)}
    checkpoints = [Checkpoint(weights, step, lr=0.1) for step in (12, 14)]
    stage = Stage("train", checkpoints, start_step=10, skipped=[11, 12])
    assert stage.lr_integrals == pytest.approx([0.1, 0.2])
    with pytest.raises(ValueError, match=r"skipped has update 14, and stage 'train' ends at step 14"):
        replace(stage, skipped=[14])
    with pytest.raises(ValueError, match="skipped, numbers of updates, must be an integer of at least 10, got 9"):
        replace(stage, skipped=[9])


def test_steps_left_out_of_which_nobody_knows_begin_no_state_anew():
    """A constant rate, as a script without a recorder knows it, and a step that was skipped."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    checkpoints = []
    for step in range(1, 9):
        if step != 5:
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape)
            optimizer.step()
        checkpoints.append(
            Checkpoint(model.state_dict(), step, lr=0.1, optimizer_state=copy.deepcopy(optimizer.state_dict()))
        )
    assert Stage("train", checkpoints, Adagrad()).lr_integrals[-1] > 0.79
    assert Stage("train", checkpoints, Adagrad(), skipped=[4]).lr_integrals[-1] == pytest.approx(0.7)


def test_averaged_parameters_leave_what_was_skipped(tmp_path):
    steps = random_steps(1)
    record("adagrad", tmp_path, steps, every=4)[0].stage()
    untold(tmp_path)
    stage = Stage.from_recorder(tmp_path, segments=2)
    assert stage.skipped is None
    settled = stage.average_parameters()
    assert len(settled.skipped) == len(steps) - len(without_skips(steps))
