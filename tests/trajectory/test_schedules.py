"""Rates of torch's schedulers, replayed, against those that training had; schedules that states contradict."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler as torch_schedulers

import source_proj as sp

STEPS = 24
SCHEDULERS = {
    "step": lambda o: torch_schedulers.StepLR(o, 3, gamma=0.5),
    "milestones": lambda o: torch_schedulers.MultiStepLR(o, [2, 5], gamma=0.3),
    "exponential": lambda o: torch_schedulers.ExponentialLR(o, 0.9),
    "cosine": lambda o: torch_schedulers.CosineAnnealingLR(o, 7, eta_min=1e-3),
    "restarts": lambda o: torch_schedulers.CosineAnnealingWarmRestarts(o, 4, T_mult=2),
    "polynomial": lambda o: torch_schedulers.PolynomialLR(o, 20, power=2),
    "function": lambda o: torch_schedulers.LambdaLR(o, lambda t: 1 / (1 + t)),
    "product": lambda o: torch_schedulers.MultiplicativeLR(o, lambda t: 0.95),
    "cycle": lambda o: torch_schedulers.OneCycleLR(o, 0.3, total_steps=STEPS + 1),
    "triangles": lambda o: torch_schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=3, mode="triangular2"),
    "chain": lambda o: torch_schedulers.ChainedScheduler(
        [torch_schedulers.LinearLR(o, 0.1, total_iters=4), torch_schedulers.ExponentialLR(o, 0.9)]
    ),
    "warm-up": lambda o: torch_schedulers.SequentialLR(
        o,
        [torch_schedulers.LinearLR(o, 0.1, total_iters=4), torch_schedulers.CosineAnnealingLR(o, 9)],
        milestones=[4],
    ),
}


def trained(make, every, rates=(0.2,)):
    """A model, an optimizer's state at each step, and what rate and momentum each update had."""
    torch.manual_seed(0)
    parts = [nn.Linear(2, 1) for _ in rates]
    groups = [{"params": part.parameters(), "lr": rate} for part, rate in zip(parts, rates, strict=True)]
    optimizer = torch.optim.SGD(groups, lr=rates[0], momentum=0.9)
    scheduler, had, kept = make(optimizer), [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's SequentialLR warns of its own call
        for step in range(STEPS):
            optimizer.zero_grad()
            sum(part(torch.ones(1, 2)).sum() for part in parts).backward()
            had.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
            optimizer.step()
            if (step + 1) % every == 0:
                scheduler.step()
            if step % 6 == 5:
                states = ({k: v.clone() for k, v in nn.Sequential(*parts).state_dict().items()}, optimizer.state_dict())
                kept.append((step + 1, *states))
    return nn.Sequential(*parts), had, kept


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_rates_are_those_that_training_had(name, every):
    make, (_, had, _) = SCHEDULERS[name], trained(SCHEDULERS[name], every)
    assert sp.scheduler_rates(make, 0.2, STEPS, every=every) == [rate for rate, _ in had]
    changed = [beta for _, beta in had]
    if len(set(changed)) > 1:
        assert sp.scheduler_rates(make, 0.2, STEPS, every=every, momentum=True) == changed


def test_rates_of_groups_are_the_first_ones():
    def make(optimizer):
        return torch_schedulers.LambdaLR(optimizer, [lambda t: 1 / (1 + t), lambda t: 1.0])

    _, had, _ = trained(make, 2, (0.2, 0.5))
    assert sp.scheduler_rates(make, [0.2, 0.5], STEPS, every=2) == [rate for rate, _ in had]


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(sorted(SCHEDULERS)), st.integers(1, 40), st.integers(1, 9))
def test_fewer_steps_are_the_first_ones(name, steps, every):
    steps = min(steps, STEPS)
    whole = sp.scheduler_rates(SCHEDULERS[name], 0.2, STEPS, every=every)
    assert sp.scheduler_rates(SCHEDULERS[name], 0.2, steps, every=every) == whole[:steps]


