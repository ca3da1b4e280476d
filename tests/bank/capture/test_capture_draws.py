"""Labels drawn while training make the sampled Fisher, against autograd an example at a time with the same numbers."""

import pytest
import torch
from captured_runs import Decoder, convolutional, data_for, loss_of, mlp, rows_of, sampled_gradients, size_of, train
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.utils.checkpoint import checkpoint

import source_proj as sp


def close(a, b, tolerance=1e-5):
    return float((a - b).norm()) <= tolerance * float(b.norm())


class Factors:
    """Sums the outer products of the steps at which labels are drawn, each for the steps until the next."""

    def __init__(self, model, interval, ends=()):
        self.model, self.interval, self.ends, self.step = model, interval, set(ends), 0
        self.squares, self.weights = [], []
        self.begin()

    def begin(self):
        self.squares.append(0.0)
        self.weights.append(0.0)
        self.wait = self.drawn = self.count = 0

    def __call__(self, index, inputs, labels, rate):
        if self.wait == 0:
            self.model.eval()
            rows = sampled_gradients(self.model, inputs, labels, self.drawn).double()
            self.model.train()
            self.wait = self.interval(self.count)
            self.squares[-1] = self.squares[-1] + self.wait * rate * rows.T @ rows
            self.weights[-1] += self.wait * rate * len(index)
            self.drawn, self.count = self.drawn + 1, self.count + len(index)
        self.wait, self.step = self.wait - 1, self.step + 1
        if self.step in self.ends:
            self.begin()

    def curvature(self, segment=0):
        return (self.squares[segment] / self.weights[segment]).float()


@pytest.mark.parametrize("make", [mlp, convolutional, Decoder])
@pytest.mark.parametrize(("every", "ends"), [(1, ()), (3, ()), (2, (5,))])
def test_curvature_is_that_of_the_drawn_labels(tmp_path, make, every, ends):
    torch.manual_seed(3)
    model = make()
    twin = Factors(model, lambda _: every, ends)
    recorder = train(
        tmp_path / "run", model, size=5, steps=8, before_step=twin, draw_every=every, segment_ends=ends, examples=12
    )
    bank = recorder.bank(storage="float32")
    for segment in range(len(ends) + 1):
        assert close(bank.stages[0].captured_curvature(segment)[0], twin.curvature(segment))
    source = sp.Source(bank, model=model, progress=False)
    assert source.curvature == "sampled_fisher"
    with pytest.raises(ValueError, match="take 'sampled_fisher'"):
        _ = sp.Source(bank, model=model, curvature="empirical_fisher", progress=False).segments
    assert bank.verify().ok


def test_by_default_labels_are_drawn_more_seldom_the_more_there_are(tmp_path):
    torch.manual_seed(3)
    model = Decoder()
    dim = size_of(model)
    twin = Factors(model, lambda count: 2 if count < dim else 4 if count < 4 * dim else 8)
    recorder = train(tmp_path / "run", model, n=120, size=60, steps=90, before_step=twin, draw_every=None, every=30)
    assert twin.count > 4 * dim
    assert close(recorder.bank(storage="float32").stages[0].captured_curvature(0)[0], twin.curvature(), 1e-4)


@pytest.mark.parametrize("make", [mlp, Decoder])
def test_training_and_rows_are_as_without_drawing(tmp_path, make):
    """To the last bit: the pass more adds nothing to a gradient, and moves no random state."""
    runs = []
    for every in (0, 2):
        torch.manual_seed(0)
        model = make()
        model.append(nn.Dropout(0.3)) if make is mlp else None
        recorder = train(tmp_path / str(every), model, draw_every=every)
        runs.append((model.state_dict(), rows_of(recorder.bank(storage="float32")), torch.rand(3)))
    (plain, rows, numbers), (drawn, others, same) = runs
    assert all(torch.equal(plain[name], value) for name, value in drawn.items())
    assert torch.equal(rows, others)
    assert torch.equal(numbers, same)


class Checkpointed(Decoder):
    """Computes its middle once more in every backward pass."""

    def forward(self, input_ids, labels=None):
        hidden = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        return self.head(hidden + checkpoint(self.mixed, hidden, use_reentrant=False))

    def mixed(self, hidden):
        return torch.tanh(self.mix(self.norm(hidden).cumsum(1)))


def test_layers_that_are_computed_once_more(tmp_path):
    banks = []
    for make in (Decoder, Checkpointed):
        torch.manual_seed(0)
        banks.append(train(tmp_path / make.__name__, make(), draw_every=2).bank(storage="float32"))
    plain, other = banks
    assert close(rows_of(other), rows_of(plain))
    assert close(other.stages[0].captured_curvature(0)[0], plain.stages[0].captured_curvature(0)[0])


def test_a_scaled_loss_changes_nothing(tmp_path):
    found = []
    for scale in (None, 2.0**12):
        torch.manual_seed(0)
        model = Decoder()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        tokens, _ = data_for(model, 12)
        recorder = sp.Recorder(
            model, optimizer, tmp_path / str(scale), also=[scaler] if scale else [], capture=sp.Sketch(64),
            task=sp.CausalLM(), draw_every=1,
        )  # fmt: skip
        for index in torch.arange(12).split(4):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, tokens[index], tokens[index], told=True)).backward()
            scaler.step(optimizer)
            scaler.update()
            recorder.step(ids=index)
        found.append(recorder.bank(storage="float32"))
    assert close(found[1].stages[0].captured_curvature(0)[0], found[0].stages[0].captured_curvature(0)[0], 1e-4)


