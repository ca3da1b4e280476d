"""Fused optimizers under a GradScaler, which unscale and skip within their own step: as those that are not fused."""

import pytest
import torch
from captured_runs import batches_of, data_for, loss_of, mlp, rows_of, size_of
from torch import nn
from torch.amp.grad_scaler import GradScaler

import source_proj as sp
from source_proj.trajectory.recording.run_files import RecordedRun

OPTIMIZERS = {
    "AdamW": lambda parameters, fused: torch.optim.AdamW(parameters, lr=0.02, fused=fused),
    "Adam": lambda parameters, fused: torch.optim.Adam(parameters, lr=0.02, weight_decay=1e-3, fused=fused),
    "SGD": lambda parameters, fused: torch.optim.SGD(parameters, lr=0.05, momentum=0.5, fused=fused),
}
SKIPPED = 4


def run(directory, name, *, fused, capture=True, unscaled=False, max_norm=None, steps=9):
    """A run whose scale changes, and one of whose steps the scaler skips."""
    torch.manual_seed(0)
    model, scaler = mlp(), GradScaler("cpu", init_scale=2.0**9, growth_interval=2)
    optimizer = OPTIMIZERS[name](model.parameters(), fused)
    told = {"capture": sp.Sketch(size_of(model), "identity"), "task": sp.Classification()} if capture else {}
    recorder = sp.Recorder(model, optimizer, directory, every=3, also=[scaler], max_grad_norm=max_norm, **told)
    inputs, labels = data_for(model, 12)
    for number, index in enumerate(batches_of(12, 4, steps)):
        optimizer.zero_grad()
        loss = loss_of(model, inputs[index], labels[index])
        scaler.scale(loss * (float("inf") if number == SKIPPED else 1.0)).backward()
        if unscaled or max_norm:
            scaler.unscale_(optimizer)
        norm = (nn.utils.clip_grad_norm_(model.parameters(), max_norm),) if max_norm else ()
        scaler.step(optimizer)
        scaler.update()
        recorder.step(*norm, **({"ids": index} if capture else {}))
    return model, recorder


@pytest.mark.parametrize("options", [{}, {"unscaled": True}, {"max_norm": 0.3}], ids=["", "unscaled", "clipped"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_captured_rows_are_those_of_an_optimizer_that_is_not_fused(tmp_path, name, options):
    banks = [
        run(tmp_path / str(fused), name, fused=fused, **options)[1].bank(storage="float32") for fused in (True, False)
    ]
    fused, plain = (rows_of(bank) for bank in banks)
    assert float((fused - plain).norm()) <= 1e-4 * float(plain.norm())
    rates = [bank.stages[0].record.lr_integrals for bank in banks]
    assert rates[0] == pytest.approx(rates[1])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_a_fused_optimizer_skips_counts_with_a_rate_of_0(tmp_path, name):
    updates = []
    for fused in (True, False):
        run(tmp_path / str(fused), name, fused=fused, capture=False)
        recorded = RecordedRun.read(tmp_path / str(fused))
        updates.append([update for checkpoint in recorded.checkpoints for update in checkpoint.updates])
    assert updates[0] == updates[1]
    assert [count for rate, *_, count in updates[0] if rate == 0] == [1]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_scaler_of_a_fused_optimizer_that_nobody_named_is_refused_by_its_scale(tmp_path, name):
    model, scaler = mlp(), GradScaler("cpu", init_scale=512.0)
    optimizer = OPTIMIZERS[name](model.parameters(), True)
    sketch = sp.Sketch(size_of(model), "identity")
    recorder = sp.Recorder(model, optimizer, tmp_path, capture=sketch, task=sp.Classification())
    scaler.scale(loss_of(model, *data_for(model, 4))).backward()
    with pytest.raises(sp.GradientError, match=r"fused \w+ are still multiplied by 512.*also=\[scaler\]"):
        scaler.step(optimizer)
    recorder.close()
