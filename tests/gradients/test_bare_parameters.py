"""Parameters that a module uses by itself: their rows are plain autograd's, followed or in a pass of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bare_uses import APART, BESIDE, BESIDE_REFUSED, FOLLOWED, STEPS, WIDTH, Bare, BesideTheBatch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from source_proj._errors import GradientError
from source_proj.gradients import ParameterSpace, gradient_engine
from source_proj.gradients.batches import take
from source_proj.sketch import Sketch


def summed(model: nn.Module, batch: Any) -> Tensor:
    output: Tensor = model(batch)
    return output.flatten(1).tanh() @ torch.linspace(-1, 2, output[0].numel())


def plain_row(model: nn.Module, example: Tensor) -> Tensor:
    """The gradient by a backward pass for one example."""
    model.zero_grad(set_to_none=True)
    summed(model, example)[0].backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def assert_plain(rows: Tensor, model: nn.Module, batch: Tensor) -> None:
    for b, row in enumerate(rows):
        plain = plain_row(model, take(batch, [b], len(batch)))
        torch.testing.assert_close(row, plain, rtol=1e-4, atol=1e-5 * float(plain.norm()))


@pytest.mark.parametrize("size", [1, 2, 4, STEPS])
@pytest.mark.parametrize("name", [*FOLLOWED, *APART])
def test_rows_are_those_of_a_backward_pass_for_each_example(name: str, size: int) -> None:
    torch.manual_seed(0)
    model = Bare(*{**FOLLOWED, **APART}[name])
    space = ParameterSpace.from_model(model)
    engine = gradient_engine(model, space, Sketch(space.size, "identity"))
    batch = torch.randn(size, STEPS, WIDTH)
    values, rows = engine.sketch(summed, batch)
    if size > 2:
        assert ("followed by themselves" in engine.reason) is (name in FOLLOWED), engine.reason
    assert engine.method == "hooks" or name in APART, engine.reason
    with torch.no_grad():
        torch.testing.assert_close(values, summed(model, batch))
    assert_plain(rows, model, batch)


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("name", [*BESIDE, *BESIDE_REFUSED])
def test_layers_that_see_no_batch(name: str, size: int) -> None:
    torch.manual_seed(0)
    model, batch = BesideTheBatch({**BESIDE, **BESIDE_REFUSED}[name]), torch.randn(size, WIDTH)
    space = ParameterSpace.from_model(model)
    engine = gradient_engine(model, space, Sketch(space.size, "identity"))
    assert_plain(engine.sketch(summed, batch)[1], model, batch)
    assert engine.method == ("hooks" if name in BESIDE else "general"), engine.reason


def test_a_use_that_is_computed_once_more_goes_the_general_way() -> None:
    torch.manual_seed(0)
    model = Bare(lambda x, p: checkpoint(lambda x: (x * p).tanh(), x, use_reentrant=False), ((WIDTH,),))
    space, batch = ParameterSpace.from_model(model), torch.randn(4, STEPS, WIDTH)
    engine = gradient_engine(model, space, Sketch(space.size, "identity"))
    assert_plain(engine.sketch(summed, batch)[1], model, batch)
    assert engine.method == "general"


@pytest.mark.parametrize("name", APART)
def test_few_parameters_of_a_large_model_take_a_pass_of_their_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("source_proj.gradients.mixed.CHUNK_BYTES", 0)
    model = Bare(*APART[name])
    space, batch = ParameterSpace.from_model(model), torch.randn(4, STEPS, WIDTH)
    engine = gradient_engine(model, space, Sketch(space.size, "identity"))
    assert_plain(engine.sketch(summed, batch)[1], model, batch)
    assert engine.method == "hooks"
    assert "in a pass of their own" in engine.reason


class Gated(nn.Module):
    """A second use of a parameter, which a gate of the batch lets through or not."""

    def __init__(self, use: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.p, self.use = nn.Parameter(torch.randn(WIDTH)), use

    def forward(self, x: Tensor) -> Tensor:
        gate, x = x[:, :1], x[:, 1:]
        last: Tensor = self.last(self.first(x) * self.p + gate * self.use(x, self.p))
        return last


CONSTANT = torch.linspace(-1, 1, WIDTH)
GATED: dict[str, Callable[..., Tensor]] = {
    "in the place of examples": lambda x, p: F.linear(p.expand(1, -1), x).t(),
    "normalised": lambda x, p: F.layer_norm(p, (WIDTH,), CONSTANT, CONSTANT),
    "a normalisation's weight with a constant": lambda x, p: F.layer_norm(x, (WIDTH,), CONSTANT * p.mean()),
    "a convolution's weight": lambda x, p: F.conv1d(x[:, None], (CONSTANT * p)[:, None, None]).mean(2),
    "a convolution's weight with a constant": lambda x, p: F.conv1d(x[:, None], (CONSTANT * p.mean())[:, None, None])
    .mean(2),
}  # fmt: skip


@pytest.mark.parametrize("size", [2, 3, WIDTH])
@pytest.mark.parametrize("name", GATED)
def test_a_use_that_first_has_no_gradient_is_no_loophole(name: str, size: int) -> None:
    """A slip that a first batch can't show, as the use has no share in it, must not pass in the second."""
    torch.manual_seed(0)
    model = Gated(GATED[name])
    space = ParameterSpace.from_model(model)
    engine = gradient_engine(model, space, Sketch(space.size, "identity"))
    for gate in (0.0, 1.0):
        batch = torch.cat([torch.full((size, 1), gate), torch.randn(size, WIDTH)], dim=1)
        assert_plain(engine.sketch(summed, batch)[1], model, batch)