class WithoutLabels(nn.Module):
    """A decoder that takes no labels, and says what it was called with."""

    def __init__(self):
        super().__init__()
        self.inner, self.seen = Decoder(), set()

    def forward(self, input_ids):
        return self.inner(input_ids)


def test_a_model_that_takes_no_labels_does_not_see_them(tmp_path):
    torch.manual_seed(0)
    model = WithoutLabels()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = sp.Recorder(model, optimizer, tmp_path / "run", capture=sp.Sketch(16), task=sp.CausalLM())
    tokens, _ = data_for(model.inner, 4)
    logits = model(input_ids=tokens, labels=tokens, index=torch.arange(4))
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    optimizer.step()
    recorder.step()
    assert sp.Source(recorder.bank(), model=model, progress=False).curvature == "sampled_fisher"
    recorder.close()
    with pytest.raises(TypeError, match="labels"):
        model(input_ids=tokens, labels=tokens)


# Where none can be drawn ----------------------------------------------------------------------------------------


def run_of(directory, *, told, steps=2, model=None, **options):
    torch.manual_seed(0)
    model = model or Decoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens, _ = data_for(model, 4)
    options = {"capture": sp.Sketch(16), "task": sp.CausalLM(), "every": 1, **options}
    recorder = sp.Recorder(model, optimizer, directory, **options)
    recorder.restore()
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, tokens, tokens, told=told).backward()
        optimizer.step()
        recorder.step(ids=range(4), batch={"input_ids": tokens, "labels": tokens})
    return recorder


def test_without_labels_the_empirical_fisher_is_captured_and_it_is_said(tmp_path):
    with pytest.warns(UserWarning, match=r"call model\(\.\.\., labels=labels\)"):
        recorder = run_of(tmp_path / "run", told=False)
    assert sp.Source(recorder.bank(), model=recorder._model, progress=False).curvature == "empirical_fisher"
    with pytest.raises(sp.GradientError, match="labels=labels"):
        run_of(tmp_path / "other", told=False, draw_every=2)


def test_what_was_begun_goes_on_alike(tmp_path):
    run_of(tmp_path / "run", told=True).close()
    with pytest.raises(sp.MismatchError, match="draw_every=0 asks for the empirical Fisher"):
        run_of(tmp_path / "run", told=True, draw_every=0)
    drawn = run_of(tmp_path / "run", told=True)
    drawn.close()
    other = run_of(tmp_path / "second", told=True, draw_every=0, stage="second", model=drawn._model)
    with pytest.raises(sp.MismatchError, match="kind of curvature of stage 'train' was 'sampled_fisher'"):
        other.bank(after=[drawn.captured()])


def test_counts_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="draw_every"):
        run_of(tmp_path / "run", told=True, draw_every=-1)
    with pytest.raises(ValueError, match="draw_every=0"):
        run_of(tmp_path / "run", told=True, task=sp.CausalLM(chunk=2), draw_every=2)
    with pytest.raises(TypeError, match="draw_every= belongs to capture="):
        run_of(tmp_path / "run", told=True, capture=None, task=None, draw_every=2)


class LossFirst(Decoder):
    """Gives (loss, logits), as models of transformers do where they shall not give a mapping."""

    def forward(self, input_ids, labels=None):
        logits = super().forward(input_ids)
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits


class Hidden(Decoder):
    """Gives its loss alone, in an object that nothing can be read of."""

    def forward(self, input_ids, labels=None):
        holder = type("Output", (), {})()
        logits = super().forward(input_ids)
        holder.loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return holder


def test_outputs_of_other_forms(tmp_path):
    tokens, _ = data_for(Decoder(), 4)
    kinds = []
    for make, loss in ((LossFirst, lambda out: out[0]), (Hidden, lambda out: out.loss)):
        torch.manual_seed(0)
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        recorder = sp.Recorder(model, optimizer, tmp_path / make.__name__, capture=sp.Sketch(16), task=sp.CausalLM())
        if make is Hidden:
            with pytest.warns(UserWarning, match="can't be drawn of what the model returned"):
                output = model(tokens, labels=tokens)
        else:
            output = model(tokens, labels=tokens)
        loss(output).backward()
        optimizer.step()
        recorder.step(ids=range(4))
        kinds.append(recorder.bank().trajectory.stages[0].capture.kind)
    assert kinds == ["sampled_fisher", "empirical_fisher"]


def test_labels_of_none_are_none(tmp_path):
    with pytest.warns(UserWarning, match="labels are not among"):
        recorder = run_of(tmp_path / "run", told=False, model=None)
    recorder.close()
    model = Decoder()
    tokens, _ = data_for(model, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other = sp.Recorder(model, optimizer, tmp_path / "other", capture=sp.Sketch(16), task=sp.CausalLM())
    with pytest.warns(UserWarning, match="labels are not among"):
        model(tokens, labels=None)
    other.close()
