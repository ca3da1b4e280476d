"""A script's own checkpoint has the optimizer's state beside the weights: what stands there is read without being told.

A forgotten momentum, a schedule, epochs for steps or another optimizer went unseen, and runs of Adam were refused for
want of a state that lay in the very file.
"""

import pytest
import torch
from torch import nn

import source_proj as sp
from source_proj.gradients import ParameterSpace

WRAPS = {
    "plain": lambda weights, state: {"model": weights, "optimizer": state, "epoch": 3},
    "lightning's names": lambda weights, state: {"state_dict": weights, "optimizer_states": [state]},
    "with a scheduler": lambda weights, state: {
        "model_state_dict": weights, "optimizer_state_dict": state, "scheduler": {"last_epoch": 2, "_last_lr": [0.1]}
    },
}  # fmt: skip


def run(folder, kind="AdamW", steps=4, *, kept="file", wrap=WRAPS["plain"], schedule=None, **options):
    """Checkpoints of every step: in files or dicts with the state beside the weights, or with both given apart."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.01, **options)
    points = []
    for step in range(1, steps + 1):
        for p in model.parameters():
            p.grad = torch.randn(p.shape)
        optimizer.step()
        weights, state = model.state_dict(), optimizer.state_dict()
        if kept == "apart":
            points.append(sp.Checkpoint(weights, step, lr=0.01, optimizer_state=state))
            continue
        content = wrap(weights, state)
        if kept == "file":
            torch.save(content, folder / f"{step}.pt")
        points.append(sp.Checkpoint(content if kept == "dict" else folder / f"{step}.pt", step, lr=0.01))
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] if schedule is None else schedule(step)
    return points


def resolved(points, optimizer, **options):
    model = nn.Linear(3, 2)
    return sp.Trajectory(points, optimizer=optimizer, **options).resolve(model, ParameterSpace.from_model(model))


@pytest.mark.parametrize("kept", ["file", "dict"])
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("preconditioner", ["scalar", "per_segment"])
def test_it_is_what_would_have_been_given(kept, wrap, preconditioner, tmp_path):
    given = {"optimizer": sp.Adam(weight_decay=0.01), "segments": 2, "preconditioner": preconditioner}
    beside = resolved(run(tmp_path, kept=kept, wrap=WRAPS[wrap]), **given)
    apart = resolved(run(tmp_path, kept="apart"), **given)
    for ours, theirs in zip(beside.record.stages, apart.record.stages, strict=True):
        assert ours.lr_integrals == theirs.lr_integrals
        assert ours.optimizer == theirs.optimizer
    assert beside.scales.keys() == apart.scales.keys()
    assert all(torch.equal(beside.scales[name].values, apart.scales[name].values) for name in apart.scales)


@pytest.mark.parametrize("kept", ["file", "dict", "apart"])
def test_what_it_contradicts_is_said(kept, tmp_path):
    points = run(tmp_path, "SGD", kept=kept, momentum=0.9)
    with pytest.warns(UserWarning, match=r"give optimizer=source_proj.SGD\(momentum=0.9"):
        resolved(points, sp.SGD())
    with pytest.raises(sp.MismatchError, match="is of SGD"):
        resolved(points, sp.Adam())
    resolved(points, sp.SGD(momentum=0.9))


@pytest.mark.parametrize("kept", ["file", "dict"])
def test_rates_and_steps_of_files_are_compared(kept, tmp_path):
    points = run(tmp_path, "SGD", kept=kept, schedule=lambda step: 0.01 / (1 + step))
    with pytest.warns(UserWarning, match="give lr_schedule"):
        resolved(points, sp.SGD())
    epochs = run(tmp_path, steps=6, kept=kept)[2::3]
    renumbered = [sp.Checkpoint(point.path or beside(point), n, lr=0.01) for n, point in enumerate(epochs, start=1)]
    with pytest.warns(UserWarning, match="3 updates between the checkpoints of the steps 1 and 2 .* not epochs"):
        resolved(renumbered, sp.Adam(weight_decay=0.01))


def beside(point):
    return {"model": point.load(), "optimizer": point.optimizer_state}


def test_weights_alone_have_none_and_what_is_written_anew_is_read_anew(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    path = tmp_path / "x.pt"
    for content, held in [
        (model.state_dict(), False),
        ({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, True),
        ({"model": model.state_dict(), "optimizer": {"state": {}}}, False),
    ]:
        torch.save(content, path)
        point = sp.Checkpoint(path, 1, lr=0.1)
        assert point.optimizer_state == (path if held else None)
    before = sp.Checkpoint(path, 1, lr=0.1)
    assert before.optimizer_state is None
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "more": torch.ones(64)}, path)
    assert before.optimizer_state == path
    torch.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert sp.Checkpoint(tmp_path / "old.pt", 1, lr=0.1).optimizer_state is None
    given = sp.Checkpoint(path, 1, lr=0.1, optimizer_state=tmp_path / "other.pt")
    assert given.optimizer_state == tmp_path / "other.pt"
