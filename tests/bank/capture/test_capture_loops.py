"""Loops as people write them: half precision, clipping, dropout, evaluation in between; and refusals."""

import pytest
import torch
from captured_runs import Decoder, Loop, data_for, example_gradients, loss_of, mlp, rows_of, train
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.utils.checkpoint import checkpoint

import source_proj as sp


def test_a_scaled_loss_in_half_precision_and_a_step_that_the_scaler_skips(tmp_path):
    scaler = GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    loop = Loop(tmp_path / "run", also=[scaler])
    for number, index in enumerate(loop.batches):
        if number != 3:
            loop.expect(index)
        loop.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loop.loss(index)
        scaler.scale(loss * (float("inf") if number == 3 else 1.0)).backward()
        scaler.step(loop.optimizer)
        scaler.update()
        loop.recorder.step(ids=index)
    loop.check(0.03)


def test_a_scaler_that_nobody_named_is_refused(tmp_path):
    loop, scaler = Loop(tmp_path / "run"), GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loop.loss(loop.batches[0])).backward()
    with pytest.raises(sp.GradientError, match="GradScaler that is not in also="):
        scaler.step(loop.optimizer)


def test_rows_are_before_clipping_and_other_changes_of_the_gradient_are_refused(tmp_path):
    loop = Loop(tmp_path / "run", max_grad_norm=0.2)
    for index in loop.batches:
        loop.expect(index)
        loop.optimizer.zero_grad()
        loop.loss(index).backward()
        norm = nn.utils.clip_grad_norm_(loop.model.parameters(), 0.2)
        assert norm > 0.2
        loop.optimizer.step()
        loop.recorder.step(norm, ids=index)
    loop.check()
    other = Loop(tmp_path / "shorter", max_grad_norm=0.2)
    other.loss(other.batches[0]).backward()
    nn.utils.clip_grad_norm_(other.model.parameters(), 0.1)
    other.optimizer.step()
    with pytest.raises(sp.MismatchError, match="clipping explains"):
        other.recorder.step(torch.tensor(0.25), ids=other.batches[0])
    clipped = Loop(tmp_path / "unsaid")
    clipped.loss(clipped.batches[0]).backward()
    nn.utils.clip_grad_norm_(clipped.model.parameters(), 0.1)
    with pytest.raises(sp.GradientError, match="do not sum to the gradient"):
        clipped.optimizer.step()


def test_passes_that_train_nothing_are_not_captured(tmp_path):
    loop = Loop(tmp_path / "run")
    for index in loop.batches:
        loop.expect(index)
        with torch.no_grad():
            loop.loss(index)  # in training mode, without gradients
        loop.loss(index)  # with gradients, and without a backward pass
        loop.model.eval()
        loop.loss(index)
        saliency = loop.inputs[:3].clone().requires_grad_()
        torch.autograd.grad(loop.model(saliency).sum(), saliency)
        loop.model.train()
        loop.step(index)
    loop.check()


def test_dropout_gives_the_gradients_of_training(tmp_path):
    """Σ rows is the gradient of the very pass, masks included."""
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Dropout(0.5), nn.Linear(9, 3))
    loop = Loop(tmp_path / "run", model, n=4)
    index = torch.arange(4)
    loop.optimizer.zero_grad()
    loop.loss(index).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    loop.optimizer.step()
    loop.recorder.step(ids=index)
    rows = rows_of(loop.recorder.bank(storage="float32"))
    assert torch.allclose(rows.mean(0), gradient, atol=1e-6)


class Checkpointed(nn.Sequential):
    """Computes its first layers once more in the backward pass."""

    reentrant = False

    def forward(self, x):
        return self[2](checkpoint(lambda h: self[1](self[0](h)), x, use_reentrant=self.reentrant))


def test_checkpointed_activations(tmp_path):
    loop = Loop(tmp_path / "run", Checkpointed(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)))
    for index in loop.batches:
        plain = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        plain.load_state_dict(loop.model.state_dict())
        loop.twin.add(index, example_gradients(plain, loop.inputs[index], loop.labels[index]), loop.lr)
        loop.step(index)
    loop.check()
    loop.recorder.close()
    loop.model.reentrant = True
    other = Loop(tmp_path / "other", loop.model)
    other.inputs.requires_grad_()  # which this way of checkpointing wants
    with pytest.raises(sp.GradientError, match="use_reentrant=True"):
        other.loss(other.batches[0])


