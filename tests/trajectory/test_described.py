"""A stage is described as its optimizer's own states say: nothing in a score shows what was forgotten."""

from contextlib import suppress
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import source_proj as sp
from source_proj.gradients import ParameterSpace
from source_proj.trajectory.optimizers.describe import describe_state

KINDS = {
    "SGD": {"momentum": 0.9, "weight_decay": 0.1},
    "Adam": {"betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1},
    "AdamW": {"amsgrad": True},
    "NAdam": {},
    "RAdam": {"weight_decay": 0.1},
    "Adamax": {"eps": 1e-6},
    "RMSprop": {"alpha": 0.9, "momentum": 0.5, "centered": True},
    "Adagrad": {"lr_decay": 0.1},
}
OTHER = {"eps": 1e-3, "alpha": 0.5, "momentum": 0.25, "lr_decay": 0.3, "dampening": 0.2, "momentum_decay": 0.1}


def trained(kind, steps=4, wrap=lambda state: state, groups=lambda model: model.parameters(), **options):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = getattr(torch.optim, kind)(groups(model), lr=0.01, **options)
    points = []
    for step in range(1, steps + 1):
        for p in model.parameters():
            p.grad = torch.randn(p.shape)
        optimizer.step()
        points.append(sp.Checkpoint(model.state_dict(), step, lr=0.01, optimizer_state=wrap(optimizer.state_dict())))
    return points, describe_state(optimizer.state_dict(), kind, [["weight", "bias"]])


def resolve(points, optimizer, **options):
    model = nn.Linear(3, 2)
    run = sp.Trajectory(points, optimizer=optimizer, **options)
    return run.resolve(model, ParameterSpace.from_model(model))


def changed(optimizer, name):
    """Another value of a field, where it makes another optimizer."""
    value = getattr(optimizer, name)
    if name == "groups":
        return None
    if name == "weight_decay":
        return 0.0 if value else None
    if name == "betas":
        return (value[0], 0.5)
    if name == "nesterov":
        return None if getattr(optimizer, "dampening", 0) else True
    if isinstance(value, bool):
        return None if name == "decoupled" and not optimizer.weight_decay else not value
    return OTHER[name]


@pytest.mark.parametrize("kind", KINDS)
def test_each_option_that_is_described_otherwise_is_named(kind):
    points, optimizer = trained(kind, **KINDS[kind])
    resolve(points, optimizer)
    for name in (field.name for field in fields(optimizer)):
        value = changed(optimizer, name)
        if value is None:
            continue
        other = replace(optimizer, **{name: value})
        said = rf"is of .*{name}=.* is described by .*{name}=.*: give optimizer="
        # A state may lack what the other option needs, which is refused.
        with pytest.warns(UserWarning, match=said), suppress(sp.MismatchError):
            resolve(points, other)
        if name not in ("momentum", "dampening", "nesterov", "lr_decay"):
            resolve(points, other, preconditioner="none")


def test_the_first_mean_is_no_matter():
    points, optimizer = trained("Adam", betas=(0.8, 0.9))
    resolve(points, replace(optimizer, betas=(0.9, 0.9)))


@pytest.mark.parametrize("as_file", [False, True])
def test_another_optimizer_is_refused_also_where_none_was_named(as_file, tmp_path):
    def kept(state):
        torch.save(state, tmp_path / "optimizer.pt")
        return tmp_path / "optimizer.pt"

    points, _ = trained("AdamW", wrap=kept if as_file else lambda state: state)
    remedy = r"give optimizer=source_proj.Adam\(betas=\(0.9, 0.999\), .*weight_decay=0.01\)"
    with pytest.raises(sp.MismatchError, match=rf"is of Adam\(.*described by SGD\(\): {remedy}"):
        resolve(points, sp.SGD())


def test_what_groups_do_not_agree_on_may_be_described_by_any():
    def groups(model):
        return [{"params": [model.weight], "betas": (0.9, 0.9)}, {"params": [model.bias], "betas": (0.9, 0.99)}]

    def named(state):
        names = [["weight"], ["bias"]]
        own = [{**group, "param_names": n} for group, n in zip(state["param_groups"], names, strict=True)]
        return {**state, "param_groups": own}

    points, _ = trained_in_groups(groups, named)
    for beta in (0.9, 0.99, 0.95):
        resolve(points, sp.Adam(betas=(0.9, beta), weight_decay=0.01))
    with pytest.warns(UserWarning, match=r"described by Adam\(eps=0.1\)"):
        resolve(points, sp.Adam(eps=0.1, weight_decay=0.01))


def trained_in_groups(groups, wrap):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(groups(model), lr=0.01)
    for p in model.parameters():
        p.grad = torch.randn(p.shape)
    optimizer.step()
    return [sp.Checkpoint(model.state_dict(), 1, lr=0.01, optimizer_state=wrap(optimizer.state_dict()))], optimizer


@pytest.mark.parametrize("preconditioner", ["scalar", "per_segment"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"optimizer": state},
        lambda state: {"optimizer_state_dict": {"base_optimizer_state": state, "loss_scaler": None}},
        lambda state: [state],
        lambda state: {"model": {"weight": torch.ones(1)}, "optimizer": state, "epoch": 3},
    ],
)
def test_a_state_within_others_is_copied_too(wrap, preconditioner):
    """Tensors of a ``state_dict()`` are live: checkpoints of wrapped ones had the second moments of the run's end."""
    options = {"segments": 4, "preconditioner": preconditioner}
    (plain, optimizer), (wrapped, _) = trained("AdamW"), trained("AdamW", wrap=wrap)
    expected, found = (resolve(points, optimizer, **options) for points in (plain, wrapped))
    assert found.record == expected.record
    assert all(torch.equal(found.scales[name].values, expected.scales[name].values) for name in expected.scales)


