"""What a training loop or a folder can do to a capture unseen: it is refused by name, or changes nothing."""

import copy
import shutil

import pytest
import torch
from bare_uses import BESIDE, BESIDE_REFUSED, WIDTH, BesideTheBatch
from captured_runs import data_for, loss_of, mlp, train
from torch import nn

import source_proj as sp

UNSEEN = r"nothing was captured of 8 of the 12 examples of stage 'train', ids \[4, 5, 6, 7, 8\] and so on"


def captured(directory, model, optimizer, **options):
    options = {"capture": sp.Sketch(16), "task": sp.Classification(), "examples": 12, **options}
    return sp.Recorder(model, optimizer, directory, **options)


def step(model, optimizer, recorder, index=None):
    inputs, labels = data_for(mlp(), 12)
    index = torch.arange(4) if index is None else index
    optimizer.zero_grad()
    loss_of(model, inputs[index], labels[index]).backward()
    optimizer.step()
    recorder.step(ids=index)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return mlp()


def test_a_batch_that_was_thrown_away_is_seen_long_after_the_first_steps(tmp_path, model):
    """Its gradient was zeroed, and its pass would count in the next step; told as a skipped step, it is none."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs, labels = data_for(model, 12)
    recorder = captured(tmp_path / "run", model, optimizer)
    for told in (True, False):
        for _ in range(7):
            step(model, optimizer, recorder)
        optimizer.zero_grad()
        loss_of(model, inputs[4:8], labels[4:8]).backward()
        optimizer.zero_grad()
        if told:
            recorder.step(ids=range(4, 8))
    loss_of(model, inputs[:4], labels[:4]).backward()
    with pytest.raises(sp.GradientError, match=r"batch that was thrown away \(call recorder\.step\(\) for it"):
        optimizer.step()


def test_two_passes_over_the_same_examples(tmp_path, model):
    """Of one loss they are refused; micro-batches that happen to be the same, each with its own way back, are two."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = captured(tmp_path / "run", model, optimizer)
    inputs, labels = data_for(model, 12)
    for _ in range(2):
        (loss_of(model, inputs[:4], labels[:4]) / 2).backward()
    optimizer.step()
    recorder.step(ids=[0, 1, 2, 3] * 2)
    optimizer.zero_grad()
    sum(loss_of(model, inputs[:4], labels[:4]) for _ in range(2)).backward()
    optimizer.step()
    with pytest.raises(sp.MismatchError, match="same examples before either went back"):
        recorder.step(ids=[0, 1, 2, 3] * 2)


def test_a_captured_file_of_another_moment_or_run(tmp_path, model):
    recorder = train(tmp_path / "run", model, every=3, segment_ends=[3, 6], examples=12)
    recorder.close()
    files = sorted((tmp_path / "run").glob("capture_*.pt"))
    shutil.copy(files[0], tmp_path / "kept")
    shutil.copy(files[1], files[0])
    with pytest.raises(sp.MismatchError, match=f"{files[0].name}.*was recorded"):
        recorder.bank()
    shutil.copy(tmp_path / "kept", files[0])
    assert recorder.bank().finalized


def test_the_end_of_a_stage_whose_weights_went_on(tmp_path, model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = captured(tmp_path / "run", model, optimizer, every=2, stage="first")
    for _ in range(3):
        step(model, optimizer, recorder)
    with torch.no_grad():
        model[0].weight.mul_(1.1)
    with pytest.raises(sp.MismatchError, match="after the last step of stage 'first'"):
        recorder.captured()


def test_parameters_that_are_unfrozen_later(tmp_path, model):
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = captured(tmp_path / "run", model, optimizer)
    step(model, optimizer, recorder)
    model[0].requires_grad_(True)
    with pytest.raises(sp.GradientError, match=r"\['0.weight', '0.bias'\] are trained"):
        step(model, optimizer, recorder)


def test_an_optimizer_that_holds_more_than_the_model(tmp_path, model):
    temperature = nn.Parameter(torch.ones(()))
    model[0].bias.requires_grad_(False).grad = torch.zeros(7)
    optimizer = torch.optim.SGD([*model.parameters(), temperature], lr=0.1)
    recorder = captured(tmp_path / "run", model, optimizer)
    temperature.grad = torch.ones(())
    inputs, labels = data_for(model, 12)
    loss_of(model, inputs[:4], labels[:4]).backward()
    optimizer.step()
    recorder.step(ids=range(4))
    with pytest.warns(UserWarning, match=UNSEEN):
        assert recorder.bank().finalized


def test_a_group_that_is_not_trained(tmp_path, model):
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.0}]
    optimizer = torch.optim.Adam(groups, lr=0.1)
    recorder = captured(tmp_path / "run", model, optimizer)
    with pytest.raises(sp.GradientError, match=r"'!2.weight', '!2.bias'"):
        step(model, optimizer, recorder)
    recorder.close()
    other = captured(tmp_path / "other", model, optimizer, parameters=["!2.*"])
    step(model, optimizer, other)
    with pytest.warns(UserWarning, match=UNSEEN):
        assert other.bank().finalized


