"""The engine's choices and errors."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_models import CASES, Cnn, Decoder, InplaceMlp, images, margin, token_likelihood, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from source_proj._errors import GradientError
from source_proj.gradients import GradientEngine, ParameterSpace, gradient_engine, nonfinite_examples, sink
from source_proj.gradients import convolution as convolution_rule
from source_proj.gradients import general as general_path
from source_proj.gradients.batches import map_tensors
from source_proj.gradients.hooks import HookPath
from source_proj.sketch import Sketch
from source_proj.trajectory.placement import placement_of

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


def dense_engine(model: nn.Module, method: str = "hooks", autocast: str | None = None) -> GradientEngine:
    space = ParameterSpace.from_model(model)
    return gradient_engine(model, space, Sketch(kind="identity", dim=space.size), method, autocast)


def dense_rows(model: nn.Module, batch: Any, function: Any = margin, **options: Any) -> Tensor:
    return dense_engine(model, **options).sketch(function, batch)[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "hook"}, r"method 'hook' is unknown; choose one of \('auto', 'hooks', 'general'\)"),
        ({"autocast": "int8"}, "autocast 'int8' is unknown"),
        ({"sketch": Sketch(kind="identity", dim=3)}, "identity sketch has dim 3, but .* set dim to that"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    model = InplaceMlp()
    with pytest.raises(ValueError, match=message):
        gradient_engine(model, ParameterSpace.from_model(model), **{"sketch": Sketch(dim=8), **options})


@pytest.mark.parametrize("method", ["hooks", "general"])
@pytest.mark.parametrize(
    "function",
    [lambda model, batch: margin(model, batch).sum(), lambda model, batch: model(batch[0]), lambda model, batch: 1.0],
    ids=["scalar", "matrix", "number"],
)
def test_a_function_of_the_wrong_shape_is_refused(method: str, function: Any) -> None:
    with pytest.raises(TypeError, match="must return one scalar per example"):
        dense_rows(InplaceMlp(), images(3, side=2), function, method=method)


def test_reasons_name_the_parameter() -> None:
    for case in CASES:
        torch.manual_seed(0)
        model = case.model()
        space = ParameterSpace.from_model(model, case.patterns)
        engine = gradient_engine(model, space, Sketch(dim=16))
        engine.sketch(case.function, case.batch(3))
        assert engine.method == case.method
        if case.name in ("raw-parameter", "data-dependent"):
            assert "scale: no rule covers" in engine.reason
        if case.name == "functional-head":
            assert "'wte.weight' is used outside of its module's forward" in engine.reason
        if case.name == "data-dependent":
            assert "followed by themselves" in engine.reason


def test_an_input_modified_after_the_layer_saw_it_is_an_error() -> None:
    class Spoiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(12, 5), nn.Linear(5, 5), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x.flatten(1))
            y = self.b(x)
            x += 1.0
            return self.c(x + y)

    model = Spoiled()
    space = ParameterSpace.from_model(model)
    target = sink.GradientSink(torch.zeros(2, 16), Sketch(dim=16), space)
    with pytest.raises(GradientError, match="input of 'b' was modified in place"):
        HookPath(placement_of(model), space).add_to(
            [target], lambda m, b: (margin(m, b),), images(2, side=2), 2, nullcontext
        )
    with pytest.raises((GradientError, RuntimeError), match="modified by an inplace operation"):
        dense_rows(Spoiled(), images(2, side=2), method="general")  # plain autograd cannot differentiate it either


def test_batch_statistics_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    for method in ("auto", "hooks", "general"):
        with pytest.raises(GradientError, match="BatchNorm2d '1' keeps no running statistics"):
            dense_engine(model, method)


def test_examples_that_depend_on_each_other_are_refused() -> None:
    def centred(model: nn.Module, batch: Any) -> Tensor:
        values = margin(model, batch)
        return values - values.mean()

    for method in ("auto", "general"):
        with pytest.raises(GradientError, match="must not depend on the other examples of its batch, and its value"):
            dense_rows(InplaceMlp(), images(4, side=2), centred, method=method)
    with pytest.raises(GradientError, match="hook path cannot serve this model"):
        dense_rows(InplaceMlp(), images(4, side=2), centred)


def test_nonfinite_gradients_stay_with_their_example() -> None:
    torch.manual_seed(0)
    x, y = images(4, side=2)
    x[2, 0, 0, 0] = float("nan")
    model = InplaceMlp()
    space = ParameterSpace.from_model(model)
    for method in ("hooks", "general"):
        engine = gradient_engine(model, space, Sketch(dim=16), method)
        assert nonfinite_examples(engine.sketch(margin, (x, y))[1]) == [2]
        assert nonfinite_examples(engine.sketch(margin, (x[2:3], y[2:3]))[1]) == [0]


def test_an_engine_follows_the_weights_that_are_loaded() -> None:
    torch.manual_seed(0)
    model, batch = Cnn(), images(3)
    engine = dense_engine(model)
    engine.sketch(margin, batch)
    other = Cnn()
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(engine.sketch(margin, batch)[1], dense_rows(other, batch))


def test_chunks_of_the_general_path_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, batch = InplaceMlp(), images(5, side=2)
    whole = dense_rows(model, batch, method="general")
    monkeypatch.setattr(general_path, "CHUNK_BYTES", 2 * 4 * whole.shape[1])
    torch.testing.assert_close(dense_rows(model, batch, method="general"), whole)


@pytest.mark.parametrize("name", ["mlp", "cnn-zeros", "residual", "decoder"])
def test_a_bfloat16_model_errs_no_more_than_plain_autograd(name: str) -> None:
    torch.manual_seed(0)
    case = next(case for case in CASES if case.name == name)
    model, batch = case.model().eval().bfloat16(), case.batch(4)
    batch = map_tensors(batch, lambda t: t.bfloat16() if t.is_floating_point() else t)
    hooks = dense_rows(model, batch, case.function)
    plain = dense_rows(model, batch, case.function, method="general")
    exact = dense_rows(
        model.float(), map_tensors(batch, lambda t: t.float() if t.is_floating_point() else t), case.function
    )
    assert 0 < (hooks - exact).norm() <= 1.5 * (plain - exact).norm()


@pytest.mark.parametrize("method", ["hooks", "general"])
@pytest.mark.parametrize("name", ["mlp", "cnn-zeros", "residual", "decoder"])
def test_autocast_errs_no_more_than_autocast_of_plain_autograd(method: str, name: str) -> None:
    torch.manual_seed(0)
    case = next(case for case in CASES if case.name == name)
    model, batch = case.model().eval(), case.batch(4)
    exact = dense_rows(model, batch, case.function)
    with torch.autocast("cpu", torch.bfloat16):
        total = case.function(model, batch).float().sum()
    total.backward()
    plain = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    got = dense_rows(model, batch, case.function, method=method, autocast="bfloat16").sum(0)
    error, reference = (got - exact.sum(0)).norm(), (plain - exact.sum(0)).norm()
    assert 0 < error <= 1.5 * reference


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert ((got - expected).norm(dim=1) <= 1e-5 * expected.norm(dim=1)).all()


@settings(max_examples=20)
@given(data=st.data())
def test_every_way_of_a_convolution_gives_the_same_gradient(data: st.DataObject) -> None:
    """Law 1 for random geometries, each way forced in turn."""
    dims = data.draw(st.integers(1, 3), "dims")

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high)) for _ in range(dims))

    groups = data.draw(st.sampled_from([1, 1, 2]), "groups")
    module = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1](
        2 * groups, 3 * groups, each(1, 3), stride=each(1, 2), padding=each(0, 2), dilation=each(1, 2), groups=groups
    )
    x = torch.randn(data.draw(st.sampled_from([3, 17])), 2 * groups, *each(5, 7))
    g_function = lambda model, x: (model(x).flatten(1) ** 2).sum(1)  # noqa: E731
    expected = dense_rows(module, x, g_function, method="general")
    assert_close(dense_rows(module, x, g_function), expected)  # by columns or, when grouped, by groups
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution_rule, "_windows_are_cheaper", lambda *_: False)
        patch.setattr(convolution_rule, "_GROUPS_BYTES", 1000)
        assert_close(dense_rows(module, x, g_function), expected)
    space, sketch = ParameterSpace.from_model(module), Sketch(dim=64, kind="sparse", seed=5)
    rows = gradient_engine(module, space, sketch, "hooks").sketch(g_function, x)[1]
    scale = expected.norm(dim=1, keepdim=True)
    assert_close(rows / scale, sketch(expected / scale))


@pytest.mark.parametrize("kind", ["identity", "sparse", "rademacher", "kronecker"])
def test_an_embedding_adds_up_repeated_tokens_and_leaves_padding_out(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Embedding(40, 5, padding_idx=3)
    space = ParameterSpace.from_model(model)
    sketch = Sketch(kind=kind, dim=200, seed=1)
    ids, weights = torch.tensor([[1, 1, 39, 3], [3, 3, 3, 3], [20, 6, 7, 20]]), torch.randn(3, 4, 5)

    def function(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) * batch[1]).sum((1, 2))

    hooks, general = (gradient_engine(model, space, sketch, method) for method in ("hooks", "general"))
    rows, expected = (engine.sketch(function, (ids, weights))[1] for engine in (hooks, general))
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)
    assert (rows[1] == 0).all()


def test_a_named_tuple_and_untouched_leaves_pass_through() -> None:
    torch.manual_seed(0)
    batch = tokens(3)
    rows = dense_rows(Decoder(), {**batch, "note": "kept", "shared": torch.ones(())}, token_likelihood)
    assert torch.isfinite(rows).all()
    with pytest.raises(ValueError, match="holds no tensor"):
        dense_rows(Decoder(), {"note": "nothing"}, token_likelihood)


def test_functions_may_read_shared_tensors_of_the_batch() -> None:
    torch.manual_seed(0)
    model = InplaceMlp()
    x, y = images(3, side=2)

    def weighted(model: nn.Module, batch: Any) -> Tensor:
        return (F.log_softmax(model(batch[0]), -1) * batch[2]).sum(1)

    batch = (x, y, torch.rand(4))
    torch.testing.assert_close(
        dense_rows(model, batch, weighted), dense_rows(model, batch, weighted, method="general"), rtol=1e-5, atol=1e-6
    )
