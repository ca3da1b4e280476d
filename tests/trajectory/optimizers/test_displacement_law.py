"""The law of every optimizer: replaying a run with its gradients nudged moves the weights as its class says.

A class says: Σ over updates of rate · step factor · P of the next checkpoint, times the time factor. The run says: the
derivative of the final weights by one gradient, summed over all gradients; taken as a central difference of two replays
in which every gradient is larger, or smaller, by a little. Gradients are noise of many sizes: each coordinate its own.
"""

import math

import pytest
import torch
from torch import nn

from source_proj.trajectory import Checkpoint, Recorder, Stage, moments
from source_proj.trajectory.optimizers.describe import describe_live, describe_state

STEPS, EVERY, SIZE = 600, 60, (40, 60)
NUDGE = 1e-4  # of each coordinate's own size


def warmup_cosine(t):
    return min(1.0, (t + 1) / 60) * 0.5 * (1 + math.cos(math.pi * t / STEPS))


def one_cycle(t):
    """Peak at three tenths."""
    return math.sin(0.5 * math.pi * min(t / (0.3 * STEPS), (STEPS - t) / (0.7 * STEPS))) ** 2 + 0.01


SCHEDULES = {"constant": lambda _: 1.0, "warm-up and cosine": warmup_cosine, "one cycle": one_cycle}


def adafactor(parameters):
    transformers = pytest.importorskip("transformers")
    return transformers.Adafactor(parameters, lr=1e-3, scale_parameter=False, relative_step=False)


def schedule_free(name, **options):
    def make(parameters):
        optimizer = getattr(pytest.importorskip("schedulefree"), name)(parameters, lr=1e-3, **options)
        optimizer.train()
        return optimizer

    return make


def of_torch(name, **options):
    return lambda parameters: getattr(torch.optim, name)(parameters, **{"lr": 1e-3, **options})


ROWS = {
    "sgd": of_torch("SGD"),
    "momentum": of_torch("SGD", momentum=0.9),
    "nesterov": of_torch("SGD", momentum=0.9, nesterov=True),
    "dampening": of_torch("SGD", momentum=0.9, dampening=0.5),
    "adam": of_torch("Adam"),
    "adamw": of_torch("AdamW", weight_decay=0.0),
    "amsgrad": of_torch("AdamW", weight_decay=0.0, amsgrad=True),
    "nadam": of_torch("NAdam"),
    "radam": of_torch("RAdam"),
    "adamax": of_torch("Adamax"),
    "rmsprop": of_torch("RMSprop"),
    "rmsprop, momentum": of_torch("RMSprop", momentum=0.9),
    "rmsprop, centered": of_torch("RMSprop", centered=True),
    "adagrad": of_torch("Adagrad"),
    "adagrad, lr_decay": of_torch("Adagrad", lr_decay=1e-3),
    "adafactor": adafactor,
    "schedule-free sgd": schedule_free("SGDScheduleFree"),
    "schedule-free adamw": schedule_free("AdamWScheduleFree"),
    "schedule-free adamw, warm-up": schedule_free("AdamWScheduleFree", warmup_steps=100),
}


def replay(make, schedule, nudge, checkpoints=None, before=0):
    """The weights at the end; checkpoints are appended on the way if wanted. What is before is not nudged."""
    torch.manual_seed(0)
    model = nn.Linear(SIZE[1], SIZE[0], bias=False).double()
    with torch.no_grad():
        model.weight.zero_()
    # Sizes from row to row and from column to column, which Adafactor's factors can hold
    size = torch.logspace(-1, 1, SIZE[0], dtype=torch.float64)[:, None] * torch.logspace(-1, 0, SIZE[1]).double()
    optimizer = make(list(model.named_parameters()))
    base = optimizer.param_groups[0]["lr"]
    for t in range(-before, STEPS):
        optimizer.param_groups[0]["lr"] = base * schedule(max(t, 0))
        model.weight.grad = size * (torch.randn(SIZE, dtype=torch.float64) + (nudge if t >= 0 else 0.0))
        optimizer.step()
        if checkpoints is not None and t >= 0 and (t + 1) % EVERY == 0:
            checkpoints.append(Checkpoint(model.state_dict(), t + 1, optimizer_state=optimizer.state_dict()))
    return model, optimizer, size


def shares(row, rate, before=0):
    """What the run says a nudge does, over what the class says: in all, and by rows of the matrix."""
    make = ROWS[row]
    ends = [replay(make, rate, nudge, before=before)[0].weight.detach() for nudge in (-NUDGE, NUDGE)]
    checkpoints: list[Checkpoint] = []
    model, optimizer, size = replay(make, rate, 0.0, checkpoints, before)
    true = (ends[0] - ends[1]) / (2 * NUDGE * size)  # (rows, columns): Σ_t ∂θ_T/∂g_t, less
    described = describe_live(optimizer, model)
    assert describe_state(optimizer.state_dict(), row) == described
    stage = Stage("train", checkpoints, described, lr_schedule=lambda t: 1e-3 * rate(t))
    times = [end - begin for begin, end in zip([0.0, *stage.lr_integrals], stage.lr_integrals, strict=False)]
    said = torch.zeros(SIZE, dtype=torch.float64)
    for checkpoint, time, plain in zip(checkpoints, times, stage.plain_shares, strict=True):
        one = torch.ones(SIZE, dtype=torch.float64)
        p = (
            dict(moments(checkpoint, described, model, plain))["weight"].preconditioner
            if described.preconditioned
            else one
        )
        said += described.time_factor * time * p
    return float((true * size).sum() / (said * size).sum()), (true * size).sum(1) / (said * size).sum(1)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("row", ROWS)
def test_replayed_displacement_is_what_the_class_says(row, schedule):
    whole, by_row = shares(row, SCHEDULES[schedule])
    assert whole == pytest.approx(1.0, abs=0.05)
    assert by_row.sub(1).abs().max() < 0.25  # sizes of rows differ a hundredfold


@pytest.mark.parametrize("row", [row for row in ROWS if not row.startswith("schedule-free")])
def test_an_optimizer_may_go_on_from_an_earlier_stage(row):
    whole, by_row = shares(row, SCHEDULES["constant"], before=300)
    assert whole == pytest.approx(1.0, abs=0.05)
    assert by_row.sub(1).abs().max() < 0.25


@pytest.mark.parametrize("row", [row for row in ROWS if row.startswith("schedule-free")])
def test_an_average_that_began_in_an_earlier_stage_is_refused(row, tmp_path):
    with pytest.raises(ValueError, match=r"had averaged over 30 steps when the stage began.*make the optimizer anew"):
        shares(row, SCHEDULES["constant"], before=30)
    model, optimizer, _ = replay(ROWS[row], SCHEDULES["constant"], 0.0)
    with pytest.raises(ValueError, match="had averaged over 600 steps"):
        Recorder(model, optimizer, tmp_path)
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("row", ["radam", "nadam", "rmsprop", "adagrad"])
@pytest.mark.parametrize("reset", [7, 12])
def test_a_state_that_was_begun_anew_ends_a_stage(row, reset, tmp_path):
    model = nn.Linear(3, 2)
    optimizer = ROWS[row](list(model.named_parameters()))
    recorder = Recorder(model, optimizer, tmp_path, every=5)
    for step in range(20):
        if step == reset:
            optimizer.state.clear()
        for p in model.parameters():
            p.grad = torch.randn(p.shape)
        optimizer.step()
        recorder.step()
    with pytest.raises(
        ValueError, match=f"begun anew between steps {reset // 5 * 5} and {reset // 5 * 5 + 5}.*its own"
    ):
        recorder.trajectory()
