"""A recorder's step that is interrupted: it counts whole, the run stays readable, and training goes on."""

import errno
import os
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from recorded_runs import described, same
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import lr_scheduler

from source_proj import _io
from source_proj.trajectory import Recorder, Trajectory, recording

STEPS, EVERY = 9, 3
TRACED = (str(Path(recording.__file__).parent), str(Path(_io.__file__).parent))


class Training:
    """Nine steps that follow from their numbers, and what each left behind."""

    def __init__(self, directory, clip=None):
        torch.manual_seed(0)
        self.clip, self.model = clip, nn.Linear(3, 2)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1, weight_decay=0.1)
        self.scheduler = lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.recorder = Recorder(
            self.model, self.optimizer, directory, every=EVERY, also=[self.scheduler], max_grad_norm=clip
        )
        self.rates, self.states = [], {0: self.state()}

    def state(self):
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def take(self, step):
        """One step of training, and a call of the recorder's, to be made by whoever asked."""
        data = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        self.optimizer.zero_grad()
        self.model(data).square().mean().backward()
        norm = clip_grad_norm_(self.model.parameters(), self.clip) if self.clip else None
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        self.scheduler.step()
        self.states[step + 1] = self.state()
        return lambda: self.recorder.step(norm)

    def go_on(self):
        for step in range(self.recorder.restore(), STEPS):
            self.take(step)()
        return self.recorder.trajectory()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    return described(Training(directory).go_on(), directory)


def require_right(training, run, uncounted=0):
    """Every checkpoint has the weights of its step, and every step of the optimizer its learning rate."""
    (stage,) = run.stages
    assert list(stage.lr_schedule) == training.rates[: len(training.rates) - uncounted]
    assert stage.checkpoints[-1].step == len(training.rates) - uncounted
    for checkpoint in stage.checkpoints:
        assert same(checkpoint.load(), training.states[checkpoint.step])


@contextmanager
def interrupting(at=None):
    """Raise KeyboardInterrupt at the n-th bytecode of recording and of writing files; yields their count."""
    count = [0]

    def trace(frame, event, _):
        if not frame.f_code.co_filename.startswith(TRACED):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            count[0] += 1
            if count[0] == at:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)


def bytecodes(tmp_path, step):
    """How many there are in the recorder's call after a step."""
    training = Training(tmp_path / "counted")
    for earlier in range(step):
        training.take(earlier)()
    call = training.take(step)
    with interrupting() as count:
        call()
    return count[0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of files that were just opened
@pytest.mark.parametrize("step", [0, 5], ids=["counts", "records"])
@pytest.mark.parametrize("after", ["trains on", "repeats", "begins anew", "stops"])
def test_interrupted_at_any_bytecode(tmp_path, whole, step, after):
    """Thirty places, the first and the last ones among them."""
    total = bytecodes(tmp_path, step)
    places = sorted({*range(1, 6), *range(total - 4, total + 1), *range(1, total, max(1, total // 20))})
    for place in places:
        directory = tmp_path / f"run{place}"
        training = Training(directory)
        for earlier in range(step):
            training.take(earlier)()
        call = training.take(step)
        with suppress(KeyboardInterrupt), interrupting(place):
            call()
        if after == "begins anew":
            del training, call
            training = Training(directory)
            assert described(training.go_on(), directory) == whole, place
            continue
        if after == "repeats" and place < total - 1:  # at the last two, it has ended
            call()
        if after != "stops":
            for later in range(step + 1, STEPS):
                training.take(later)()
        if after == "stops" and step == 0:
            with suppress(ValueError):  # nothing was recorded yet, if the call had not begun
                require_right(training, training.recorder.trajectory())
            continue
        run = training.recorder.trajectory()
        uncounted = len(training.rates) - run.stages[0].checkpoints[-1].step
        assert uncounted <= (after == "stops"), place
        require_right(training, run, uncounted)
        require_right(training, Trajectory.from_recorder(directory), uncounted)


@pytest.mark.parametrize("again", [False, True], ids=["trains on", "calls again"])
@pytest.mark.parametrize("place", range(1, 14))
def test_a_full_disk_that_was_caught(tmp_path, whole, monkeypatch, place, again):
    """ENOSPC at the n-th opening or renaming of a file."""
    count, real_open, real_replace = [0], Path.open, os.replace

    def failing(real):
        def call(*arguments, **options):
            count[0] += 1
            if count[0] == place:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **options)

        return call

    training = Training(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", failing(real_open))
        patch.setattr(os, "replace", failing(real_replace))
        for step in range(STEPS):
            call = training.take(step)
            try:
                call()
            except OSError:
                if again:
                    call()
    run = training.recorder.trajectory()
    require_right(training, run)
    assert not list(tmp_path.glob("*.partial"))
    if again:
        assert described(run, tmp_path) == whole
    del training, run
    assert described(Training(tmp_path).go_on(), tmp_path)[0]["checkpoints"][-1] == whole[0]["checkpoints"][-1]


@pytest.mark.parametrize("room", [0, 700])  # bytes of a file
def test_a_full_disk_is_named_with_what_helps(tmp_path, whole, room):
    """The system's own error, in whatever writes: torch puts one of its own in its place."""
    resource = pytest.importorskip("resource", reason="Windows has no limits of files")
    training, before = Training(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in range(STEPS):
        call = training.take(step)
        if step == 2 * EVERY - 1:
            said = (
                rf"{tmp_path}/step_0+6.pt cannot be written; make room \(or lift the limit\), then call step\(\) again"
            )
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
            try:
                with pytest.raises(OSError, match=said):
                    call()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
        call()
    assert described(training.recorder.trajectory(), tmp_path) == whole


def test_clipped_steps_keep_their_norms(tmp_path):
    """The call that was interrupted had begun, and so told of its norm."""
    clean = Training(tmp_path / "clean", clip=0.3)
    clean.go_on()
    training = Training(tmp_path / "run", clip=0.3)
    for step in range(STEPS):
        call = training.take(step)
        if step == 4:
            with suppress(KeyboardInterrupt), interrupting(150):
                call()
        else:
            call()
    factors = training.recorder.stage().clip_factors
    assert min(factors) < 1
    assert factors == clean.recorder.stage().clip_factors


def test_a_call_that_never_began_counts_without_clipping_alone(tmp_path):
    training = Training(tmp_path / "plain")
    training.take(0)
    training.take(1)()
    assert training.recorder.steps == 2
    require_right(training, training.recorder.trajectory())
    training = Training(tmp_path / "clipped", clip=0.3)
    training.take(0)
    call = training.take(1)
    with pytest.raises(ValueError, match=r"more than once since the recorder's step 0.*or restore\(\)"):
        call()
