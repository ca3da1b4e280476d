"""A Recorder whose optimizer is not the one that trains: its steps would all pass for skipped ones."""

import pytest
import torch
from recorded_runs import linear
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

import source_proj as sp
from source_proj._errors import MismatchError


def loop(model, optimizer, recorder, steps, *, scaler=None, clamp=False, huge=False):
    x, y = torch.ones(4, 2), torch.full((4, 1), 3e38 if huge else 1.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.l1_loss(model(x), y) if not huge else (model(x) * y).sum()
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        if clamp:
            with torch.no_grad():
                model.weight.clamp_(-5, 5)
        recorder.step()


def test_an_optimizer_that_took_the_place_of_the_recorded_one_is_noticed(tmp_path):
    model, optimizer = linear()
    recorder = sp.Recorder(model, optimizer, tmp_path / "run", every=5)
    loop(model, optimizer, recorder, 5)
    with pytest.raises(
        MismatchError, match=r"weights moved until step 6 by .* another optimizer, Adam, and not of the SGD"
    ):
        loop(model, torch.optim.Adam(model.parameters(), lr=0.01), recorder, 10)


def test_whoever_else_moves_the_weights_is_noticed_after_some_steps(tmp_path):
    model, optimizer = linear()
    recorder = sp.Recorder(model, optimizer, tmp_path / "run", every=5)
    loop(model, optimizer, recorder, 5)
    with pytest.raises(MismatchError, match=r"weights moved until step 8, and the SGD that is recorded made none"):
        loop(model, ByHand(model.parameters()), recorder, 10)


class ByHand:
    """No optimizer of torch's."""

    def __init__(self, parameters):
        self.parameters = list(parameters)

    def zero_grad(self):
        for parameter in self.parameters:
            parameter.grad = None

    def step(self):
        with torch.no_grad():
            for parameter in self.parameters:
                parameter -= 0.01 * parameter.grad


class Silent:
    """Takes no notes of steps."""

    def step(self):
        pass


def test_a_single_step_of_another_optimizer_is_noticed_at_the_end(tmp_path):
    model, optimizer = linear()
    recorder = sp.Recorder(model, optimizer, tmp_path / "run", every=5)
    loop(model, optimizer, recorder, 6)
    loop(model, torch.optim.SGD(model.parameters(), lr=0.01), Silent(), 1)
    for _ in range(2):
        with pytest.raises(MismatchError, match="weights moved until step 6 by a step of another optimizer, SGD"):
            recorder.trajectory()
    assert sp.Trajectory.from_recorder(tmp_path / "run").final.step == 5


def test_a_stage_that_is_whole_is_given_whatever_came_after(tmp_path):
    model, optimizer = linear()
    recorder = sp.Recorder(model, optimizer, tmp_path / "run", every=5)
    loop(model, optimizer, recorder, 5)
    loop(model, torch.optim.SGD(model.parameters(), lr=0.01), Silent(), 3)
    assert recorder.trajectory().final.step == 5


def test_an_optimizer_that_steps_between_is_noticed(tmp_path):
    model, optimizer = linear()
    recorder = sp.Recorder(model, optimizer, tmp_path / "run", every=5)
    other = torch.optim.SGD(model.parameters(), lr=0.01)
    loop(model, other, Silent(), 3)  # before the run, as a search for a learning rate
    loop(model, optimizer, recorder, 2)
    loop(model, other, Silent(), 1)
    with pytest.raises(MismatchError, match="until step 3 by a step of another optimizer"):
        loop(model, optimizer, recorder, 1)


class Around(torch.optim.SGD):
    """Steps by another optimizer, as ZeroRedundancyOptimizer does."""

    def __init__(self, within):
        super().__init__([weight for group in within.param_groups for weight in group["params"]], lr=0.1)
        self.within = within

    def step(self, closure=None):
        return self.within.step(closure)


def test_one_that_steps_by_the_recorded_one_is_none(tmp_path):
    model, optimizer = linear()
    recorder = sp.Recorder(model, optimizer, tmp_path / "run", every=5)
    loop(model, Around(optimizer), recorder, 6)
    assert recorder.trajectory().final.step == 6


def test_one_without_gradients_or_a_rate_moves_nothing(tmp_path):
    model, optimizer = linear()
    recorder = sp.Recorder(model, optimizer, tmp_path / "run", every=5)
    loop(model, optimizer, recorder, 2)
    other = torch.optim.SGD(model.parameters(), lr=0.0)
    other.step()
    other.param_groups[0]["lr"] = 1.0
    other.zero_grad()
    other.step()
    loop(model, optimizer, recorder, 2)
    assert recorder.trajectory().final.step == 4


def test_a_recorder_that_has_gone_leaves_no_hook(tmp_path):
    hooks = len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)
    model, optimizer = linear()
    recorder = sp.Recorder(model, optimizer, tmp_path / "run", every=5)
    assert len(_global_optimizer_pre_hooks) == hooks[0] + 1
    del recorder
    assert hooks == (len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks))


@pytest.mark.parametrize("steps", [4, 5])
def test_updates_that_are_told_of_before_they_are_made_are_all_counted(tmp_path, steps):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = sp.Recorder(model, optimizer, tmp_path / "run", every=2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(4, 2)).mean().backward()
        recorder.step()
        optimizer.step()
    with pytest.warns(UserWarning, match=r"called before optimizer.step\(\): the last update is counted now"):
        stage = recorder.stage()
    assert stage.skipped == (0,)
    assert stage.lr_integrals[-1] == pytest.approx(steps * 0.1)
    assert torch.equal(stage.checkpoints[-1].load()["weight"], model.weight.detach())


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_so_is_one_that_trains_from_the_beginning(tmp_path, kind):
    model = nn.Linear(2, 1)
    recorder = sp.Recorder(model, kind(model.parameters(), lr=0.1), tmp_path / "run", every=5)
    with pytest.raises(MismatchError, match="another optimizer trains them"):
        loop(model, kind(model.parameters(), lr=0.1), recorder, 5)


@pytest.mark.parametrize("options", [{}, {"fused": True}])
@pytest.mark.parametrize("clamp", [False, True])
def test_steps_that_a_scaler_skips_are_none_of_another_optimizer(tmp_path, options, clamp):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **options)
    recorder = sp.Recorder(model, optimizer, tmp_path / "run", every=5)
    scaler = GradScaler("cpu", init_scale=2.0**16)
    loop(model, optimizer, recorder, 6, scaler=scaler, clamp=clamp, huge=True)
    loop(model, optimizer, recorder, 2)
    assert recorder.stage().skipped == tuple(range(6))


def test_parameters_of_another_part_of_the_network_may_move_meanwhile(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    generator, critic = (torch.optim.SGD(part.parameters(), lr=0.1) for part in model)
    recorder = sp.Recorder(model, generator, tmp_path / "run", every=5)
    loop(model, critic, recorder, 6)
    assert recorder.steps == 6