def test_an_optimizer_in_place_of_its_state_is_named():
    model = nn.Linear(3, 2)
    with pytest.raises(TypeError, match=r"optimizer_state must be .*, got Adam: give its state_dict\(\)"):
        sp.Checkpoint(model.state_dict(), 1, optimizer_state=torch.optim.Adam(model.parameters()))


def scheduled(lr, schedule, optimizer=torch.optim.SGD):
    """Checkpoints that all claim one rate, of a run that a scheduler took through others."""
    model = nn.Linear(3, 2)
    trainer = optimizer(model.parameters(), lr=0.01)
    scheduler = schedule(trainer)
    points = []
    for step in range(1, 5):
        for p in model.parameters():
            p.grad = torch.randn(p.shape)
        trainer.step()
        scheduler.step()
        points.append(sp.Checkpoint(model.state_dict(), step, lr=lr, optimizer_state=trainer.state_dict()))
    return points, describe_state(trainer.state_dict(), "the run")


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_constant_rate_that_was_none_is_warned_of(optimizer):
    def falling(trainer):
        return torch.optim.lr_scheduler.ExponentialLR(trainer, 0.5)

    points, described = scheduled(0.01, falling, optimizer)
    with pytest.warns(UserWarning, match=r"step=1, lr=0.01\): .* rate 0.005: where it changed give lr_schedule"):
        resolve(points, described)
    resolve(points, described, lr_schedule=lambda step: 0.01 * 0.5**step)


@pytest.mark.parametrize("last", [1, 2, 3, 4])
def test_a_rate_that_falls_behind_the_last_checkpoint_was_constant_until_then(last):
    def drop(trainer):
        return torch.optim.lr_scheduler.StepLR(trainer, last)

    points, described = scheduled(0.01, drop)
    resolve(points[:last], described)
    if last < 4:
        with pytest.warns(UserWarning, match=f"step={last}, .* rate 0.001: "):
            resolve(points[: last + 1], described)


@given(st.lists(st.integers(0, 4), min_size=2, max_size=6), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_more_updates_than_steps_are_none(skipped, each):
    """Checkpoints after ``each`` updates and some that were skipped; and counted by checkpoints, as epochs are."""
    points, optimizer = trained("AdamW", steps=each * len(skipped))
    own = points[each - 1 :: each]
    steps = [each * (place + 1) + sum(skipped[: place + 1]) for place in range(len(own))]
    resolve([moved(point, step) for point, step in zip(own, steps, strict=True)], optimizer)
    epochs = [moved(point, epoch) for epoch, point in enumerate(own, 1)]
    if each == 1:
        resolve(epochs, optimizer)
    else:
        with pytest.warns(UserWarning, match=rf"made {each} updates between .* steps 1 and 2 .* not epochs"):
            resolve(epochs, optimizer)


def moved(point, step):
    return sp.Checkpoint(point.load(), step, lr=0.01, optimizer_state=point.optimizer_state)


@pytest.mark.parametrize("preconditioner", ["scalar", "shared", "per_segment", "factored"])
def test_what_moved_without_a_second_moment_is_named(preconditioner):
    """As where one optimizer trains matrices and another one the rest, and the state of one was saved."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    model[2].requires_grad_(False)
    matrices = torch.optim.SGD([model[0].weight], lr=0.1)
    rest = torch.optim.AdamW([(n, p) for n, p in model.named_parameters() if n != "0.weight" and p.requires_grad])
    points = []
    for step in (1, 2):
        for p in model.parameters():
            p.grad = torch.randn(p.shape)
        matrices.step()
        rest.step()
        points.append(sp.Checkpoint(model.state_dict(), step, lr=1e-3, optimizer_state=rest.state_dict()))
    run = sp.Trajectory(points, optimizer=sp.Adam(weight_decay=0.01), preconditioner=preconditioner)
    space = ParameterSpace.from_model(model)
    with pytest.raises(sp.MismatchError, match=r"parameters: 0.weight moved .* 'train'.*parameters=\['!0.weight'\]"):
        run.resolve(model, space)
    run.resolve(model, ParameterSpace.from_model(model, ["!0.weight"]))  # what stood still needs none
    sp.Trajectory(points, optimizer=sp.Adam(weight_decay=0.01), preconditioner="none").resolve(model, space)