@pytest.mark.parametrize("size", [1, 4])
def test_a_parameter_is_not_written_into(size: int) -> None:
    """`contiguous` copies what was expanded to several examples, and gives the parameter itself for one."""

    def written(x: Tensor, p: Tensor) -> Tensor:
        token = p.expand(len(x), -1, -1).contiguous()
        token += x[:, :1]
        return torch.cat([token, x], dim=1)

    torch.manual_seed(0)
    model = Bare(written, ((1, 1, WIDTH),))
    space, before = ParameterSpace.from_model(model), model.p[0].detach().clone()
    engine = gradient_engine(model, space, Sketch(space.size, "identity"))
    with pytest.raises(RuntimeError, match="a view of a leaf"):  # torch's own: no example of it can be trained on alone
        engine.sketch(summed, torch.randn(size, STEPS, WIDTH))
    assert torch.equal(model.p[0], before)


def test_matrices_of_few_examples_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("source_proj.gradients.bare_taps._MATRICES_BYTES", 3 * 4 * WIDTH * WIDTH)
    test_rows_are_those_of_a_backward_pass_for_each_example("a product of two", 4)


@pytest.mark.parametrize("name", ["a class token and positions", "a product", "distances"])
def test_several_functions_of_one_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("source_proj.gradients.mixed.CHUNK_BYTES", 0)
    model = Bare(*{**FOLLOWED, **APART}[name])
    space = ParameterSpace.from_model(model)
    engine = gradient_engine(model, space, Sketch(space.size, "identity"))
    batch = torch.randn(4, STEPS, WIDTH)

    def squared(model: nn.Module, batch: Tensor) -> Tensor:
        return summed(model, batch).square()

    functions = [("one", summed), ("two", squared)]
    together = engine.sketch_together(functions, lambda m, x: (summed(m, x), squared(m, x)), batch, [None])
    for (label, function), (values, (rows,)) in zip(functions, together, strict=True):
        alone = gradient_engine(model, space, Sketch(space.size, "identity"), "general")
        expected_values, expected = alone.sketch_scaled(function, batch, [None], label)
        torch.testing.assert_close(values, expected_values)
        torch.testing.assert_close(rows, expected[0], rtol=1e-4, atol=1e-5)


def test_the_hook_path_alone_refuses_them() -> None:
    model = Bare(*FOLLOWED["positions"])
    with pytest.raises(GradientError, match=r"cannot serve this model \(p\.0: no rule covers ParameterList\)"):
        gradient_engine(model, ParameterSpace.from_model(model), Sketch(16), "hooks")


BAGS: dict[str, dict[str, Any]] = {
    "mean": {},
    "mean but padding": {"padding_idx": 0},
    "sum but padding from behind": {"padding_idx": -1, "mode": "sum"},
    "weighted": {"mode": "sum", "padding_idx": 2},
    "sparse": {"mode": "sum", "sparse": True},
    "maximum": {"mode": "max"},
}


class Bags(nn.Module):
    """Words of a small vocabulary, some of them several times."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.bags, self.head = nn.EmbeddingBag(4, WIDTH, **BAGS[name]), nn.Linear(WIDTH, 3)
        self.scores = nn.Embedding(4, 1) if name == "weighted" else None

    def forward(self, words: Tensor) -> Tensor:
        scores = None if self.scores is None else self.scores(words).squeeze(2)
        made: Tensor = self.head(self.bags(words, per_sample_weights=scores))
        return made


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("name", BAGS)
def test_bags_are_followed_but_for_maxima(name: str, size: int) -> None:
    torch.manual_seed(size)
    model, words = Bags(name), torch.randint(0, 4, (size, STEPS))
    words[0] = model.bags.padding_idx or 0  # an example may be nothing but padding
    space = ParameterSpace.from_model(model)
    engine = gradient_engine(model, space, Sketch(space.size, "identity"))
    _, rows = engine.sketch(summed, words)
    assert (engine.method == "hooks") is (name != "maximum"), engine.reason
    model.bags.sparse = False  # the plain gradients are dense
    assert_plain(rows, model, words)
