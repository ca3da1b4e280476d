"""Examples that a model puts into another order, and back: their rows are their own, or it is refused.

What a parameter of no layer is expanded to is the same in every row, and examples may be alike: neither shows an order.
"""

import builtins
import copy
import json
import logging
import random
import threading
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captured_runs import rows_of, size_of
from torch import nn

import source_proj as sp

WIDTH, STEPS = 6, 5


def losses_of(model, x):
    output = model(x)
    return output.flatten(1).tanh() @ torch.linspace(-1, 2, output[0].numel())


def captured(directory, model, x, before=None):
    """Rows of one step, and what they should be; None where the model is refused."""
    model.train()
    expected = [torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
                for loss in (losses_of(model, x)[place] for place in range(len(x)))]  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sketch = sp.Sketch(size_of(model), "identity")
    recorder = sp.Recorder(model, optimizer, directory, capture=sketch, task=sp.Classification(), examples=len(x))
    try:
        losses_of(model, x).mean().backward()
        optimizer.step()
        recorder.step(ids=range(len(x)))
    except sp.GradientError:
        return None
    rows = rows_of(recorder.bank(storage="float32"))
    return rows, torch.stack([torch.cat([g.flatten() for g in each]) for each in expected])


class Between(nn.Module):
    """A layer, something with a parameter of no layer, a layer."""

    def __init__(self, use):
        super().__init__()
        self.first, self.last, self.use = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3), use
        self.p, self.positions = nn.Parameter(torch.rand(WIDTH) + 0.5), nn.Embedding(STEPS, WIDTH)

    def forward(self, x):
        return self.last(self.use(self, self.first(x), x[:, 0, 0].argsort()))


def heads(m, h, _):
    left, right = h.chunk(2, -1)
    both = torch.cat([left, right], 0) * m.p[:3]
    return torch.cat(both.chunk(2, 0), -1)


def token(m, h, order):
    longer = torch.cat([m.p.expand(len(h), 1, -1), h[order]], 1)
    return longer.tanh()[order.argsort()][:, 1:] + longer.tanh()[order.argsort()][:, :1]


REORDERED = {
    "sorted, scaled, put back": lambda m, h, order: (h[order] * m.p)[order.argsort()],
    "sorted, normalised": lambda m, h, order: F.layer_norm(h[order], (WIDTH,), m.p)[order.argsort()],
    "steps outermost": lambda m, h, _: (h.transpose(0, 1).flatten(0, 1) * m.p)
    .unflatten(0, (STEPS, -1)).transpose(0, 1),
    "heads outermost": heads,
    "a token among the sorted": token,
    "copies outermost": lambda m, h, _: (h.repeat(2, 1, 1) * m.p).unflatten(0, (2, -1)).tanh().sum(0),
    "flipped": lambda m, h, _: (h.flip(0) * m.p).tanh().flip(0),
    "rolled": lambda m, h, _: (h.roll(1, 0) * m.p).tanh().roll(-1, 0),
    "positions among the sorted": lambda m, h, order: (h[order] + m.positions(torch.arange(STEPS)) * 1.0)
    .tanh()[order.argsort()],
    "a layer among the sorted": lambda m, h, order: m.first(h[order]).tanh()[order.argsort()],
}  # fmt: skip


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("size", [2, 3, 4, STEPS, 8])
@pytest.mark.parametrize("name", REORDERED)
def test_rows_are_of_their_examples_or_there_are_none(tmp_path, name, size, alike):
    torch.manual_seed(size)
    x = 1 + 3e-4 * torch.randn(size, STEPS, WIDTH) if alike else torch.randn(size, STEPS, WIDTH)
    found = captured(tmp_path / "run", Between(REORDERED[name]), x)
    if found is not None:
        rows, expected = found
        assert float((rows - expected).norm()) <= 1e-4 * float(expected.norm())


def test_some_of_these_orders_are_refused(tmp_path):
    """The law above may not hold because everything is refused, nor because nothing is."""
    torch.manual_seed(0)
    x = torch.randn(4, STEPS, WIDTH)
    plain = captured(tmp_path / "plain", Between(lambda m, h, _: h * m.p + m.positions(torch.arange(STEPS))), x)
    assert plain is not None
    assert captured(tmp_path / "sorted", Between(REORDERED["sorted, scaled, put back"]), x) is None


