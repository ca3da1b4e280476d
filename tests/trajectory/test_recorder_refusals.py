"""What the Recorder refuses, by name."""

import re
from pathlib import Path

import pytest
import torch
from recorded_runs import advance, linear, recorded, same, train, two_groups
from torch import nn

import source_proj as sp
from source_proj._errors import MismatchError
from source_proj.trajectory import Recorder, Trajectory
from source_proj.trajectory.recording.run_files import write_tensors


def of_class(optimizer, **settings):
    model = nn.Linear(2, 1)
    return model, optimizer(model.parameters(), lr=0.1, **settings)


def adam_groups(first=0.1, **second):
    model = nn.Linear(2, 1)
    groups = [{"params": [model.weight], "lr": first}, {"params": [model.bias], **second}]
    return model, torch.optim.AdamW(groups, lr=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda model, optimizer: (optimizer, model), "got SGD; optimizer must be an Optimizer of torch, got Linear: "),
        (lambda model, optimizer: (optimizer, model), "they are swapped: give Recorder(model, optimizer, dir)"),
        (lambda model, optimizer: (model, torch.optim.SGD), "must be an Optimizer of torch, got the class SGD"),
        (lambda model, optimizer: (model.state_dict(), optimizer), "model must be a Module of torch, got OrderedDict"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"capture": sp.Sketch(8), "task": sp.Regression()}])
