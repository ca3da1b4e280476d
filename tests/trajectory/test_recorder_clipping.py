"""Clipped updates go less far: the recorder keeps by how much."""

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

import source_proj as sp

STEPS, MOST = 12, 0.5


def run(folder, *, stop=STEPS, kind=torch.optim.SGD):
    """Trains with clipping; returns the recorder, and each update's rate and true factor, measured on the gradient."""
    torch.manual_seed(0)
    model, data = nn.Linear(3, 1), torch.randn(STEPS, 8, 3)
    optimizer = kind(model.parameters(), lr=0.1)
    recorder = sp.Recorder(model, optimizer, folder, every=4, max_grad_norm=MOST)
    seen = []
    for step in range(recorder.restore(), stop):
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        optimizer.zero_grad()
        model(data[step]).square().mean().backward()
        before = model.weight.grad.clone()
        norm = clip_grad_norm_(model.parameters(), MOST)
        optimizer.step()
        recorder.step(grad_norm=norm)
        seen.append((0.1 / (step + 1), float((model.weight.grad / before).mean())))
    return recorder, seen


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_factors_are_what_the_gradient_was_multiplied_by(tmp_path, kind):
    recorder, seen = run(tmp_path, kind=kind)
    stage = recorder.stage()
    factors = [factor for _, factor in seen]
    assert min(factors) < 0.9  # else nothing was clipped
    assert list(stage.clip_factors) == pytest.approx(factors, rel=1e-5)
    assert stage.lr_integrals[-1] == pytest.approx(sum(rate * factor for rate, factor in seen), rel=1e-5)


def test_a_run_that_goes_on_keeps_them(tmp_path):
    whole, seen = run(tmp_path / "whole")
    run(tmp_path / "parts", stop=6)  # the last two are after a checkpoint, and taken again
    parts, _ = run(tmp_path / "parts")
    assert list(parts.stage().clip_factors) == list(whole.stage().clip_factors)
    assert len(parts.stage().clip_factors) == len(seen)


def test_nothing_clipped_leaves_the_stage_as_without(tmp_path):
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = sp.Recorder(model, optimizer, tmp_path, max_grad_norm=10.0)
    model.weight.grad, model.bias.grad = torch.ones(1, 3), torch.ones(1)
    optimizer.step()
    recorder.step(grad_norm=2.0)
    assert recorder.stage().clip_factors is None


def test_norms_and_their_limit_come_together(tmp_path):
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="grad_norm= was given without max_grad_norm="):
        sp.Recorder(model, optimizer, tmp_path / "a").step(grad_norm=1.0)
    with pytest.raises(TypeError, match="max_grad_norm= was given without grad_norm="):
        sp.Recorder(model, optimizer, tmp_path / "b", max_grad_norm=1.0).step()
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="max_grad_norm must be positive"):
            sp.Recorder(model, optimizer, tmp_path / "c", max_grad_norm=wrong)


def test_a_norm_of_nan_is_an_error_unless_the_step_was_skipped(tmp_path):
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = sp.Recorder(model, optimizer, tmp_path / "run", max_grad_norm=1.0)
    recorder.step(grad_norm=torch.tensor(torch.nan))  # the optimizer did not step: a GradScaler saw to it
    model.weight.grad = torch.full((1, 3), torch.nan)
    optimizer.step()
    recorder.step(grad_norm=torch.tensor(torch.nan))
    with pytest.raises(ValueError, match="norm at step 2 is NaN"):
        recorder.trajectory()
