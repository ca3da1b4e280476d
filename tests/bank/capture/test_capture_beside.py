"""Captured rows of what no layer's hook sees: attention and recurrent modules, and parameters of no layer."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from bare_uses import APART, BESIDE, FOLLOWED, STEPS, WIDTH, Bare, BesideTheBatch
from captured_runs import rows_of, size_of
from opened_layers import CALLS, Attending, Recurring
from torch import nn
from torch.overrides import _get_current_function_mode
from torch.utils.checkpoint import checkpoint

import source_proj as sp

RATE = 0.02


def losses_of(model, batch):
    """One number an example (B,), of which every part of the output has a share."""
    output = model(*batch)
    return output.flatten(1).tanh() @ torch.linspace(-1, 2, output[0].numel(), dtype=output.dtype)


def plain_rows(model, batch, seed):
    """The gradient of each example's loss (B, d), in the whole batch: with the dropout masks that it has there."""
    rows = []
    for place in range(len(batch[0])):
        torch.manual_seed(seed)
        value = losses_of(model, batch)[place]
        gradients = torch.autograd.grad(value, list(model.parameters()), allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows)


def part_of(batch, examples):
    return tuple(tensor[examples] for tensor in batch)


def assert_captured(directory, model, batch, sizes, tolerance=1e-5):
    """Rows of a run whose every example is seen once are its loss gradients, and training is that without capture."""
    model.train()
    alone, n = copy.deepcopy(model), len(batch[0])
    optimizers = [torch.optim.SGD(each.parameters(), lr=RATE) for each in (model, alone)]
    sketch = sp.Sketch(size_of(model), "identity")
    recorder = sp.Recorder(model, optimizers[0], directory, capture=sketch, task=sp.Classification(), examples=n)
    expected = torch.empty(n, size_of(model))
    for step, index in enumerate(torch.arange(n).split(sizes)):
        expected[index] = plain_rows(copy.deepcopy(alone), part_of(batch, index), step)
        for each, optimizer in zip((model, alone), optimizers, strict=True):
            optimizer.zero_grad()
            torch.manual_seed(step)
            losses_of(each, part_of(batch, index)).mean().backward()
            optimizer.step()
        recorder.step(ids=index)
    rows = rows_of(recorder.bank(storage="float32"))
    assert float((rows - expected).norm()) <= tolerance * float(expected.norm())
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [[4, 4, 2], [1, 1], [STEPS, 1, STEPS]], ids=str)
@pytest.mark.parametrize("name", FOLLOWED)
def test_parameters_of_no_layer(tmp_path, name, sizes):
    torch.manual_seed(0)
    assert_captured(tmp_path / "run", Bare(*FOLLOWED[name]), (torch.randn(sum(sizes), STEPS, WIDTH),), sizes)


@pytest.mark.parametrize("name", APART)
def test_what_is_not_followed_is_refused_with_a_remedy(tmp_path, name):
    torch.manual_seed(0)
    with pytest.raises(sp.GradientError, match=r"parameters of no layer|parameters=\['!p.0'\]"):
        assert_captured(tmp_path / "run", Bare(*APART[name]), (torch.randn(8, STEPS, WIDTH),), [4, 4])
    assert _get_current_function_mode() is None


@pytest.mark.parametrize("sizes", [[3, 3, 2], [1, 1], [4]], ids=str)
@pytest.mark.parametrize("name", BESIDE)
def test_layers_that_see_no_batch(tmp_path, name, sizes):
    torch.manual_seed(0)
    assert_captured(tmp_path / "run", BesideTheBatch(BESIDE[name]), (torch.randn(sum(sizes), WIDTH),), sizes)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"dropout": 0.3}], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_attention(tmp_path, call, batch_first, options):
    torch.manual_seed(1)
    model = Attending(CALLS[call], batch_first=batch_first, **options)
    batch = torch.randn(8, STEPS, WIDTH), torch.randn(8, STEPS + 2, WIDTH), torch.tensor([7, 3, 1, 5, 2, 7, 6, 4])
    assert_captured(tmp_path / "run", model, batch, [4, 4])


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(tmp_path, kind, packed, bidirectional, dropout):
    torch.manual_seed(2)
    options = {"num_layers": 2, "bidirectional": bidirectional, "batch_first": not packed, "dropout": dropout}
    model = Recurring(kind, packed, started=bidirectional, **options)
    batch = torch.randn(9, STEPS, WIDTH), torch.tensor([5, 2, 1, 4, 3, 3, 5, 1, 2])
    if packed and dropout:  # torch draws for the packed steps alone: the same law, other masks
        assert_sums(tmp_path / "run", model, batch, [4, 3, 2])
    else:
        assert_captured(tmp_path / "run", model, batch, [4, 3, 2])


