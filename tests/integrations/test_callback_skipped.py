"""Steps that a GradScaler skips under a Trainer: the callback writes them down, and they are none."""

import json
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from source_proj.integrations import RecorderCallback

OVERFLOWING = [0, 3, 4, 8]
RATES = [0.0, 0.1, 0.2, 0.05, 0.0, 0.1]  # a warm-up from 0, which the optimizer counts


def trainer_run(directory, overflowing, *, fused=False, stop=None):
    """The Trainer's events, over steps some of which overflow; it ends at ``stop`` and is resumed there."""
    torch.manual_seed(0)
    model, scaler = nn.Linear(3, 2), GradScaler("cpu", init_scale=4.0)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1, fused=fused)
    optimizer.scaler = scaler  # as accelerate's wrapper of it has
    total = len(RATES) + len(overflowing)
    args = SimpleNamespace(label_smoothing_factor=0.0, max_grad_norm=0.5, world_size=1)
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=total)
    told = {"model": model, "optimizer": optimizer}
    data, made, last = torch.randn(len(RATES), 4, 3), 0, 0
    callback = RecorderCallback(directory, every=3)
    callback.on_train_begin(args, state, None, **told)
    for number in range(total):
        overflows = number in overflowing
        optimizer.param_groups[0]["lr"] = RATES[made]
        optimizer.zero_grad()
        scaler.scale(model(data[made]).square().mean() * (math.inf if overflows else 1.0)).backward()
        callback.on_pre_optimizer_step(args, state, None, **told)
        if not fused:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        made += not overflows
        state.global_step = last = number + 1
        callback.on_step_end(args, state, SimpleNamespace(should_training_stop=False), **told)
        if last == stop:
            callback = RecorderCallback(directory, every=3)
            callback.on_train_begin(args, state, None, **told)
    callback.on_train_end(args, state, None, **told)
    return callback.trajectory().stages[0]


@pytest.mark.parametrize("stop", [None, 5])
@pytest.mark.parametrize("fused", [False, True])
def test_times_are_those_of_the_updates_that_were_made(tmp_path, fused, stop):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no clip factor is assumed of a step that overflowed
        skipped = trainer_run(tmp_path / "skipped", OVERFLOWING, fused=fused, stop=stop)
        plain = trainer_run(tmp_path / "plain", [], fused=fused)
    assert list(skipped.skipped) == OVERFLOWING
    assert list(plain.skipped) == []
    numbers = [number for number in range(10) if number not in OVERFLOWING]
    assert [skipped.clip_factors[number] for number in numbers] == pytest.approx(plain.clip_factors)
    assert min(plain.clip_factors) < 0.9  # else nothing was clipped
    assert [c.step for c in skipped.checkpoints] == [3, 6, 9, 10]
    ends = [sum(number < c.step for number in numbers) for c in skipped.checkpoints]
    naive, done = [], 0.0
    for begin, end in zip([0, *ends], ends, strict=False):
        for t in range(begin, end):
            done += RATES[t] * plain.clip_factors[t] * math.sqrt(end / (t + 1))
        naive.append(done)
    assert skipped.lr_integrals == pytest.approx(naive)


def test_a_log_that_does_not_say_is_settled_by_the_optimizers_count(tmp_path):
    told = trainer_run(tmp_path, [3, 4, 7])
    file = tmp_path / "updates.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        line.pop("made", None)
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with pytest.warns(UserWarning, match="gradient norms were logged at some steps only"):
        untold = RecorderCallback(tmp_path).trajectory().stages[0]
    assert untold.skipped is None
    assert untold.lr_integrals == pytest.approx(told.lr_integrals)