class Slotted:
    __slots__ = ("count",)

    def __init__(self):
        self.count = 0.0


class Leaving(nn.Module):
    """Leaves something behind in each pass that the next one makes use of."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.last, self.kind = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3), kind
        self.p = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.slow = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.generator, self.numpy, self.python = (
            torch.Generator().manual_seed(0),
            np.random.default_rng(0),
            random.Random(0),
        )
        self.slotted, self.legacy = Slotted(), np.random.RandomState(0)
        self.count, self.recent, self.nested = (
            torch.zeros(()),
            deque([0.0], maxlen=3),
            {"inner": [0.0], "at": {"n": 0.0}},
        )

    def drawn(self):
        kinds = {
            "torch": lambda: float(torch.rand((), generator=self.generator)),
            "numpy": lambda: float(self.numpy.random()),
            "python": lambda: self.python.random(),
            "tensor": lambda: float(self.count.add_(1)),
            "deque": lambda: (self.recent.append(self.recent[-1] + 1), sum(self.recent))[1],
            "nested": lambda: (self.nested["inner"].append(1.0), sum(self.nested["inner"]))[1],
            "deeper": lambda: (self.nested["at"].__setitem__("n", self.nested["at"]["n"] + 1), self.nested["at"]["n"])[
                1
            ],
            "slots": lambda: (setattr(self.slotted, "count", self.slotted.count + 1), self.slotted.count)[1],
            "legacy": lambda: float(self.legacy.rand()),
            "slow": self.follow,
            "data": lambda: (self.slow.weight.data.mul_(0.9), float(self.slow.weight.sum()))[1],
        }
        return kinds[self.kind]() if self.training else 0.0

    @torch.no_grad()
    def follow(self):
        for slow, fast in zip(self.slow.parameters(), self.first.parameters(), strict=True):
            slow.mul_(0.9).add_(fast, alpha=0.1)
        return float(self.slow.weight.sum())

    def forward(self, x):
        return self.last(self.first(x) * self.p * (1 + 0.1 * self.drawn()))


@pytest.mark.parametrize(
    "kind", ["torch", "numpy", "python", "tensor", "deque", "nested", "deeper", "slots", "legacy", "slow", "data"]
)
def test_what_a_pass_leaves_behind_is_that_of_training_alone(tmp_path, kind):
    torch.manual_seed(0)
    model = Leaving(kind).train()
    alone, x = copy.deepcopy(model), torch.randn(4, STEPS, WIDTH)
    if kind in ("torch", "numpy"):  # generators are copied by their states
        alone.generator.set_state(model.generator.get_state())
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.02) for each in (model, alone)]
    recorder = sp.Recorder(model, optimizers[0], tmp_path / "run", capture=sp.Sketch(64), task=sp.Classification())
    for _ in range(3):
        for each, optimizer in zip((model, alone), optimizers, strict=True):
            optimizer.zero_grad()
            losses_of(each, x).mean().backward()
            optimizer.step()
        recorder.step(ids=range(4))
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


class Frozen(dict):
    """A mapping that nobody changes."""

    def _no(self, *_, **__):
        raise TypeError("frozen")

    __setitem__ = update = clear = pop = copy = _no


class Refusing:
    @property
    def __dict__(self):
        raise RuntimeError("not to be looked into")


ATTRIBUTES = {
    "a module of Python": lambda: F,
    "numpy": lambda: np,
    "names of a module": globals,
    "an object with a module": lambda: SimpleNamespace(np=np, json=json),
    "a sparse tensor": lambda: torch.eye(3).to_sparse(),
    "compressed rows": lambda: {"at": torch.eye(3).to_sparse_csr()},
    "a tensor without numbers": lambda: torch.empty(3, device="meta"),
    "the system's entropy": random.SystemRandom,
    "a frozen mapping": lambda: Frozen(a=1),
    "a frozen mapping within": lambda: SimpleNamespace(at=Frozen(a=1)),
    "what refuses": Refusing,
    "a lock": threading.Lock,
    "a logger": lambda: logging.getLogger("x"),
    "a list within itself": lambda: (lambda each: each.append(each) or each)([1]),
    "an optimizer": lambda: torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1),
}


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("name", ATTRIBUTES)
def test_whatever_a_model_holds_it_trains(tmp_path, name):
    torch.manual_seed(0)
    model = Between(lambda m, h, _: h * m.p)
    model.held = held = ATTRIBUTES[name]()
    before = dict(vars(builtins))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    recorder = sp.Recorder(model, optimizer, tmp_path, capture=sp.Sketch(16), task=sp.Classification())
    losses_of(model, torch.randn(4, STEPS, WIDTH)).mean().backward()
    optimizer.step()
    recorder.step(ids=range(4))
    assert model.held is held
    assert dict(vars(builtins)) == before
    recorder.close()


@pytest.mark.parametrize("size", [2, 4, 5, 8, 16])
def test_constants_that_a_model_holds_are_no_examples(tmp_path, size):
    torch.manual_seed(0)
    for held in (lambda k: k, lambda k: [k], lambda k: {"at": k}, lambda k: SimpleNamespace(k=k)):
        model = Between(lambda m, h, _: h @ (m.constant() * m.p))
        model.held = held(torch.rand(WIDTH + 2, 1)[:WIDTH] if size % 2 else torch.rand(WIDTH, 1))
        model.constant = lambda model=model: next(iter(flat(model.held)))
        rows, expected = captured(tmp_path / str(len(list(tmp_path.iterdir()))), model, torch.randn(size, STEPS, WIDTH))
        assert float((rows - expected).norm()) <= 1e-4 * float(expected.norm())


def flat(held):
    if isinstance(held, torch.Tensor):
        yield held
    else:
        for each in held if isinstance(held, list) else (held if isinstance(held, dict) else vars(held)).values():
            yield from flat(each)


def test_noise_in_evaluation_mode_is_said_where_the_graph_follows(tmp_path):
    class Noisy(Between):
        def __init__(self):
            super().__init__(lambda m, h, _: h * m.p + torch.randn_like(h))

    torch.manual_seed(0)
    model, x = Noisy().train(), torch.randn(4, STEPS, WIDTH)
    expected = []
    for place in range(4):
        torch.manual_seed(5)
        loss = losses_of(model, x)[place]
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
        expected.append(torch.cat([g.flatten() for g in gradients]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sketch = sp.Sketch(size_of(model), "identity")
    recorder = sp.Recorder(model, optimizer, tmp_path, capture=sketch, task=sp.Classification())
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match="random in evaluation mode"):
        losses_of(model, x).mean().backward()
    optimizer.step()
    recorder.step(ids=range(4))
    torch.testing.assert_close(rows_of(recorder.bank(storage="float32")), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_hooks_of_parameters_see_what_they_see_without_capture(tmp_path):
    """Also of what is made of parameters: gradients for examples are taken through a graph of our own."""

    class Kept(Between):
        def __init__(self):
            super().__init__(lambda m, h, _: h * m.derived())

        def derived(self):
            self.q = self.p.exp()
            if self.q.requires_grad and torch.is_grad_enabled():
                self.q.retain_grad()
            return self.q

    seen = []
    for capture in (False, True):
        torch.manual_seed(0)
        model, x = Kept().train(), torch.randn(4, STEPS, WIDTH)
        calls = []
        model.p.register_hook(lambda g, calls=calls: calls.append(g.norm().item()))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        options = {"capture": sp.Sketch(64), "task": sp.Classification()} if capture else {}
        recorder = sp.Recorder(model, optimizer, tmp_path / str(capture), **options)
        losses_of(model, x).mean().backward()
        optimizer.step()
        recorder.step(**({"ids": range(4)} if capture else {}))
        seen.append((calls, model.q.grad, [p.detach() for p in model.parameters()]))
    (calls, kept, weights), (ours, our_kept, our_weights) = seen
    assert len(calls) == len(ours) == 1
    torch.testing.assert_close(kept, our_kept)
    torch.testing.assert_close(weights, our_weights)


def test_a_use_that_is_not_seen_is_refused_at_once(tmp_path):
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx, p):
            return p.round()

        @staticmethod
        def backward(ctx, g):
            return g

    calls = []
    model = Between(lambda m, h, _: h * Straight.apply(m.p))
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = sp.Recorder(model, optimizer, tmp_path, capture=sp.Sketch(64), task=sp.Classification())
    with pytest.raises(sp.GradientError, match=r"parameters=\['!p'"):
        model(torch.randn(4, STEPS, WIDTH))
    assert len(calls) < 40
    recorder.close()
