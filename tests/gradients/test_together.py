"""Several functions of one forward pass have the rows that each has of a pass of its own."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from source_proj import CausalLM, Classification, Regression, Sketch
from source_proj.gradients import ParameterSpace, Refuted, gradient_engine
from source_proj.gradients.law import SAMPLED
from source_proj.trajectory import Scale

VOCABULARY, WIDTH = 11, 6


class TiedDecoder(nn.Module):
    """Positions that see no batch, a layer that is used twice, a head that shares the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.words, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(8, WIDTH)
        self.mixed, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.words.weight
        self.calls = 0

    def forward(self, input_ids):
        self.calls += 1
        x = self.words(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        return self.head(self.norm(self.mixed(torch.tanh(self.mixed(x))).cumsum(1)))


class Perceptron(nn.Sequential):
    def __init__(self, out):
        super().__init__(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, out))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def language(n):
    tokens = torch.randint(VOCABULARY, (n, 5))
    return TiedDecoder(), CausalLM(reduction="sum"), {"input_ids": tokens, "labels": tokens}


def classes(n):
    return Perceptron(4), Classification(label_smoothing=0.1), (torch.randn(n, 5), torch.randint(4, (n,)))


def numbers(n):
    return Perceptron(1), Regression(), (torch.randn(n, 5), torch.randn(n))


@pytest.mark.parametrize("make", [language, classes, numbers])
@pytest.mark.parametrize("method", ["hooks", "general"])
@settings(max_examples=12)
@given(n=st.integers(1, 5), draws=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_rows_are_those_of_each_function_alone(make, method, n, draws, seed):
    torch.manual_seed(seed)
    model, task, batch = make(n)
    u = torch.rand(draws, n, 64)
    space = ParameterSpace.from_model(model)
    scales = [None, Scale(torch.rand(space.size), space)]
    both = batch, torch.arange(n)

    def uniforms(where, draw):
        return lambda count: u[draw][where][:, :count]

    functions = [
        ("output", lambda m, b: task.output(m, b[0])),
        *((SAMPLED, lambda m, b, d=d: task.sampled_output(m, b[0], uniforms(b[1], d))) for d in range(draws)),
    ]
    together, alone = (gradient_engine(model, space, Sketch(32), method) for _ in range(2))
    for _ in range(4):  # the first is proven, the next two are compared with their halves, the last neither
        model.calls = 0
        found = together.sketch_together(
            functions,
            lambda m, b: task.output_and_samples(m, b[0], [uniforms(b[1], d) for d in range(draws)]),
            both,
            scales,
        )
        calls = model.calls
        expected = [alone.sketch_scaled(function, both, scales, name) for name, function in functions]
        for (values, rows), (own_values, own_rows) in zip(found, expected, strict=True):
            torch.testing.assert_close([values, *rows], [own_values, *own_rows])
    if method == "hooks":
        assert together.method == "hooks"
        assert calls == 1


def test_a_model_is_run_anew_on_other_inputs_and_outside():
    model, task, batch = classes(3)
    source = lambda count: torch.full((3, count), 0.5)  # noqa: E731
    for _ in range(2):
        task.output_and_samples(model, batch, [source, source])
    assert model.calls == 2
    other = task.output_and_samples(model, (batch[0] + 1, batch[1]), [source])
    torch.testing.assert_close(other[0], task.output(model, (batch[0] + 1, batch[1])))


def test_likelihoods_of_ones_own_are_passes_of_their_own():
    class Doubled(Classification):
        def output(self, model, batch):
            return 2 * super().output(model, batch)

    model, _, batch = classes(3)
    task = Doubled()
    assert not task.forwards_once
    first, sampled = task.output_and_samples(model, batch, [lambda count: torch.full((3, count), 0.5)])
    assert model.calls == 2
    torch.testing.assert_close(first, task.output(model, batch))
    assert sampled.shape == (3,)


class Overwriting(torch.autograd.Function):
    """The square, whose backward pass overwrites what it kept, as fused kernels do."""

    @staticmethod
    def forward(ctx, x):
        ctx.kept = x.clone()
        return x.square()

    @staticmethod
    def backward(ctx, g):
        return ctx.kept.mul_(2).mul_(g)


class Forgetting(Overwriting):
    """One that lets it go."""

    @staticmethod
    def backward(ctx, g):
        kept, ctx.kept = ctx.kept, None
        return 2 * kept * g


@pytest.mark.parametrize("function", [Overwriting, Forgetting])
@pytest.mark.parametrize("late", [False, True])
def test_backward_passes_that_can_be_made_once_get_forward_passes_of_their_own(function, late):
    """From the first batch on, or from where a branch is taken that a later batch takes."""

    class Squared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 4)

        def forward(self, x):
            x = self.first(x)
            return self.last(function.apply(x) if not late or x.detach().abs().max() > 50 else x.square())

    torch.manual_seed(0)
    model, task, u = Squared(), Classification(), torch.rand(3, 8)
    space = ParameterSpace.from_model(model)
    functions = [
        ("output", lambda m, b: task.output(m, b[0])),
        (SAMPLED, lambda m, b: task.sampled_output(m, b[0], lambda n: u[b[1]][:, :n])),
    ]
    engine, alone = (gradient_engine(model, space, Sketch(32), method) for method in ("hooks", "general"))
    for factor in [1, 100]:
        batch = (factor * torch.randn(3, 5), torch.tensor([0, 3, 1])), torch.arange(3)

        def rows(batch=batch):
            return engine.sketch_together(
                functions, lambda m, b: task.output_and_samples(m, b[0], [lambda n: u[b[1]][:, :n]]), batch, [None]
            )

        try:
            found = rows()
        except Refuted:
            found = rows()
        assert engine.method == "hooks"
        for (name, each), (_, (made,)) in zip(functions, found, strict=True):
            _, (expected,) = alone.sketch_scaled(each, batch, [None], name)
            torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


class Shifted(TiedDecoder):
    """With a parameter that no layer has."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.ones(VOCABULARY))

    def forward(self, input_ids):
        return super().forward(input_ids) + self.shift


def test_a_layer_that_sees_no_batch_is_proven_without_a_warning():
    """torch warns, once in a process, of a number made of what has a gradient."""
    _, task, batch = language(3)
    model, before = Shifted(), torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            gradient_engine(model, ParameterSpace.from_model(model), Sketch(16)).sketch(task.output, batch)
    finally:
        torch.set_warn_always(before)
    assert not told