def test_a_model_and_its_optimizer_are_told_apart(tmp_path, arguments, message, options):
    with pytest.raises(TypeError, match=re.escape(message)):
        sp.Recorder(*arguments(*linear()), tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


class MySGD(torch.optim.SGD):
    """Might do anything."""


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: of_class(torch.optim.Rprop), "got torch.optim.rprop.Rprop, which steps by the sign"),
        (lambda: of_class(torch.optim.Adafactor), "got torch.optim.*Adafactor"),
        (lambda: adam_groups(betas=(0.9, 0.5)), r"different betas: \[\(0.9, 0.999\), \(0.9, 0.5\)\]"),
        (lambda: adam_groups(0.0), r"first parameter group has learning rate 0, and others have \[0.0, 0.1\]"),
        (lambda: of_class(MySGD), r"got .*\.MySGD"),
        (lambda: linear(maximize=True), "maximize=True"),
        (lambda: two_groups(lr=0.2), r"different lr: \[0.1, 0.2\]"),
        (lambda: two_groups(momentum=0.0), r"different momentum: \[0.5, 0.0\]"),
        (lambda: two_groups(weight_decay=0.1), r"different weight_decay: \[0, 0.1\].*: train with one value"),
        (lambda: two_groups(dampening=0.1), "different dampening"),
        (lambda: two_groups(nesterov=True), "different nesterov"),
        (lambda: (nn.Linear(2, 1), linear()[1]), "trains no parameter of the model Linear"),
    ],
)
def test_optimizers_refused_by_name(tmp_path, made, message):
    with pytest.raises(ValueError, match=message):
        Recorder(*made(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("made", "key", "value", "named"),
    [
        (lambda: linear(momentum=0.5), "weight_decay", 0.1, "weight_decay=0.1 was 0.0"),
        (lambda: linear(momentum=0.5), "nesterov", True, "nesterov=True was False"),
        (lambda: of_class(torch.optim.AdamW), "betas", (0.9, 0.99), r"betas=\(0.9, 0.99\) was \(0.9, 0.999\)"),
        (lambda: of_class(torch.optim.AdamW), "eps", 1e-6, "eps=1e-06 was 1e-08"),
        (lambda: of_class(torch.optim.AdamW), "amsgrad", True, "amsgrad=True was False"),
        (lambda: of_class(torch.optim.RMSprop), "alpha", 0.9, "alpha=0.9 was 0.99"),
        (lambda: of_class(torch.optim.RMSprop), "weight_decay", 0.1, "weight_decay=0.1 was 0.0"),
    ],
)
def test_options_that_change_on_the_way_are_refused(tmp_path, made, key, value, named):
    model, optimizer = made()
    recorder = Recorder(model, optimizer, tmp_path)
    advance(recorder)
    optimizer.param_groups[0][key] = value
    with pytest.raises(MismatchError, match=f"options changed at step 2: {named}"):
        advance(recorder)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"every": 0}, "got 0"), ({"every": 2.0}, "got 2.0"), ({"at": [5, 0]}, "got 0"), ({"at": ["x"]}, "got 'x'")],
)
def test_bad_times(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        Recorder(*linear(), tmp_path, **options)


def wider():
    model = nn.Linear(3, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def other_names():
    model = nn.Sequential(nn.Linear(2, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def in_double():
    model = nn.Linear(2, 1).double()
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("made", "stage", "message"),
    [
        (wider, "train", r"another model: weight is \(\(1, 2\), 'float32'\) there and \(\(1, 3\), 'float32'\) here"),
        (other_names, "train", "weight is .* there and absent here"),
        (in_double, "train", "'float64'"),
        (lambda: linear(momentum=0.5), "train", r"optimizer is SGD\(momentum=0.0.* not SGD\(momentum=0.5"),
        (linear, "finetune", "stage is 'train', not 'finetune'"),
    ],
)
def test_the_directory_of_another_run_is_refused(tmp_path, made, stage, message):
    recorded(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(MismatchError, match=message):
        Recorder(*made(), tmp_path, stage=stage)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("trajectory.json", b"{", "not written by a Recorder"),
        ("trajectory.json", b"\xff\xfe", "not written by a Recorder"),
        ("trajectory.json", b"[1, 2]", "not written by a Recorder"),
        ("trajectory.json", b"{}", "format None"),
        ("trajectory.json", b'{"format": "source-proj recorded run", "version": 2}', "version 2"),
        ("trajectory.json", b'{"format": "source-proj recorded run", "version": 3}', "version 3"),
        ("trajectory.json", b'{"format": "source-proj recorded run", "version": 4}', "version 4"),
        ("trajectory.json", b'{"format": "source-proj recorded run", "version": 5}', "not that of its digest"),
        ("trajectory.json", b"[" * 100_000, "RecursionError"),
        ("step_00000005.pt", b"mine", "holds step_00000005.pt but no trajectory.json"),
        ("optimizer_00000005.pt", b"mine", "holds optimizer_00000005.pt but no trajectory.json"),
    ],
)
def test_foreign_directories_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MismatchError, match=message):
        Recorder(*linear(), tmp_path)
    assert (tmp_path / name).read_bytes() == content
    with pytest.raises(MismatchError, match=message):
        Trajectory.from_recorder(tmp_path)


def test_a_file_in_place_of_the_directory(tmp_path):
    (tmp_path / "run").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file"):
        Recorder(*linear(), tmp_path / "run")


def test_nothing_recorded(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run was recorded"):
        Trajectory.from_recorder(tmp_path / "nowhere")
    recorder = Recorder(*linear(), tmp_path)
    with pytest.raises(ValueError, match="no checkpoint yet"):
        recorder.trajectory()
    assert Recorder(*linear(), tmp_path).restore() == 0


def test_training_on_over_a_recorded_run_without_restore_is_refused(tmp_path):
    recorded(tmp_path)
    recorder = Recorder(*linear(), tmp_path)
    with pytest.raises(MismatchError, match=r"run of 2 steps: .* call restore\(\)"):
        recorder.step()
    assert recorder.restore() == 2
    advance(recorder)
    assert recorder.trajectory().final.step == 3


@pytest.mark.parametrize("name", ["step_00000002.pt", "optimizer_00000002.pt"])
def test_changed_files_are_refused(tmp_path, name):
    recorded(tmp_path)
    write_tensors({tmp_path / name: {"weight": torch.zeros(1, 2), "bias": torch.zeros(1)}})
    recorder = Recorder(*linear(), tmp_path)
    with pytest.raises(MismatchError, match=f"{name}.*it was changed since"):
        recorder.restore()
    if name.startswith("step"):
        with pytest.raises(MismatchError, match=name):
            Trajectory.from_recorder(tmp_path)


def test_steps_that_the_recorder_was_not_told_of_are_refused(tmp_path):
    model, optimizer = linear()
    recorder = Recorder(model, optimizer, tmp_path)
    advance(recorder)
    for _ in range(3):
        optimizer.step()
    with pytest.raises(MismatchError, match="more than once since the recorder's step 1"):
        recorder.step()


def test_states_that_could_not_be_read_back_are_refused_at_once(tmp_path):
    class Odd:
        def state_dict(self):
            return {"path": Path("x")}

        def load_state_dict(self, state_dict):
            raise NotImplementedError

    with pytest.raises(TypeError, match="the state of Odd"):
        Recorder(*linear(), tmp_path / "run", also=[Odd()])


def test_things_to_restore_must_be_given(tmp_path):
    train(tmp_path, until=5)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    recorder = Recorder(model, optimizer, tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MismatchError, match="1 things were recorded as also=, and 0 are given"):
        recorder.restore()
    assert same(model.state_dict(), before)


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (lambda step: 1 - step / 4, r"learning rates \[-0.02\d*\]: each must be finite, and at least 0"),
        (lambda step: float("nan") if step == 5 else 1.0, r"learning rates \[nan\]: each must be finite"),
    ],
)
def test_a_rate_that_goes_uphill_is_named_at_its_step(tmp_path, schedule, said):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    recorder = Recorder(model, optimizer, tmp_path, every=3)
    for _ in range(5):
        _step(model, optimizer)
        recorder.step()
        scheduler.step()
    _step(model, optimizer)
    with pytest.raises(ValueError, match=said):
        recorder.step()


def test_a_schedule_may_end_a_rounding_below_zero(tmp_path):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step * 0.1 * (10 / 9) - 1e-16)
    recorder = Recorder(model, optimizer, tmp_path, every=5)
    for _ in range(10):
        _step(model, optimizer)
        rate = optimizer.param_groups[0]["lr"]
        recorder.step()
        scheduler.step()
    assert rate < 0
    assert recorder.trajectory().final.step == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": 3}, "stage must be a name, got 3: give stage='3'"),
        ({"stage": None}, "stage must be a name, got None"),
        ({"at": 5}, "at must be numbers of optimizer steps, got 5: give at="),
        ({"segment_ends": 5}, "segment_ends must be numbers"),
        ({"also": nn.Linear(1, 1)}, "also must be a list, got a Linear"),
    ],
)
def test_options_of_another_kind_are_refused_before_anything_is_recorded(tmp_path, options, message):
    """A run whose stage was a number could be recorded to its end, and not be read."""
    model, optimizer = of_class(torch.optim.SGD)
    with pytest.raises(TypeError, match=message):
        Recorder(model, optimizer, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def _step(model, optimizer):
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
