"""Recording Adam, AdamW and RMSprop: their second moments, groups and schedules."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from source_proj._errors import MismatchError
from source_proj.trajectory import Adam, ParameterGroup, Recorder, RMSprop, Trajectory, moments
from source_proj.trajectory.recording.run_files import RecordedRun


def grouped(kind=torch.optim.AdamW, **options):
    """The bias, which is second in the model, is in the first group."""
    model = nn.Linear(3, 2)
    groups = [{"params": [model.bias], "weight_decay": 0.0}, {"params": [model.weight], "lr": 0.02}]
    return model, kind(groups, lr=0.01, weight_decay=0.1, **options)


def trained(directory, model, optimizer, until=12, seed=0):
    """A warm-up from 0 and a cosine; data follow from the step. Returns the recorder and v at each checkpoint."""
    torch.manual_seed(seed)
    warm = lr_scheduler.LinearLR(optimizer, 1e-9, 1.0, total_iters=3)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
    scheduler = lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[3])
    recorder = Recorder(model, optimizer, directory, every=4, also=[warm, cosine, scheduler])
    kept = []
    key = "square_avg" if isinstance(optimizer, torch.optim.RMSprop) else "exp_avg_sq"
    for step in range(recorder.restore(), until):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(5, 3, generator=generator)).square().mean().backward()
        optimizer.step()
        scheduler.step()
        recorder.step()
        if recorder.steps % 4 == 0:
            kept.append({name: optimizer.state[p][key].clone() for name, p in model.named_parameters()})
    return recorder, kept


@pytest.mark.parametrize(
    ("kind", "described"),
    [
        (torch.optim.AdamW, Adam(weight_decay=0.0)),
        (torch.optim.Adam, Adam(decoupled=False)),
        (torch.optim.RMSprop, RMSprop()),
    ],
)
def test_second_moments_are_kept_by_name_at_each_checkpoint(tmp_path, kind, described):
    model, optimizer = grouped(kind)
    recorder, kept = trained(tmp_path, model, optimizer)
    stage = recorder.trajectory(segments=3, preconditioner="per_segment").stages[0]
    assert stage.preconditioner == "per_segment"
    assert stage.optimizer == type(described)(
        **{**vars(described), "groups": (ParameterGroup(("weight",), 2.0, 0.1),), "weight_decay": 0.0}
    )
    for checkpoint, moment in zip(stage.checkpoints, kept, strict=True):
        found = dict(moments(checkpoint, stage.optimizer, model))
        for name, value in moment.items():
            correction = 1 if kind is torch.optim.RMSprop else 1 - 0.999**checkpoint.step
            torch.testing.assert_close(found[name].second, value.double() / correction)


def test_what_is_recorded_is_read_back_and_gone_on_with(tmp_path):
    whole, _ = trained(tmp_path / "whole", *grouped())
    trained(tmp_path / "parts", *grouped(), until=6)
    parts, _ = trained(tmp_path / "parts", *grouped())
    ends = [Trajectory.from_recorder(recorder.dir).stages[0] for recorder in (whole, parts)]
    states = [torch.load(one.checkpoints[-1].optimizer_state, weights_only=True) for one in ends]
    assert ends[0].optimizer == ends[1].optimizer
    for name in ("weight", "bias"):
        for key, value in states[0]["state"][name].items():
            assert torch.equal(value, states[1]["state"][name][key])


def test_moments_that_changed_are_refused(tmp_path):
    recorder, _ = trained(tmp_path, *grouped())
    (tmp_path / "moments_00000008.pt").write_bytes(b"other")
    with pytest.raises(MismatchError, match=r"moments_00000008.pt' has SHA-256"):
        recorder.trajectory()


def test_plain_sgd_keeps_no_moments(tmp_path):
    model = nn.Linear(3, 2)
    recorder, _ = trained(tmp_path / "adam", *grouped())
    assert len(list((tmp_path / "adam").glob("moments_*.pt"))) == 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(model, optimizer, tmp_path / "sgd", every=1)
    optimizer.step()
    recorder.step()
    assert not list((tmp_path / "sgd").glob("moments_*.pt"))
    assert RecordedRun.read(tmp_path / "sgd").checkpoints[0].moments is None
