"""Rows belong to their examples, or the model is refused, whatever came first and whatever it does in training."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import source_proj as sp

D, T, N = 4, 3, 12


class Net(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between=lambda self, h: h, inputs=D):
        super().__init__()
        self.a, self.b, self.between = nn.Linear(inputs, 5), nn.Linear(5, 2), between

    def forward(self, x):
        return self.b(self.between(self, torch.tanh(self.a(x))))


class Sorted(Net):
    """Sorts examples by their first number, as for packing, and puts them back behind its layers."""

    def forward(self, x):
        order = x[:, 0].argsort(descending=True, stable=True)
        return super().forward(x[order])[order.argsort()]


class Reversed(Net):
    def forward(self, x):
        return super().forward(x.flip(0)).flip(0)


class Beside(Net):
    """A loss of its own whose layer sees time before examples."""

    def __init__(self):
        super().__init__()
        self.aux = nn.Linear(D, 3)

    def forward(self, x):
        steps = x[:, None] + torch.arange(T)[:, None]
        return super().forward(x), self.aux(steps.transpose(0, 1).reshape(-1, D)).square().mean()


class Kept(Net):
    """The same, as an attribute."""

    def __init__(self):
        super().__init__()
        self.aux = nn.Linear(D, 3)

    def forward(self, x):
        self.extra = self.aux(x.flip(0)).square()
        return super().forward(x), self.extra.mean(1).flip(0).mean()


class Positions(Net):
    """An embedding of no batch: of one position, which all steps of all examples share; T = 2 is like two examples."""

    def __init__(self, steps):
        super().__init__()
        self.e, self.steps = nn.Embedding(4, 5), steps

    def forward(self, x):
        h = torch.tanh(self.a(x))[:, None].expand(-1, self.steps, -1)
        return self.b(torch.tanh(h + self.e(torch.tensor(3)))).mean(1)


# These, and batch_norm behind, can't run on one example.
def own_normalisation(model, h):
    return (h - h.mean(0)) / (h.var(0) + 1e-3).sqrt() if model.training else h


def mixed_up(model, h):
    return 0.7 * h + 0.3 * h.flip(0) if model.training else h


def functional(model, h):
    return F.batch_norm(h, None, None, training=True) if model.training else h


class Given(Net):
    """Sorts its examples, and gives their order in the place of putting them back."""

    def forward(self, x):
        order = x[:, 0].argsort(descending=True)
        return super().forward(x[order]), order


class Behind(Net):
    """Mixes what its last layer gives."""

    def __init__(self, mix):
        super().__init__()
        self.mix = mix

    def forward(self, x):
        return self.mix(super().forward(x))


def without_gradient(_, h):
    return h - h.mean(0).detach()


def scaled_by_all(_, h):
    return h / h.detach().norm()


def chosen_by_the_mean(_, h):
    return torch.where(h > h.mean(), h, 2 * h)


WRONG = {
    "order given": Given,
    "softmax over the batch": lambda: Behind(lambda o: o.softmax(0)),
    "mean taken off behind": lambda: Behind(lambda o: o - o.mean(0)),
    "attention between examples": lambda: Behind(lambda o: (o @ o.T).softmax(1) @ o),
    "batch_norm behind": lambda: Behind(lambda o: F.batch_norm(o, None, None, training=True)),
    "statistics without gradient": lambda: Net(without_gradient),
    "scale without gradient": lambda: Net(scaled_by_all),
    "chosen by the mean": lambda: Net(chosen_by_the_mean),
    "sorted": Sorted,
    "reversed": Reversed,
    "mean of the batch": lambda: Net(lambda _, h: h - h.mean(0)),
    "own normalisation in training": lambda: Net(own_normalisation),
    "mixed up in training": lambda: Net(mixed_up),
    "batch_norm in training": lambda: Net(functional),
    "a loss of its own": Beside,
    "a loss of an attribute": Kept,
}
RIGHT = {
    "plain": Net,
    "dropout of ones": lambda: Net(lambda model, h: F.dropout(h, 1e-9, model.training)),
    "instance norm": lambda: Net(lambda _, h: F.instance_norm(h[:, None])[:, 0]),
    "gathered within examples": lambda: Net(lambda _, h: h.gather(1, h.argsort(1)) + h[:, [4, 3, 2, 1, 0]]),
    "examples indexed in order": lambda: Net(lambda _, h: h[torch.arange(len(h))]),
    "one position, two steps": lambda: Positions(2),
    "one position, three steps": lambda: Positions(3),
    "examples indexed and put back": lambda: Net(lambda _, h: h[torch.arange(len(h)).flip(0)].flip(0)),
}
BEFORE = {
    "nothing": lambda model, x, least: None,
    "a look at one example": lambda model, x, least: model(x[:least]),
    "a batch in order": lambda model, x, least: model(x[x[:, 0].argsort(descending=True)]),
    "a pass in evaluation mode": lambda model, x, least: (model.eval()(x), model.train()),
}


def loss_of(answers, labels):
    logits, more = answers if isinstance(answers, tuple) else (answers, 0)
    if isinstance(more, torch.Tensor) and more.dtype == torch.int64:
        labels, more = labels[more], 0
    return F.cross_entropy(logits, labels) + more


def captured(directory, model, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1e-9)
    sketch = sp.Sketch(sum(p.numel() for p in model.parameters()), "identity")
    return optimizer, sp.Recorder(model, optimizer, directory, capture=sketch, task=sp.Classification(), examples=N)


def trained(directory, model, before, sizes, least=1):
    """Rows of one epoch in batches of these sizes."""
    inputs, labels = torch.randn(N, D), torch.randint(2, (N,))
    optimizer, recorder = captured(directory, model)
    before(model, inputs, least)
    for ids in torch.arange(N).split(sizes):
        optimizer.zero_grad()
        loss_of(model(inputs[ids]), labels[ids]).backward()
        optimizer.step()
        recorder.step(ids=ids)
    bank = recorder.bank(storage="float32")
    return inputs, labels, torch.cat([part.rows for part in bank.stages[0].iter_rows(0)])


@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
@pytest.mark.parametrize("name", WRONG)
def test_examples_that_are_mixed_or_moved_are_refused(tmp_path, name, before):
    least = 2 if name in ("own normalisation in training", "batch_norm in training", "batch_norm behind") else 1
    for sizes in ([4, 4, 4], [least, 2, 10 - least]):
        torch.manual_seed(0)
        with pytest.raises(sp.GradientError, match=r"depends on the other examples|see no batch|does not run"):
            trained(tmp_path / str(sizes), WRONG[name](), before, sizes, least)


@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
@pytest.mark.parametrize("make", RIGHT.values(), ids=RIGHT)
def test_examples_that_are_apart_have_rows_of_their_own(tmp_path, make, before):
    torch.manual_seed(1)
    model = make()
    twin = copy.deepcopy(model).eval()
    inputs, labels, rows = trained(tmp_path / "run", model, before, [1, 2, 4, 5])
    # Rows are a step's share, times the size of its batch: steps of other sizes weigh alike.
    for place in range(N):
        here = slice(place, place + 1)
        own = torch.autograd.grad(loss_of(twin(inputs[here]), labels[here]), list(twin.parameters()))
        own = torch.cat([g.flatten() for g in own])
        assert torch.allclose(rows[place], own, rtol=1e-4, atol=1e-6)


def lost(h):
    """The same, by an operation that the graph is not followed through."""
    made = torch.zeros_like(h)
    made[:, :] = h
    return made


class Keeping(Net):
    """Keeps an auxiliary loss, counts its passes, and draws from the generators of Python and numpy."""

    def __init__(self, following):
        super().__init__()
        self.following, self.passes, self.kept = following, 0, []
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, x):
        h = torch.tanh(self.a(x)) * self.scale
        self.passes += 1
        self.auxiliary = h.square().mean() * self.passes
        self.kept.append(len(x))
        h = h * (1 + 0.1 * random.random() + 0.1 * float(np.random.rand()) + 0.01 * len(self.kept))  # noqa: NPY002
        return self.b(h if self.following else lost(h))


@pytest.mark.parametrize("following", [True, False])
@pytest.mark.parametrize("by_hook", [True, False])
def test_a_model_that_is_looked_at_trains_as_without(tmp_path, following, by_hook):
    found = []
    for capture in (False, True):
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(3)
        model, seen = Keeping(following), {}
        inputs, labels = torch.randn(N, D), torch.randint(2, (N,))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if by_hook:
            model.a.register_forward_hook(lambda _, __, output, seen=seen: seen.update(a=output))
        if capture:
            optimizer, recorder = captured(tmp_path / "run", model, optimizer)
        for step in range(4):
            ids = torch.arange(N).roll(step)[:4]
            optimizer.zero_grad()
            loss = loss_of(model(inputs[ids]), labels[ids])
            loss = loss + (seen["a"].square().mean() if by_hook else model.auxiliary)
            loss.backward()
            optimizer.step()
            if capture:
                recorder.step(ids=ids)
        found.append([*model.state_dict().values(), torch.tensor([model.passes, *model.kept])])
    assert all(torch.equal(alone, beside) for alone, beside in zip(*found, strict=True))


def test_flat_outputs_are_followed(tmp_path):
    torch.manual_seed(0)
    model = Net()
    forwards = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    optimizer, recorder = captured(tmp_path / "run", model)
    inputs, labels = torch.randn(N, T, D), torch.randint(2, (N, T))
    for step in range(4):
        forwards.clear()
        ids = torch.arange(4 * step, 4 * step + 4) % N
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[ids]).view(-1, 2), labels[ids].view(-1)).backward()
        optimizer.step()
        recorder.step(ids=ids)
        assert (len(forwards) == 1) is (step == 3)  # before, passes are compared with their halves


def test_parameters_to_leave_out_are_of_those_that_are_trained(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 5), nn.Linear(5, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    options = {"capture": sp.Sketch(16), "task": sp.Classification(), "examples": N}
    recorder = sp.Recorder(model, optimizer, tmp_path / "run", parameters=["!1.*"], **options)
    loss_of(model(torch.randn(N, D)), torch.randint(2, (N,))).backward()
    optimizer.step()
    recorder.step(ids=range(N))
    assert recorder.bank().space_spec["names"] == ["2.weight", "2.bias"]


@pytest.mark.parametrize("every", [2, 3, 4, 8, 16, 32])
def test_what_a_loop_does_at_every_nth_step_is_seen(tmp_path, every):
    """A penalty on gradients by the input goes through the layers once more."""
    torch.manual_seed(0)
    model = Net()
    optimizer, recorder = captured(tmp_path / "run", model)
    inputs, labels = torch.randn(N, D), torch.randint(2, (N,))

    def train(steps):
        for step in range(1, steps):
            optimizer.zero_grad()
            x = inputs[:4].clone().requires_grad_()
            loss = loss_of(model(x), labels[:4])
            if step % every == 0:
                (slope,) = torch.autograd.grad(loss, x, create_graph=True)
                loss = loss + slope.square().sum()
            loss.backward()
            optimizer.step()
            recorder.step(ids=range(4))

    with pytest.raises(sp.GradientError, match="do not sum to the gradient"):
        train(100 * every)


def test_parameters_that_are_frozen_midway_are_refused_at_once(tmp_path):
    torch.manual_seed(0)
    model = Net()
    optimizer, recorder = captured(tmp_path / "run", model)
    inputs, labels = torch.randn(N, D), torch.randint(2, (N,))
    for step in range(9):
        if step == 8:  # behind the first steps, which are audited
            model.a.requires_grad_(False)
        optimizer.zero_grad()
        loss_of(model(inputs), labels).backward()
        if step == 8:
            with pytest.raises(sp.GradientError, match=r"'a.weight', 'a.bias'.*frozen.*parameters=\['!a.weight'"):
                optimizer.step()
        else:
            optimizer.step()
            recorder.step(ids=range(N))


def by_vmap(model, h):
    return h + torch.func.vmap(model.more)(h)


def one_by_one(model, h):
    return torch.stack([model.more(row) for row in h])


@pytest.mark.parametrize(
    ("between", "words"),
    [
        (
            by_vmap,
            r"more.weight: its module sees no batch.*within a transform of torch.func.*parameters=\['!more.weight'",
        ),
        (one_by_one, r"'more' was called with .*one example.*parameters=\['!more\.\*'\]"),
    ],
)
def test_layers_whose_examples_are_not_seen_are_named(tmp_path, between, words):
    torch.manual_seed(0)
    model = Net(between)
    model.more = nn.Linear(5, 6 if between is one_by_one else 5)  # a multiple of the batch's size
    if between is one_by_one:
        model.b = nn.Linear(6, 2)
    optimizer, _ = captured(tmp_path / "run", model)
    with pytest.raises(sp.GradientError, match=words):
        loss_of(model(torch.randn(3, D)), torch.randint(2, (3,))).backward()
    del optimizer


def test_a_pass_that_was_interrupted_ends_no_capture(tmp_path):
    stops = []

    def between(_, h):
        if stops.pop() if stops else False:
            raise KeyboardInterrupt
        return h

    torch.manual_seed(0)
    model = Net(between)
    optimizer, recorder = captured(tmp_path / "run", model)
    inputs, labels = torch.randn(N, D), torch.randint(2, (N,))

    def step():
        optimizer.zero_grad()
        loss_of(model(inputs), labels).backward()
        optimizer.step()
        recorder.step(ids=range(N))

    for restore in (False, True):
        step()
        stops.append(True)
        with pytest.raises(KeyboardInterrupt):
            step()
        if restore:
            recorder.restore()
        else:
            with pytest.raises(sp.GradientError, match=r"interrupted.*repeat this step"):
                step()
        step()
    assert recorder.bank().finalized
