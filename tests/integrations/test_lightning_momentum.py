"""Momentum that goes in cycles, read from files of Lightning's form: every update has its own."""

import math

import pytest
import torch
from test_lightning import network
from torch.optim import lr_scheduler

import source_proj as sp

STEPS = (5, 10, 20)
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "dampened": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
}
SCHEDULES = {
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=24),
    "three phases": lambda o: lr_scheduler.OneCycleLR(
        o, 0.2, total_steps=24, three_phase=True, anneal_strategy="linear", pct_start=0.4, max_momentum=0.9
    ),
    "no momentum in it": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=24, cycle_momentum=False),
    "cycles": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=4),
}


def write(directory, optimizer, schedule, log=("lr", "momentum")):
    """A run by hand; gives the learning rate and the momentum of every update."""
    model, data = network(), torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    scheduler, used = SCHEDULES[schedule](optimizer), []
    for step in range(max(STEPS) + 1):
        if step in STEPS:
            states = {"optimizer_states": [optimizer.state_dict()], "lr_schedulers": [scheduler.state_dict()]}
            torch.save({"global_step": step, "state_dict": model.state_dict(), **states}, directory / f"{step}.ckpt")
        group = optimizer.param_groups[0]
        used.append((group["lr"], group["momentum"]))
        optimizer.zero_grad()
        model(data).square().mean().backward()
        optimizer.step()
        scheduler.step()
    values = {"lr": 0, "momentum": 1}
    header = ["step", *("lr-X" if name == "lr" else "lr-X-momentum" for name in log)]
    rows = [[str(t), *(repr(pair[values[name]]) for name in log)] for t, pair in enumerate(used)]
    (directory / "metrics.csv").write_text("\n".join(",".join(row) for row in [header, *rows]) + "\n")
    return used[: max(STEPS)]


def total(used, optimizer, end):
    share = 0.5 if optimizer == "dampened" else 1.0
    return math.fsum(rate * share / (1 - momentum) for rate, momentum in used[:end])


def times(stage):
    record = stage.describe()
    return [record.time_factor * integral for integral in record.lr_integrals]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_logged_momenta_enter_the_time(optimizer, schedule, tmp_path):
    used = write(tmp_path, optimizer, schedule)
    stage = sp.Trajectory.from_lightning(tmp_path).stages[0]
    assert times(stage) == pytest.approx([total(used, optimizer, step) for step in STEPS], rel=1e-9)
    assert (stage.time_factors is None) == (schedule == "no momentum in it")


@pytest.mark.parametrize("log", [(), ("lr",)])
@pytest.mark.parametrize("schedule", ["one cycle", "three phases", "no momentum in it"])
def test_one_cycle_is_replayed_from_its_saved_state(schedule, log, tmp_path):
    used = write(tmp_path, "sgd", schedule, log)
    stage = sp.Trajectory.from_lightning(tmp_path).stages[0]
    assert times(stage) == pytest.approx([total(used, "sgd", step) for step in STEPS], rel=1e-9)


def test_other_cycles_that_were_not_logged_are_asked_for(tmp_path):
    used = write(tmp_path, "sgd", "cycles", ["lr"])
    with pytest.raises(ValueError, match=r"momentum was .*log_momentum=True.* give momentum="):
        sp.Trajectory.from_lightning(tmp_path)
    own = [momentum for _, momentum in used]
    for given in (own, own.__getitem__):
        stage = sp.Trajectory.from_lightning(tmp_path, momentum=given).stages[0]
        assert times(stage) == pytest.approx([total(used, "sgd", step) for step in STEPS], rel=1e-9)
    adam = sp.Adam()
    with pytest.raises(ValueError, match="belongs to SGD and RMSprop, and the run was trained with Adam"):
        sp.Trajectory.from_lightning(tmp_path, optimizer=adam, preconditioner="none", momentum=(0.9).__float__)
    with pytest.raises(ValueError, match="momentum has 3 entries for the 20 updates"):
        sp.Trajectory.from_lightning(tmp_path, momentum=[0.9] * 3)


def test_momenta_that_contradict_the_log_are_refused(tmp_path):
    write(tmp_path, "sgd", "cycles")
    with pytest.raises(sp.MismatchError, match=r"the momentum gives 0\.5 for update 0, and 0\.9 was logged"):
        sp.Trajectory.from_lightning(tmp_path, momentum=lambda t: 0.5)
