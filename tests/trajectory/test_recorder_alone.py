"""One recorder at a time in a directory, schedulers that are late, and records that lie."""

import gc
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recorded_runs import advance, linear, recorded
from torch.amp.grad_scaler import GradScaler
from torch.optim import lr_scheduler

from source_proj._errors import MismatchError
from source_proj.trajectory import Recorder, Trajectory

OTHER = """
import os, sys, torch
sys.path.insert(0, {here!r})
from recorded_runs import advance, linear
from source_proj.trajectory import Recorder
recorder = Recorder(*linear(), {directory!r}, every=1)
recorder.restore()
advance(recorder)
{then}
print("ready", flush=True)
sys.stdin.read()
"""


def other_process(directory, then=""):
    script = OTHER.format(here=str(Path(__file__).parent), directory=str(directory), then=then)
    return subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_second_recorder_is_refused(tmp_path):
    first = Recorder(*linear(), tmp_path, every=1)
    with pytest.raises(MismatchError, match="another Recorder writes to"):
        Recorder(*linear(), tmp_path)
    advance(first)
    first.close()
    with pytest.raises(MismatchError, match="was closed"):
        advance(first)
    with pytest.raises(MismatchError, match="was closed"):
        first.restore()
    second = Recorder(*linear(), tmp_path)
    assert second.restore() == 1


def test_a_recorder_that_gave_its_trajectory_lets_others_on_and_goes_on_alone(tmp_path):
    first = Recorder(*linear(), tmp_path, every=1)
    advance(first)
    first.trajectory()
    advance(first)  # nobody came
    with pytest.raises(MismatchError, match="another Recorder writes to"):
        Recorder(*linear(), tmp_path)
    first.trajectory()
    second = Recorder(*linear(), tmp_path, every=1)
    second.restore()
    with pytest.raises(MismatchError, match="another Recorder writes to"):
        advance(first)
    advance(second)
    second.trajectory()
    with pytest.raises(MismatchError, match="another Recorder went on with the run"):
        first.step()
    assert Trajectory.from_recorder(tmp_path).final.step == 3


def test_a_recorder_that_nobody_holds_is_gone(tmp_path):
    model, optimizer = linear()
    Recorder(model, optimizer, tmp_path)
    gc.collect()
    Recorder(model, optimizer, tmp_path)
    gc.collect()
    assert not optimizer._optimizer_step_post_hooks


def test_the_lock_is_among_processes_and_dies_with_its_own(tmp_path):
    process = other_process(tmp_path)
    try:
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(MismatchError, match="another Recorder writes to"):
            Recorder(*linear(), tmp_path)
        assert Trajectory.from_recorder(tmp_path).final.step == 1  # reading needs no lock
    finally:
        process.kill()
        process.communicate()
    assert (tmp_path / "recorder.lock").exists()
    assert Recorder(*linear(), tmp_path).restore() == 1


@pytest.mark.skipif(sys.platform == "win32", reason="does not fork")
def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    then = "pid = os.fork()\nif pid == 0:\n    import time\n    time.sleep(60)\nprint(pid, flush=True)"
    process = other_process(tmp_path, then)
    child = int(process.stdout.readline())
    try:
        assert process.stdout.readline() == "ready\n"
        process.kill()
        process.wait()
        assert Recorder(*linear(), tmp_path).restore() == 1
    finally:
        subprocess.run(["kill", "-9", str(child)], check=False)
        process.communicate()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d["checkpoints"][0]["updates"][0].__setitem__(3, 10**10), "a count of 1 to 1, got"),
        (lambda d: d["checkpoints"][0]["updates"][0].__setitem__(3, -1), "a count of 1 to 1, got"),
        (lambda d: d["checkpoints"][0]["updates"][0].__setitem__(3, 0), "a count of 1 to 1, got"),
        (lambda d: d["checkpoints"][0]["updates"][0].__setitem__(3, 1.0), r"updates\[0\]\[3\] must be an integer"),
        (lambda d: d["checkpoints"][0]["updates"][0].__setitem__(0, -0.1), "a rate of at least 0"),
        (lambda d: d["checkpoints"][0]["updates"][0].__setitem__(1, 2.0), "a clip factor of 0 to 1"),
        (lambda d: d["checkpoints"][0]["updates"][0].__setitem__(2, 0.0), "a positive time factor"),
        (lambda d: d["checkpoints"][0]["updates"][0].pop(), r"updates\[0\] must have 4 entries"),
        (lambda d: d["checkpoints"][0]["updates"].clear(), r"checkpoints\[0\] has 0 updates from step 0 to step 1"),
        (lambda d: d["checkpoints"][0].update(step=10**10, updates=[[0.1, 1.0, 1.0, 10**10]]), "step must be 1 to"),
        (lambda d: d["checkpoints"][1].update(step=1), r"checkpoints\[1\] has 1 updates from step 1 to step 1"),
        (lambda d: d["checkpoints"][0].update(weights=None), "weights must be a string"),
        (lambda d: d["checkpoints"][0].update(file="../x.pt"), "has an unknown entry 'file'"),
        (lambda d: d["checkpoints"][0].pop("moments"), "lacks 'moments'"),
        (lambda d: d["checkpoints"][1].update(skipped=[0]), "skipped must be numbers of the 1 updates to step 2"),
        (lambda d: d["checkpoints"][1].update(skipped=[1, 1]), r"in order and each once, got \[1, 1\]"),
        (lambda d: d.update(resume=None), "resume is None with 2 checkpoints"),
        (lambda d: d.update(optimizer={"name": "SGD"}), "optimizer: SGD lacks 'momentum'"),
        (lambda d: d.update(state=[]), "state must be an object"),
        (lambda d: d.update(stage=3), "stage must be a string"),
    ],
)
def test_records_that_lie_are_refused_by_name(tmp_path, change, named):
    recorded(tmp_path)
    path = tmp_path / "trajectory.json"
    content = json.loads(path.read_text())
    del content["digest"]
    change(content)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**content, "digest": digest}))  # of one who lies on purpose
    with pytest.raises(MismatchError, match=named):
        Trajectory.from_recorder(tmp_path)
    with pytest.raises(MismatchError, match=named):
        Recorder(*linear(), tmp_path)