def assert_sums(directory, model, batch, sizes):
    """Rows of a step sum to its gradient, as the capture itself asserts at its first steps."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    sketch = sp.Sketch(64)
    recorder = sp.Recorder(model, optimizer, directory, capture=sketch, task=sp.Classification())
    for index in torch.arange(len(batch[0])).split(sizes):
        optimizer.zero_grad()
        losses_of(model, part_of(batch, index)).mean().backward()
        optimizer.step()
        recorder.step(ids=index)
    assert recorder.bank().finalized


class Cells(nn.Module):
    """A cell, step by step."""

    def __init__(self, kind):
        super().__init__()
        self.cell, self.head = kind(WIDTH, 4), nn.Linear(4, 3)

    def forward(self, x):
        state = None
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(tmp_path, kind):
    torch.manual_seed(3)
    assert_captured(tmp_path / "run", Cells(kind), (torch.randn(10, 3, WIDTH),), [4, 4, 2])


class Vision(nn.Module):
    """A class token and positions before torch's own encoder, with all its dropout."""

    def __init__(self):
        super().__init__()
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.randn(STEPS + 1, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.2, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.encoder(x)[:, 0])


@pytest.mark.parametrize("size", [1, 2])
def test_gradients_that_accumulate_are_each_parameters_own(tmp_path, size):
    torch.manual_seed(4)
    model = Bare(*FOLLOWED["a class token and positions"]).train()
    alone, x = copy.deepcopy(model), torch.randn(2 * size, STEPS, WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    recorder = sp.Recorder(model, optimizer, tmp_path, capture=sp.Sketch(64), task=sp.Classification())
    for each in (model, alone):
        for part in x.split(size):
            (losses_of(each, (part,)).mean() / 2).backward()
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    optimizer.step()
    recorder.step(ids=range(2 * size))
    assert recorder.bank().finalized


class Tied(nn.Module):
    """A table whose transpose is the head, without a layer of its own, and whose numbers a scale multiplies."""

    def __init__(self):
        super().__init__()
        self.table, self.inner = nn.Embedding(7, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, tokens):
        return F.linear(torch.tanh(self.inner(self.table(tokens))), self.table.weight * self.scale)


class WeightNormed(nn.Module):
    """Weights that are made of parameters."""

    def __init__(self):
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, 5))
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.first(x).tanh())


@pytest.mark.parametrize("sizes", [[4, 4, 2], [2, 8], [STEPS, STEPS], [7, 3], [1, 9], [1, 1, 8]], ids=str)
@pytest.mark.parametrize("make", [Vision, Tied, WeightNormed])
def test_whole_models(tmp_path, make, sizes):
    torch.manual_seed(4)
    x = torch.randint(7, (10, STEPS)) if make is Tied else torch.randn(10, STEPS, WIDTH)
    assert_captured(tmp_path / "run", make(), (x,), sizes)