class Counting(nn.Module):
    """Counts its calls in a buffer, which it replaces, and scales by them."""

    def __init__(self):
        super().__init__()
        self.layers = mlp()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return self.layers(x) * (1 + 0.01 * self.calls)


def test_buffers_of_the_trained_model_are_left_alone(tmp_path):
    found = []
    for capture in (None, sp.Sketch(16)):
        torch.manual_seed(0)
        model = Counting()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options = {} if capture is None else {"capture": capture, "task": sp.Classification(), "examples": 12}
        recorder = sp.Recorder(model, optimizer, tmp_path / str(capture is None), every=2, **options)
        inputs, labels = data_for(mlp(), 12)
        for index in torch.arange(12).split(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[index]), labels[index]).backward()
            optimizer.step()
            recorder.step(ids=index if options else None)
        found.append(model.state_dict())
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


def test_a_captured_model_can_be_copied_and_saved(tmp_path, model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = captured(tmp_path / "run", model, optimizer)
    step(model, optimizer, recorder)
    teacher = copy.deepcopy(model)
    inputs, labels = data_for(model, 12)
    loss_of(teacher, inputs, labels).backward()
    torch.save(model, tmp_path / "whole.pt")
    loss_of(torch.load(tmp_path / "whole.pt", weights_only=False), inputs, labels).backward()
    step(model, optimizer, recorder)
    with pytest.warns(UserWarning, match=UNSEEN):
        assert recorder.bank().finalized


def test_a_step_by_a_closure(tmp_path, model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = captured(tmp_path / "run", model, optimizer)
    inputs, labels = data_for(model, 12)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, inputs, labels)
        loss.backward()
        return loss

    with pytest.raises(sp.GradientError, match="closure"):
        optimizer.step(closure)
    recorder.close()
    optimizer.step(closure)
    other = captured(tmp_path / "other", model, optimizer)
    closure()
    optimizer.step(lambda: None)  # as Lightning gives one where its user gave none
    other.step(ids=range(12))
    closure()
    optimizer.step(closure)
    with pytest.raises(sp.GradientError, match="came after the optimizer began"):
        other.step(ids=range(12))


def test_ids_that_are_no_places(tmp_path, model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = captured(tmp_path / "run", model, optimizer, examples=None)
    inputs, labels = data_for(model, 4)
    loss_of(model, inputs, labels).backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"got the id 1000000003.*bank\(ids=\.\.\.\)"):
        recorder.step(ids=[10**9 + place for place in range(4)])


@pytest.mark.parametrize("name", [*BESIDE, *BESIDE_REFUSED])
def test_a_layer_beside_the_batch_may_be_left_out(tmp_path, name):
    torch.manual_seed(0)
    network, inputs = BesideTheBatch({**BESIDE, **BESIDE_REFUSED}[name]), torch.randn(12, WIDTH)
    labels = torch.arange(12) % 3
    plain = copy.deepcopy(network)
    if name in BESIDE_REFUSED:
        words = r"table.weight: its module sees no batch.*takes part in cdist.*parameters=\['!table\.weight', '!table"
        with pytest.raises(sp.GradientError, match=words):
            run(network, inputs, labels, tmp_path / "refused")
    network = copy.deepcopy(plain)
    run(network, inputs, labels, tmp_path / "run", parameters=["!table.*"])
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(plain, inputs, labels).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), plain.parameters(), strict=True))


def run(network, inputs, labels, directory, **options):
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    recorder = captured(directory, network, optimizer, **options)
    try:
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(network, inputs, labels).backward()
            optimizer.step()
            recorder.step(ids=range(12))
    finally:
        recorder.close()


def test_a_layer_that_is_added_to_every_example_is_captured(tmp_path):
    torch.manual_seed(0)
    network = BesideTheBatch(None)
    network.forward = lambda x: network.body(x) + network.table(torch.ones(1))
    run(network, torch.randn(12, 6), torch.arange(12) % 3, tmp_path / "run")
