"""A script's own checkpoint has the optimizer's state beside the weights: what stands there is read without being told.

A forgotten momentum, a schedule, epochs for steps or another optimizer went unseen, and runs of Adam were refused for
want of a state that lay in the very file.
"""

import pytest
import torch
from torch import nn

import source_proj as sp
from source_proj.gradients import ParameterSpace
from source_proj.trajectory.trained import trained_parameters

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


@pytest.mark.parametrize("kept", ["file", "dict"])
@pytest.mark.parametrize("kind", ["SGD", "AdamW", "RMSprop"])
@pytest.mark.parametrize("preconditioner", ["scalar", "shared"])
def test_beside_initial_weights_lies_the_state_of_whoever_trained_them(kind, kept, preconditioner, tmp_path):
    """A fine-tuning's first checkpoint is the file of the run before: of its optimizer, rates and second moments."""
    options = {"momentum": 0.9} if kind == "SGD" else {}
    before = run(tmp_path, kind, steps=6, kept=kept, **options)[-1]
    (tmp_path / "after").mkdir()
    after = run(tmp_path / "after", kept=kept)
    found, wanted = (
        resolved([sp.Checkpoint(state, 0, lr=0.01), *after], sp.Adam(weight_decay=0.01), preconditioner=preconditioner)
        for state in (before.path or beside(before), before.load())
    )
    assert found.record.stages[0].scalars == wanted.record.stages[0].scalars
    assert found.scales.keys() == wanted.scales.keys()


@pytest.mark.parametrize("begin", [0, 20])
def test_the_rate_of_the_run_before_is_none_of_a_stage(begin, tmp_path):
    pretrained = run(tmp_path, "SGD", schedule=lambda step: 0.5)[-1].path
    (tmp_path / "after").mkdir()
    after = run(tmp_path / "after", "SGD")
    points = [sp.Checkpoint(pretrained, begin, lr=0.01)]
    points += [sp.Checkpoint(point.path, begin + point.step, lr=0.01) for point in after]
    resolved(points, sp.SGD(), start_step=begin)


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_without_a_preconditioner_no_state_is_read(kind, tmp_path):
    """Neither one of another optimizer nor one of the head alone, whose parameters have no names."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    optimizer = getattr(torch.optim, kind)(model[1].parameters(), lr=0.01)
    for p in model[1].parameters():
        p.grad = torch.ones(p.shape)
    optimizer.step()
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(content, tmp_path / "1.pt")
    for state in (content, tmp_path / "1.pt"):
        trajectory = sp.Trajectory([sp.Checkpoint(state, 1, lr=0.01)], optimizer=sp.Adam(), preconditioner="none")
        names, _ = trained_parameters(trajectory, model)
        assert names == [name for name, _ in model.named_parameters()]


def test_averaged_weights_have_the_state_beside_them_too(tmp_path):
    weights = nn.Linear(3, 2).state_dict()
    state = torch.optim.AdamW(nn.Linear(3, 2).parameters()).state_dict()
    torch.save({"state_dict": weights, "state_dict_ema": weights, "optimizer": state}, tmp_path / "x.pth")
    point = sp.Checkpoint(tmp_path / "x.pth", 1, lr=0.1, key="state_dict_ema")
    assert point.optimizer_state == tmp_path / "x.pth"


def test_a_file_that_holds_itself_is_read_to_an_end(tmp_path):
    content = {"model": nn.Linear(3, 2).state_dict()}
    content["optimizer"] = content
    torch.save(content, tmp_path / "x.pt")
    assert sp.Checkpoint(tmp_path / "x.pt", 1, lr=0.1).optimizer_state is None