def test_a_parameter_that_is_left_out_is_none_of_the_examples(tmp_path):
    """What is made of it has a graph, too, and as many rows as the batch."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
            self.other, self.scale = nn.Parameter(torch.randn(4, 1)), nn.Parameter(torch.randn(WIDTH))

        def forward(self, x):
            return self.last(self.first(x) * (self.other.exp() * self.scale).sum(0))

    torch.manual_seed(5)
    model, x = Scaled().train(), torch.randn(4, WIDTH)
    wanted = [name for name, _ in model.named_parameters() if name != "other"]
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    size = sum(p.numel() for name, p in model.named_parameters() if name in wanted)
    recorder = sp.Recorder(
        model, optimizer, tmp_path, capture=sp.Sketch(size, "identity"), task=sp.Classification(), parameters=wanted
    )
    expected = [
        torch.cat([g.flatten() for g in torch.autograd.grad(value, [model.get_parameter(n) for n in wanted])])
        for value in (losses_of(model.eval(), (x[place : place + 1],))[0] for place in range(4))
    ]
    losses_of(model.train(), (x,)).mean().backward()
    optimizer.step()
    recorder.step(ids=range(4))
    torch.testing.assert_close(rows_of(recorder.bank(storage="float32")), torch.stack(expected), rtol=1e-4, atol=1e-5)


def scaled(p):
    with torch.no_grad():
        sizes = p.abs().mean(1, keepdim=True)
    return p / sizes


CONSTANTS = {
    "times constants": (lambda x, p: x + torch.arange(float(STEPS))[:, None] * p, (WIDTH,)),
    "positions by number": (lambda x, p: x + p[torch.arange(x.shape[1])], (STEPS + 3, WIDTH)),
    "beside the identity": (lambda x, p: x @ (torch.eye(WIDTH) + p), (WIDTH, WIDTH)),
    "a mask of attention": (
        lambda x, p: F.scaled_dot_product_attention(x, x, x, attn_mask=p + torch.full((STEPS, STEPS), -9.0).triu(1)),
        (STEPS, STEPS),
    ),
    "ones for each example": (lambda x, p: x + (torch.ones(len(x), 1) * p)[:, None], (WIDTH,)),
    "mask tokens": (lambda x, p: torch.cat([x, p.repeat(len(x), 2, 1)], 1), (1, 1, WIDTH)),
    "a product with a vector": (lambda x, p: x + (x @ p)[..., None], (WIDTH,)),
    "by mm": (lambda x, p: torch.mm(x.flatten(0, 1), p).view_as(x), (WIDTH, WIDTH)),
    "by keyword": (lambda x, p: torch.matmul(x, other=p), (WIDTH, WIDTH)),
    "by torch.layer_norm": (lambda x, p: torch.layer_norm(x, (WIDTH,), p, None, 1e-5, True), (WIDTH,)),
    "no transpose": (lambda x, p: x @ p.permute(0, 1), (WIDTH, WIDTH)),
    "expanded as": (lambda x, p: x + p.expand_as(x), (WIDTH,)),
    "of another type": (lambda x, p: x * (x > p).float() * p.type_as(x), (WIDTH,)),
    "rounded": (lambda x, p: F.linear(x, (p.round() - p).detach() + p), (WIDTH, WIDTH)),
    "its own signs": (lambda x, p: F.linear(x, p * (p > 0).float()), (WIDTH, WIDTH)),
    "zeros like it": (lambda x, p: F.linear(x, torch.where(p > 0, p, torch.zeros_like(p))), (WIDTH, WIDTH)),
    "scaled without a gradient": (lambda x, p: F.linear(x, scaled(p)), (WIDTH, WIDTH)),
    "constants of another type": (lambda x, p: x + torch.arange(STEPS)[:, None].to(x) * p, (WIDTH,)),
}


@pytest.mark.parametrize("sizes", [[STEPS, STEPS], [4, 4, 2], [1, 2, 7], [WIDTH, 3, 1]], ids=str)
@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_are_no_examples_however_many_these_are(tmp_path, name, sizes):
    torch.manual_seed(6)
    use, shape = CONSTANTS[name]
    assert_captured(tmp_path / "run", Bare(use, (shape,)), (torch.randn(sum(sizes), STEPS, WIDTH),), sizes)


DRAWN = {
    "dropout": lambda p: F.dropout(p, 0.5),
    "dropout of channels": lambda p: F.dropout1d(p, 0.5),
    "dropout of planes": lambda p: F.dropout2d(p[None, None], 0.5)[0, 0],
    "alpha dropout of features": lambda p: F.feature_alpha_dropout(p, 0.5, training=True),
    "torch's own dropout": lambda p: torch.native_dropout(p, 0.5, True)[0],
    "dropout in place": lambda p: torch.dropout_(p * 1, 0.5, True),
    "attention": lambda p: F.scaled_dot_product_attention(p[None], p[None], p[None], dropout_p=0.5)[0],
    "a draw from numbers": lambda p: torch.bernoulli(p.sigmoid()) * p,
}


@pytest.mark.parametrize("name", DRAWN)
def test_what_is_made_of_parameters_draws_once(tmp_path, name):
    torch.manual_seed(6)
    model = Bare(lambda x, p: x * DRAWN[name](p), ((STEPS, WIDTH),))
    assert_captured(tmp_path / "run", model, (torch.randn(10, STEPS, WIDTH),), [4, 4, 2])


class Started(nn.Module):
    """Recurrent layers whose first state is learnt."""

    def __init__(self, kind):
        super().__init__()
        self.layer, self.head = kind(WIDTH, 4, batch_first=True), nn.Linear(4, 3)
        self.h, self.c = (nn.Parameter(torch.randn(1, 1, 4)) for _ in range(2))

    def forward(self, x):
        states = [state.expand(-1, len(x), -1).contiguous() for state in (self.h, self.c)]
        return self.head(self.layer(x, tuple(states) if isinstance(self.layer, nn.LSTM) else states[0] + states[1])[0])


@pytest.mark.parametrize("sizes", [[4, 4, 2], [1, 9], [STEPS, STEPS]], ids=str)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_first_states_that_are_learnt(tmp_path, kind, sizes):
    torch.manual_seed(7)
    assert_captured(tmp_path / "run", Started(kind), (torch.randn(10, STEPS, WIDTH),), sizes)


class Recomputed(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(WIDTH, WIDTH), layer, nn.Linear(WIDTH, 3)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))

    def inner(self, x):
        return x * self.token if self.layer is None else self.layer(x, x, x)[0]

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), self.first(x)], dim=1)
        return self.last(checkpoint(self.inner, x, use_reentrant=False))


@pytest.mark.parametrize("layer", [None, nn.MultiheadAttention(WIDTH, 2, batch_first=True)], ids=["bare", "opened"])
def test_what_is_computed_once_more_is_refused(tmp_path, layer):
    with pytest.raises(sp.GradientError, match="within activation checkpointing: leave them out by"):
        assert_captured(tmp_path / "run", Recomputed(layer), (torch.randn(8, STEPS, WIDTH),), [4, 4])


def test_a_token_before_layers_that_are_computed_once_more(tmp_path):
    torch.manual_seed(7)
    assert_captured(tmp_path / "run", Recomputed(lambda x, *_: (x.tanh(),)), (torch.randn(8, STEPS, WIDTH),), [4, 4])


def test_what_is_made_of_parameters_may_be_computed_once_more(tmp_path):
    torch.manual_seed(7)
    model = Bare(lambda x, p: x * checkpoint(torch.exp, p, use_reentrant=False), ((STEPS, WIDTH),))
    assert_captured(tmp_path / "run", model, (torch.randn(8, STEPS, WIDTH),), [4, 4])


@pytest.mark.parametrize("within", [False, True])
def test_an_interrupted_pass_leaves_nothing_behind(tmp_path, within):
    class Interrupted(Vision):
        ends = False

        def forward(self, x):
            made = super().forward(x)
            if self.ends:
                raise KeyboardInterrupt
            return made

    torch.manual_seed(8)
    model, x = Interrupted().train(), torch.randn(4, STEPS, WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    recorder = sp.Recorder(model, optimizer, tmp_path, capture=sp.Sketch(64), task=sp.Classification())

    def step():
        optimizer.zero_grad()
        losses_of(model, (x,)).mean().backward()
        optimizer.step()
        recorder.step(ids=range(4))

    step()
    model.ends = True
    with pytest.raises(KeyboardInterrupt), torch.device("cpu") if within else nullcontext():
        model(x)
    model.ends = False
    with pytest.raises(sp.GradientError, match=r"interrupted.*repeat this step"):
        step()
    step()
    assert recorder.bank().finalized
    model.ends = True
    with pytest.raises(KeyboardInterrupt), torch.device("cpu") if within else nullcontext():
        model(x)
    recorder.close()
    assert all("forward" not in vars(module) for module in model.modules())
    assert _get_current_function_mode() is None


def test_a_model_under_autocast(tmp_path):
    torch.manual_seed(9)
    model, x = Vision().train(), torch.randn(8, STEPS, WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    sketch = sp.Sketch(size_of(model), "identity")
    recorder = sp.Recorder(model, optimizer, tmp_path, capture=sketch, task=sp.Classification())
    expected = plain_rows(copy.deepcopy(model), (x,), 0)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = losses_of(model, (x,))
    losses.mean().backward()
    optimizer.step()
    recorder.step(ids=range(8))
    rows = rows_of(recorder.bank(storage="float32"))
    assert float((rows - expected).norm()) <= 0.05 * float(expected.norm())