def test_two_captures_of_one_model_do_not_disturb_each_other(tmp_path):
    loop = Loop(tmp_path / "run")
    other = sp.Recorder(
        loop.model, loop.optimizer, tmp_path / "other", capture=sp.Sketch(8), task=sp.Classification()
    )  # fmt: skip
    for index in loop.batches:
        loop.expect(index)
        loop.step(index)
        other.step(ids=index)
    loop.check()


def _plainly(loop, buffer, index):
    loss_of(loop.model, buffer, loop.labels[index]).backward()


def _into_a_buffer_that_is_filled_again(loop, buffer, index):
    loss_of(loop.model, buffer, loop.labels[index]).backward()
    buffer.fill_(1e3)


def _in_two_passes_over_one_graph(loop, buffer, index):
    losses = nn.functional.cross_entropy(loop.model(buffer), loop.labels[index], reduction="none") / len(index)
    losses[:2].sum().backward(retain_graph=True)
    losses[2:].sum().backward()


@pytest.mark.parametrize("backward", [_into_a_buffer_that_is_filled_again, _in_two_passes_over_one_graph])
def test_rows_are_whole_when_a_backward_pass_has_ended(tmp_path, backward):
    """Products that are transformed together are held back until then, and no longer."""
    banks = []
    for name, own in (("plain", _plainly), ("other", backward)):
        torch.manual_seed(0)
        loop = Loop(tmp_path / name, mlp())
        loop.recorder.close()
        loop.recorder = sp.Recorder(
            loop.model, loop.optimizer, tmp_path / f"{name}-sketched", capture=sp.Sketch(1024), task=sp.Classification()
        )  # fmt: skip
        for index in loop.batches:
            loop.optimizer.zero_grad()
            own(loop, loop.inputs[index].clone(), index)
            loop.optimizer.step()
            loop.recorder.step(ids=index)
        banks.append(loop.recorder.bank(storage="float32"))
    plain, other = (rows_of(bank) for bank in banks)
    assert plain.any()
    assert float((plain - other).norm()) <= 1e-5 * float(plain.norm())


# Refused by name ------------------------------------------------------------------------------------------------


def test_batch_normalisation_in_training_mode(tmp_path):
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    loop = Loop(tmp_path / "run", model)
    with pytest.raises(sp.GradientError, match=r"batch normalisation in training mode mixes .*'1'"):
        loop.loss(loop.batches[0])
    model[1].eval()
    loop.step(loop.batches[0])


class AcrossExamples(nn.Sequential):
    """Each example sees the mean of the batch."""

    def forward(self, x):
        hidden = self[0](x)
        return self[1](hidden - hidden.mean(0))


def test_examples_that_depend_on_each_other(tmp_path):
    loop = Loop(tmp_path / "run", AcrossExamples(nn.Linear(5, 6), nn.Linear(6, 3)))
    with pytest.raises(sp.GradientError, match="depends on the other examples of its batch"):
        loop.loss(loop.batches[0])


def test_two_passes_in_a_step_and_wrong_ids(tmp_path):
    loop = Loop(tmp_path / "run")
    index = loop.batches[0]
    (loop.loss(index) + loop.loss(index)).backward()
    loop.optimizer.step()
    with pytest.raises(sp.MismatchError, match=r"2 forward passes of \[4, 4\] examples.*can't be captured"):
        loop.recorder.step(ids=index)
    other = Loop(tmp_path / "other", examples=12)
    other.loss(index).backward()
    other.optimizer.step()
    for ids, error, message in (
        (None, TypeError, r"step\(ids="),
        ([0.5] * 4, TypeError, "integers"),
        (["a", "b", "c", "d"], TypeError, r"integers, got str: their own ids are given to bank\(ids=\.\.\.\)"),
        ([0, 1, 2, 12], ValueError, "from 0 to 11"),
        ([0, -1, 2, 3], ValueError, "got -1"),
    ):
        with pytest.raises(error, match=message):
            other.recorder.step(ids=ids)
    other.recorder.step(ids=index)


def test_a_gradient_that_was_not_zeroed(tmp_path):
    loop = Loop(tmp_path / "run")
    loop.step(loop.batches[0])
    loop.loss(loop.batches[1]).backward()
    with pytest.raises(sp.GradientError, match="not zeroed"):
        loop.optimizer.step()


