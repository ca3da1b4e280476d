"""What the Recorder reads and writes."""

import pytest
import torch
from recorded_runs import STEPS, advance, described, linear, recorded, same, train, two_groups
from torch import nn
from torch.optim import lr_scheduler

import source_proj as sp
from source_proj.trajectory import SGD, Recorder, Stage, Trajectory


def test_records_the_run(tmp_path):
    recorder, model, start = train(tmp_path)
    run = recorder.trajectory(segments=[[0, 1], list(range(2, 9))])
    stage = run.stages[0].describe()
    assert start == 0
    assert stage.steps == (3, 5, 10, 15, 20, 25, 30, 35, 40)
    assert stage.optimizer == SGD(momentum=0.9, weight_decay=1e-3)
    weight = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    times = [segment.time for segment in stage.cut()]
    assert times == pytest.approx([10 * sum(rates[:5]), 10 * sum(rates[5:])], rel=1e-12)
    assert same(run.final.load(), model.state_dict())
    assert Trajectory.from_recorder(tmp_path, segments=[[0, 1], list(range(2, 9))]).stages[0].describe() == stage
    assert sorted(file.name for file in tmp_path.glob("optimizer_*")) == ["optimizer_00000040.pt"]


def test_the_present_state_becomes_the_final_checkpoint(tmp_path):
    recorder, model, _ = train(tmp_path, until=12)
    assert recorder.steps == 12
    run = recorder.trajectory()
    assert [c.step for c in run.stages[0].checkpoints] == [3, 5, 10, 12]
    assert same(run.final.load(), model.state_dict())
    assert described(recorder.trajectory()) == described(run)
    _, _, start = train(tmp_path, until=17)
    assert start == 12


def test_options_of_the_stage_are_passed_on(tmp_path):
    recorder, _, _ = train(tmp_path, until=5)
    stage = recorder.stage(segments=2, loss_reduction="sum", batch_size=8, accumulation=2)
    assert stage.loss_scale == 16
    assert stage.name == "train"
    again = Stage.from_recorder(tmp_path, segments=2, loss_reduction="sum", batch_size=8, accumulation=2)
    assert again.describe() == stage.describe()


def test_equal_groups_nesterov_and_tensor_rates_are_read(tmp_path):
    recorder = Recorder(*two_groups(), tmp_path / "a")
    advance(recorder)
    assert recorder.stage().optimizer == SGD(momentum=0.5)
    model, optimizer = linear(lr=torch.tensor(0.25), momentum=0.5, nesterov=True)
    recorder = Recorder(model, optimizer, tmp_path / "b")
    advance(recorder)
    assert recorder.stage().optimizer == SGD(momentum=0.5, nesterov=True)
    assert recorder.stage().lr_integrals == [0.25]
    recorder = Recorder(*linear(momentum=0.5, dampening=0.25), tmp_path / "c")
    advance(recorder)
    assert recorder.stage().optimizer == SGD(momentum=0.5, dampening=0.25)


def test_two_stages(tmp_path):
    first, second = recorded(tmp_path / "a", "pretrain"), recorded(tmp_path / "b", "finetune")
    run = Trajectory.from_stages([first.stage(segments=2), second.stage()])
    assert [stage.name for stage in run.stages] == ["pretrain", "finetune"]
    assert run.final.path == tmp_path / "b" / "step_00000002.pt"


@pytest.mark.parametrize("recorder_first", [True, False])
def test_the_scheduler_may_step_before_or_after(tmp_path, recorder_first):
    model, optimizer = linear()
    recorder = Recorder(model, optimizer, tmp_path, every=2)
    scheduler = lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    for _ in range(4):
        optimizer.step()
        for thing in (recorder, scheduler) if recorder_first else (scheduler, recorder):
            thing.step()
    rates = [0.1, 0.05, 0.025, 0.0125]
    assert recorder.stage().lr_integrals == pytest.approx([sum(rates[:2]), sum(rates)], rel=1e-14)


def test_a_step_that_the_optimizer_did_not_take_counts_nothing(tmp_path):
    recorder = Recorder(*linear(), tmp_path)
    advance(recorder)
    recorder.step()
    advance(recorder)
    assert recorder.steps == 3
    assert recorder.stage().lr_integrals == [pytest.approx(0.2, rel=1e-14)]


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [2, 5, 5]),
        lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=9, cycle_momentum=False),
        lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3),
    ],
)
@pytest.mark.parametrize("stop", [1, 4])
def test_schedulers_go_on(tmp_path, scheduler, stop):
    def run(directory, until):
        model, optimizer = linear()
        schedule = scheduler(optimizer)
        recorder = Recorder(model, optimizer, directory, every=1, also=[schedule])
        for _ in range(recorder.restore(), until):
            optimizer.step()
            schedule.step()
            recorder.step()
        return recorder.stage().lr_integrals

    run(tmp_path / "stopped", stop)
    assert run(tmp_path / "stopped", 8) == run(tmp_path / "whole", 8)


class Wrapped:
    """As Lightning's optimizers are: no optimizer of torch, with one inside."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


@pytest.mark.parametrize("capture", [{}, {"capture": sp.Sketch(8), "task": sp.Regression()}], ids=["", "capture"])
@pytest.mark.parametrize("kind", ["SGD", "RAdam"])
def test_optimizers_in_wrappers_are_recorded_as_those_within(kind, capture, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()  # one for the process: loops of other tests may have left theirs
    torch.manual_seed(0)
    inputs, targets = torch.randn(8, 3), torch.randn(8, 1)
    stages = []
    for wrapped in (False, True):
        torch.manual_seed(1)
        model = nn.Linear(3, 1)
        optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.1)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        if wrapped:
            model, optimizer = accelerator.prepare(model, optimizer)
        recorder = sp.Recorder(model, optimizer, tmp_path / str(wrapped), every=4, **capture)
        for _ in range(recorder.restore(), 12):
            optimizer.zero_grad()
            for half in (slice(0, 4), slice(4, 8)):
                with accelerator.accumulate(model):
                    loss = nn.functional.mse_loss(model(inputs[half]), targets[half])
                    if wrapped:
                        accelerator.backward(loss)
                        optimizer.step()  # at the second half alone
                    else:
                        (loss / 2).backward()
            if not wrapped:
                optimizer.step()
            recorder.step(**({"ids": range(8)} if capture else {}))
        stages.append(recorder.stage())
    plain, own = stages
    assert own.lr_integrals == plain.lr_integrals
    assert own.optimizer == plain.optimizer
    assert torch.equal(own.checkpoints[-1].load()["weight"], plain.checkpoints[-1].load()["weight"])
    bare = nn.Linear(3, 1)
    inner = torch.optim.SGD(bare.parameters(), lr=0.1)
    assert Recorder(bare, Wrapped(Wrapped(inner)), tmp_path / "bare").stage