def with_schedule(directory, loop, steps=6, per=1):
    model, optimizer = linear()
    scheduler = lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    recorder = Recorder(model, optimizer, directory, every=2, also=[scheduler])
    things = {"optimizer": optimizer.step, "scheduler": scheduler.step, "recorder": recorder.step}
    for step in range(recorder.restore(), steps):
        for name in loop:
            if name != "scheduler" or (step + (loop[0] != "scheduler")) % per == 0:
                things[name]()
    return recorder


@pytest.mark.parametrize("per", [1, 2])
def test_a_scheduler_that_steps_after_the_recorder_is_noticed(tmp_path, per):
    loop = ["optimizer", "recorder", "scheduler"]
    with pytest.raises(MismatchError, match="stepped after the recorder wrote a checkpoint, and before step 3"):
        with_schedule(tmp_path, loop, per=per)
    assert Trajectory.from_recorder(tmp_path).final.step == 2


@pytest.mark.filterwarnings("ignore:Detected call of")  # torch's, on the order that is tried here
@pytest.mark.parametrize("loop", [["optimizer", "scheduler", "recorder"], ["scheduler", "optimizer", "recorder"]])
def test_a_scheduler_that_steps_before_the_recorder_goes_on_right(tmp_path, loop):
    whole = with_schedule(tmp_path / "whole", loop).stage().lr_schedule
    with_schedule(tmp_path / "parts", loop, steps=3)
    assert with_schedule(tmp_path / "parts", loop).stage().lr_schedule == whole


def test_a_grad_scaler_that_is_updated_after_the_recorder_is_noticed(tmp_path):
    model, optimizer = linear()
    scaler = GradScaler("cpu", enabled=True)
    recorder = Recorder(model, optimizer, tmp_path, every=1, also=[scaler])
    for _ in range(2):
        scaler.scale(model(torch.ones(1, 2)).sum()).backward()
        scaler.step(optimizer)
        if recorder.steps == 0:
            recorder.step()
            scaler.update()
    with pytest.raises(MismatchError, match="before step 2"):
        recorder.step()


def with_scaler(directory, loop, overflows, every):
    """A loop whose GradScaler skips some steps; scheduler and scaler go on all the same."""
    model, optimizer = linear()
    scaler, scheduler = GradScaler("cpu", init_scale=4.0), lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    recorder = Recorder(model, optimizer, directory, every=every, also=[scaler, scheduler])
    things = {"scheduler": scheduler.step, "recorder": recorder.step}
    for overflow in overflows:
        optimizer.zero_grad()
        for name in loop:
            if name == "optimizer":
                scaler.scale(model(torch.ones(1, 2)).sum() * (float("inf") if overflow else 1.0)).backward()
                scaler.step(optimizer)
                scaler.update()
            else:
                things[name]()


OVERFLOWS = st.lists(st.booleans(), min_size=1, max_size=8)


@pytest.mark.filterwarnings("ignore:Detected call of")  # torch's, on the order that is tried here, and on skipped steps
@given(st.sampled_from([("optimizer", "scheduler", "recorder"), ("scheduler", "optimizer", "recorder")]), OVERFLOWS)
def test_steps_that_a_scaler_skips_make_no_loop_a_late_one(loop, overflows):
    for every in (1, 2, 3):
        with TemporaryDirectory() as directory:
            with_scaler(directory, loop, overflows, every)


@pytest.mark.filterwarnings("ignore:Detected call of")
@given(OVERFLOWS)
def test_a_late_scheduler_is_noticed_whatever_was_skipped_before(overflows):
    with TemporaryDirectory() as directory, pytest.raises(MismatchError, match="stepped after the recorder wrote"):
        with_scaler(directory, ("optimizer", "recorder", "scheduler"), [*overflows, False, False], every=1)
