"""A Recorder whose optimizer is not the one that trains: its steps would all pass for skipped ones."""

import pytest
import torch
from recorded_runs import linear
from torch import nn
from torch.amp.grad_scaler import GradScaler

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
    with pytest.raises(MismatchError, match=r"weights moved until step 8, and the SGD that is recorded made none"):
        loop(model, torch.optim.SGD(model.parameters(), lr=0.01), recorder, 10)


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