def test_a_penalty_in_the_loss(tmp_path):
    loop = Loop(tmp_path / "run")
    (loop.loss(loop.batches[0]) + loop.model[0].weight.square().sum()).backward()
    with pytest.raises(sp.GradientError, match=r"0\.weight.*penalty on weights"):
        loop.optimizer.step()


@pytest.mark.parametrize("late", [False, True])
def test_a_parameter_outside_of_its_module(tmp_path, late):
    class Tied(nn.Sequential):
        used = not late

        def forward(self, x):
            y = self[1](torch.tanh(self[0](x)))
            return y + torch.cdist(x, self[1].weight[:, :5]) if self.used else y

    loop = Loop(tmp_path / "run", Tied(nn.Linear(5, 6), nn.Linear(6, 3)))
    if late:
        loop.expect(loop.batches[0])
        loop.step(loop.batches[0])
        loop.model.used = True
    with pytest.raises(sp.GradientError, match=r"parameters=\['!1.weight'"):
        loop.loss(loop.batches[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile's own imports
def test_evaluation_mode_and_compiled_models(tmp_path):
    loop = Loop(tmp_path / "run")
    loop.model.eval()
    loop.loss(loop.batches[0]).backward()
    with pytest.raises(sp.GradientError, match=r"no pass of the model was captured.*model.train\(\)"):
        loop.optimizer.step()
    with pytest.raises(sp.GradientError, match="compiled model"):
        Loop(tmp_path / "compiled", torch.compile(mlp()))


class Distances(nn.Module):
    """A parameter of no layer, in an operation that is not followed."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return torch.relu(torch.cdist(x, self.scale[None].expand(7, -1)))


def test_uncovered_parameters_are_named_with_what_leaves_them_out(tmp_path):
    model = nn.Sequential(nn.Linear(5, 7), Distances(7), nn.Linear(7, 3))
    loop = Loop(tmp_path / "run", model)
    with pytest.raises(sp.GradientError, match=r"parameters=\['!1.scale'\]"):
        loop.loss(loop.batches[0])
    loop.recorder.close()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"capture": sp.Sketch(8), "task": sp.Classification(), "parameters": ["!1.scale"]}
    recorder = sp.Recorder(model, optimizer, tmp_path / "without", **options)
    inputs, labels = data_for(model, 4)
    loss_of(model, inputs, labels).backward()
    optimizer.step()
    recorder.step(ids=range(4))
    assert recorder.bank().space_spec["names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_arguments_that_do_not_go_together(tmp_path):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for options, message in (
        ({"task": sp.Classification()}, "task= belongs to capture="),
        ({"segment_ends": [3]}, "segment_ends= belongs to capture="),
        ({"capture": sp.Sketch(8)}, "capture= needs task="),
        ({"capture": 8, "task": sp.Classification()}, "must be a Sketch"),
    ):
        with pytest.raises(TypeError, match=message):
            sp.Recorder(model, optimizer, tmp_path, **options)
    with pytest.raises(ValueError, match="normalizer="):
        sp.Recorder(model, optimizer, tmp_path, capture=sp.Sketch(8), task=sp.CausalLM(reduction="token"))
    plain = sp.Recorder(model, optimizer, tmp_path / "plain")
    with pytest.raises(TypeError, match="has no bank"):
        plain.bank()
    with pytest.raises(TypeError, match="belong to a Recorder with capture="):
        plain.step(ids=[0])


def test_a_language_model_tells_how_many_tokens_an_example_has(tmp_path):
    torch.manual_seed(0)
    model = Decoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = sp.Recorder(
        model, optimizer, tmp_path / "run", capture=sp.Sketch(8), task=sp.CausalLM(), draw_every=0
    )  # fmt: skip
    tokens, _ = data_for(model, 4)
    loss_of(model, tokens, tokens).backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"step\(batch=...\)"):
        recorder.step(ids=range(4))


def test_a_preconditioner_that_changes_the_metric(tmp_path):
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    recorder = train(tmp_path / "run", model, optimizer=optimizer)
    with pytest.raises(ValueError, match="'shared' wants rows in the metric"):
        recorder.bank(preconditioner="shared")
    assert recorder.bank(preconditioner="none").finalized
