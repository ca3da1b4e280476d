"""Several functions of one forward pass have the rows that each has of a pass of its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from source_proj import CausalLM, Classification, Regression, Sketch
from source_proj.gradients import ParameterSpace, gradient_engine
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
    for _ in range(2):  # proven, then not
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