def test_what_is_no_schedule_is_refused_with_what_to_give():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    with pytest.raises(TypeError, match="depend on how training went"):
        sp.scheduler_rates(torch_schedulers.ReduceLROnPlateau, 0.1, 3)
    with pytest.raises(TypeError, match=r"must make a scheduler of torch .* got None"):
        sp.scheduler_rates(lambda _: None, 0.1, 3)
    with pytest.raises(ValueError, match="steps"):
        sp.scheduler_rates(SCHEDULERS["step"], 0.1, 0)
    with pytest.raises(TypeError, match="every"):
        sp.scheduler_rates(SCHEDULERS["step"], 0.1, 3, every=1.5)
    checkpoint = sp.Checkpoint(nn.Linear(2, 1).state_dict(), 10)
    with pytest.raises(TypeError, match=r"is a StepLR.*scheduler_rates\(lambda optimizer: StepLR\(optimizer, \.\.\.\)"):
        _ = sp.Trajectory([checkpoint], lr_schedule=SCHEDULERS["step"](optimizer)).stages[0].time_scale


def built(tmp_path, kept, rates, model):
    checkpoints = [sp.Checkpoint(weights, step, optimizer_state=state) for step, weights, state in kept]
    run = sp.Trajectory(checkpoints, optimizer=sp.SGD(momentum=0.9), lr_schedule=rates)
    data = [(torch.randn(2), torch.randn(1)) for _ in range(6)]
    return sp.build(model, sp.Regression(), run, data, tmp_path / "bank", sketch=sp.Sketch(8), progress=False)


@pytest.mark.parametrize("every", [1, 6, 24])
@pytest.mark.parametrize("name", ["step", "cosine", "function", "warm-up"])
def test_a_schedule_that_states_confirm_says_nothing(tmp_path, name, every):
    model, _, kept = trained(SCHEDULERS[name], every)
    built(tmp_path, kept, sp.scheduler_rates(SCHEDULERS[name], 0.2, STEPS, every=every), model)


@pytest.mark.parametrize("name", ["step", "cosine", "function"])
def test_a_schedule_that_states_contradict_is_warned_of(tmp_path, name):
    """A scheduler that stepped after each epoch, taken for one that stepped after each update."""
    model, _, kept = trained(SCHEDULERS[name], 6)
    rates = sp.scheduler_rates(SCHEDULERS[name], 0.2, STEPS)
    with pytest.warns(UserWarning, match=r"optimizer_state has the learning rate 0\.\d+, and lr_schedule gives"):
        built(tmp_path, kept, rates, model)


@pytest.mark.parametrize("beta", [0.9, 0.8500001, 0.95])
def test_a_momentum_that_a_scheduler_moves_is_integrated_where_it_is_told(tmp_path, beta):
    """Any one momentum is wrong, the last one most of all; the moved one is that of a recorder's run."""
    make = SCHEDULERS["cycle"]
    model, had, kept = trained(make, 1)
    rates, momenta = ([pair[place] for pair in had] for place in (0, 1))
    checkpoints = [sp.Checkpoint(weights, step, optimizer_state=state) for step, weights, state in kept]
    data = [(torch.randn(2), torch.randn(1)) for _ in range(6)]

    def build(name, **options):
        run = sp.Trajectory(checkpoints, optimizer=sp.SGD(momentum=beta), lr_schedule=rates, **options)
        return sp.build(model, sp.Regression(), run, data, tmp_path / name, sketch=sp.Sketch(8), progress=False)

    with pytest.warns(
        UserWarning, match=r"moved the momentum between 0\.85 and 0\.95.*time_factors=\[1 / \(1 - beta\)"
    ):
        build("one")
    moved = sp.scheduler_rates(make, 0.2, STEPS, momentum=True)
    assert moved == momenta
    bank = build("moved", time_factors=[1 / (1 - each) for each in moved])
    expected = sum(rate / (1 - each) for rate, each in zip(rates, momenta, strict=True))
    assert sum(segment.time for segment in sp.Source(bank).segments) == pytest.approx(expected)
