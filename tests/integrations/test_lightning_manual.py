"""Lightning's manual optimization: its checkpoints count updates, and its logs batches."""

import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

import source_proj as sp

BATCHES, EVERY = 24, 4


def train(directory, make, batches_per_update, updates_per_batch, schedule_each="update"):
    """A loop whose files are Lightning's: logs at each batch's begin, checkpoints at the end of batches."""
    torch.manual_seed(0)
    model, data = nn.Linear(3, 2), torch.randn(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler, used, lines = make(optimizer), [], ["step,lr-SGD"]
    for batch in range(BATCHES):
        lines.append(f"{batch},{optimizer.param_groups[0]['lr']!r}")
        model(data).square().mean().backward()
        for _ in range(updates_per_batch if batch % batches_per_update == batches_per_update - 1 else 0):
            used.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if scheduler is not None and (schedule_each == "update" or len(used) % 3 == 0):
                scheduler.step()
            if len(used) % EVERY == 0:
                content = {
                    "global_step": len(used),
                    "state_dict": model.state_dict(),
                    "optimizer_states": [optimizer.state_dict()],
                    "lr_schedulers": [] if scheduler is None else [scheduler.state_dict()],
                    "loops": {"fit_loop": {"epoch_loop.state_dict": {"_batches_that_stepped": batch}}},
                }
                torch.save(content, directory / f"step={len(used)}.ckpt")
        if batch % batches_per_update == batches_per_update - 1:
            optimizer.zero_grad()
    (directory / "metrics.csv").write_text("\n".join(lines) + "\n")
    return used


SCHEDULES = {
    "none": lambda _: None,
    "step": lambda optimizer: schedulers.StepLR(optimizer, 2, 0.5),
    "restarts": lambda optimizer: schedulers.CosineAnnealingWarmRestarts(optimizer, 4),
    "warm-up": lambda optimizer: schedulers.LinearLR(optimizer, 0.1, total_iters=5),
    "lambda": lambda optimizer: schedulers.LambdaLR(optimizer, lambda t: 1 / (1 + t)),
    "one cycle": lambda optimizer: schedulers.OneCycleLR(optimizer, 0.2, total_steps=100, cycle_momentum=False),
}


@pytest.mark.parametrize("each", ["update", "third update"])
@pytest.mark.parametrize(("batches", "updates"), [(1, 1), (2, 1), (3, 1), (1, 2)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_are_those_of_the_updates_or_asked_for(tmp_path, name, batches, updates, each):
    used = train(tmp_path, SCHEDULES[name], batches, updates, each)
    expected = [math.fsum(used[:step]) for step in range(EVERY, len(used) + 1, EVERY)]
    known = batches == updates or name == "none" or (name == "one cycle" and each == "update")
    if known:
        assert sp.Trajectory.from_lightning(tmp_path).stages[0].lr_integrals == pytest.approx(expected, rel=1e-9)
    else:
        words = r"its \d+ updates took \d+ batches, by which Lightning logs: give schedule="
        with pytest.raises(ValueError, match=words):
            sp.Trajectory.from_lightning(tmp_path)
    given = sp.Trajectory.from_lightning(tmp_path, schedule=used)  # nothing that was logged contradicts it
    assert given.stages[0].lr_integrals == pytest.approx(expected, rel=1e-9)
