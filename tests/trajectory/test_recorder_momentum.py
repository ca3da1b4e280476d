"""Momentum that changes from step to step: what a gradient moves the weights by in all, against torch's own steps."""

from math import prod

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from source_proj._errors import MismatchError
from source_proj.trajectory import Recorder, Trajectory
from source_proj.trajectory.optimizers import Updates

KINDS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "dampened": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, eps=1.0, weight_decay=0.0),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, eps=1.0),
}
SCHEDULES = {
    "one cycle": lambda optimizer, steps: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps),
    "cycles": lambda optimizer, steps: lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=steps // 4),
    "constant": lambda optimizer, _: lr_scheduler.ConstantLR(optimizer, 1.0),
}


def run(directory, kind, schedule, until=200, steps=200, every=50):
    """A weight whose gradient is always one; 1/(√v + ε) is then ½ with Adam, once bias-corrected."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = KINDS[kind](model.parameters())
    scheduler = SCHEDULES[schedule](optimizer, steps + 1)
    recorder = Recorder(model, optimizer, directory, every=every, also=[scheduler])
    for _ in range(recorder.restore(), until):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        scheduler.step()
        recorder.step()
    return recorder, model


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["SGD", "Nesterov", "dampened"])
def test_times_are_what_the_weights_moved(tmp_path, kind, schedule):
    """Under a gradient of one, the weight moves by the time of the run, less what momentum still holds at its end."""
    recorder, model = run(tmp_path, kind, schedule, until=1000, steps=1000, every=500)
    (whole,) = recorder.stage().describe().cut(1)
    assert whole.time == pytest.approx(-model.weight.item(), rel=0.02)


def test_one_cycle_counts_84_and_not_202(tmp_path):
    recorder, model = run(tmp_path, "SGD", "one cycle")
    stage = recorder.stage()
    (whole,) = stage.describe().cut(1)
    assert -model.weight.item() == pytest.approx(84, rel=0.01)
    assert whole.time == pytest.approx(84, rel=0.05)
    assert min(stage.time_factors) == pytest.approx(1 / (1 - 0.85), rel=0.01)
    assert max(stage.time_factors) == pytest.approx(1 / (1 - 0.95), rel=0.01)


@pytest.mark.parametrize("schedule", ["one cycle", "cycles"])
def test_adam_moves_by_its_learning_rates(tmp_path, schedule):
    """The first moment is a mean, whatever its β₁: all its steps together move by Σ lr, P being a half."""
    recorder, model = run(tmp_path, "AdamW", schedule, until=1000, steps=1000, every=500)
    stage = recorder.stage(preconditioner="none")
    assert stage.time_factors is None
    (whole,) = stage.describe().cut(1)
    assert whole.time / 2 == pytest.approx(-model.weight.item(), rel=0.02)


def test_rmsprop_is_recorded(tmp_path):
    stage = run(tmp_path, "RMSprop", "one cycle")[0].stage(preconditioner="none")
    rates, factors = stage.lr_schedule, stage.time_factors
    own = stage.optimizer.step_factors(Updates(rates, [c.step for c in stage.checkpoints]))
    (whole,) = stage.describe().cut(1)
    assert whole.time == pytest.approx(sum(map(prod, zip(rates, factors, own, strict=True))))


def test_nadams_momentum_makes_each_steps_length_and_must_stay(tmp_path):
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.NAdam(model.parameters(), lr=0.1)
    recorder = Recorder(model, optimizer, tmp_path)
    optimizer.param_groups[0]["betas"] = (0.8, 0.999)
    model(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    with pytest.raises(MismatchError, match=r"betas=\(0.8, 0.999\) was \(0.9, 0.999\)"):
        recorder.step()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_in_the_middle_of_a_cycle_goes_on(tmp_path, kind):
    whole, model = run(tmp_path / "whole", kind, "one cycle")
    run(tmp_path / "parts", kind, "one cycle", until=130)
    parts, again = run(tmp_path / "parts", kind, "one cycle")
    assert torch.equal(model.weight, again.weight)
    ends = [recorder.stage(segments=2, preconditioner="none") for recorder in (whole, parts)]
    assert ends[0].describe().cut() == ends[1].describe().cut()
    assert ends[0].time_factors == ends[1].time_factors
    assert Trajectory.from_recorder(tmp_path / "parts").stages[0].time_factors == ends[0].time_factors


def test_weight_decay_goes_with_the_momentum(tmp_path):
    """Torch's SGD adds the decay to the gradient: what it does in all changes with the momentum as that does."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5, weight_decay=0.2)
    recorder = Recorder(model, optimizer, tmp_path)
    for momentum in (0.5, 0.75, 0.9):
        optimizer.param_groups[0]["momentum"] = momentum
        optimizer.step()
        recorder.step()
    (whole,) = recorder.stage().describe().cut(1)
    assert whole.time == pytest.approx(0.1 * (2 + 4 + 10))
    assert whole.decay == pytest.approx(0.2)


def test_a_momentum_that_never_ends_is_refused(tmp_path):
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    recorder = Recorder(model, optimizer, tmp_path)
    optimizer.param_groups[0]["momentum"] = 1.0
    optimizer.step()
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\), got 1.0"):
        recorder.step()


def test_another_momentum_is_another_run_unless_it_cycles(tmp_path):
    run(tmp_path, "SGD", "constant", until=50)
    model = nn.Linear(1, 1, bias=False).double()
    with pytest.raises(MismatchError, match=r"optimizer is SGD\(momentum=0.9"):
        Recorder(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5), tmp_path)
