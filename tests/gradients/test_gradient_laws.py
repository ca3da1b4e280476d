"""Law 1 and its consequences, for every model of the table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradient_models import CASES, Case, Decoder, token_likelihood, tokens
from torch import Tensor, nn

from source_proj._errors import GradientError
from source_proj.gradients import GradientEngine, ParameterSpace, gradient_engine
from source_proj.gradients.batches import batch_size, map_tensors, take
from source_proj.sketch import Sketch
from source_proj.sketch.projections import kinds

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
SIZE = 5
HOOK_CASES = [case for case in CASES if case.method == "hooks" and not case.rest]


def plain_rows(model: nn.Module, space: ParameterSpace, case: Case, batch: Any) -> Tensor:
    """The naive twin: zero_grad, forward, backward, once per example."""
    model.eval()
    rows = []
    for b in range(batch_size(batch)):
        model.zero_grad(set_to_none=True)
        case.function(model, take(batch, [b]))[0].backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        rows.append(
            torch.cat([_or_zero(gradients[n], s).flatten() for n, s in zip(space.names, space.shapes, strict=True)])
        )
    model.zero_grad(set_to_none=True)
    return torch.stack(rows)


def _or_zero(gradient: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape) if gradient is None else gradient


def assert_rows_equal(got: Tensor, expected: Tensor) -> None:
    """Relative 1e-5 of each row's norm."""
    assert got.dtype == torch.float32
    error = (got - expected).norm(dim=1)
    assert (error <= 1e-5 * expected.norm(dim=1)).all(), error / expected.norm(dim=1)


class Setting:
    """A case made concrete: model, space, batch and unsketched engines."""

    def __init__(self, case: Case, size: int = SIZE) -> None:
        torch.manual_seed(0)
        self.case = case
        self.model = case.model()
        self.space = ParameterSpace.from_model(self.model, case.patterns)
        self.batch = case.batch(size)

    def engine(self, method: str = "auto", **sketch: Any) -> GradientEngine:
        options = sketch or {"kind": "identity", "dim": self.space.size}
        return gradient_engine(self.model, self.space, Sketch(**options), method)

    def rows(self, method: str = "auto", **sketch: Any) -> Tensor:
        return self.engine(method, **sketch).sketch(self.case.function, self.batch)[1]


@pytest.fixture(params=CASES, ids=str)
def setting(request: pytest.FixtureRequest) -> Setting:
    return Setting(request.param)


@pytest.fixture(params=HOOK_CASES, ids=str)
def hooked(request: pytest.FixtureRequest) -> Setting:
    return Setting(request.param)


def test_rows_equal_a_plain_backward_pass_per_example(setting: Setting) -> None:
    expected = plain_rows(setting.model, setting.space, setting.case, setting.batch)
    engine = setting.engine()
    values, rows = engine.sketch(setting.case.function, setting.batch)
    assert engine.method == setting.case.method, engine.reason
    assert_rows_equal(rows, expected)
    with torch.no_grad():
        torch.testing.assert_close(values, setting.case.function(setting.model.eval(), setting.batch))


def test_hooks_equal_the_general_path(hooked: Setting) -> None:
    assert_rows_equal(hooked.rows("hooks"), hooked.rows("general"))


@pytest.mark.parametrize("split", [(1, 1, 1, 1, 1), (2, 3), (4, 1)], ids=str)
def test_any_batch_split_gives_the_same_rows(setting: Setting, split: tuple[int, ...]) -> None:
    whole = setting.rows()
    engine = setting.engine()
    parts = [
        engine.sketch(setting.case.function, take(setting.batch, examples.tolist()))[1]
        for examples in torch.arange(SIZE).split(list(split))
    ]
    assert_rows_equal(torch.cat(parts), whole)


@pytest.mark.parametrize("kind", [kind for kind in kinds() if kind != "identity"])
def test_pieces_of_layers_sum_to_the_sketch_of_the_whole(hooked: Setting, kind: str) -> None:
    general = hooked.rows("general", kind=kind, dim=48, seed=3)
    hooks = hooked.rows("hooks", kind=kind, dim=48, seed=3)
    unsketched = hooked.rows("general").norm(dim=1)
    assert ((hooks - general).norm(dim=1) <= 1e-5 * unsketched).all()


def test_the_model_is_left_as_it_was(setting: Setting) -> None:
    model = setting.model.train()
    first = next(model.parameters()).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    some = list(model.modules())[-1].eval()
    setting.rows()
    assert model.training
    assert not some.training
    assert not first.requires_grad
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_works_inside_no_grad_and_inference_mode(setting: Setting) -> None:
    expected = setting.rows()
    with torch.no_grad():
        assert_rows_equal(setting.rows(), expected)
    with torch.inference_mode():
        assert_rows_equal(setting.rows().clone(), expected)


def test_refuses_hooks_by_name_where_they_cannot_serve() -> None:
    for case in (case for case in CASES if case.method == "general" or case.rest):
        setting = Setting(case)
        with pytest.raises(GradientError, match="hook path cannot serve this model"):
            setting.rows("hooks")


def test_positions_do_not_pass_for_examples_when_there_are_as_many() -> None:
    """A batch of T sequences of length T: the position embedding's output looks like a batch."""
    for case in HOOK_CASES:
        if case.function is token_likelihood:
            setting = Setting(case, size=6)
            assert setting.batch["input_ids"].shape == (6, 6)
            assert_rows_equal(
                setting.rows("hooks"), plain_rows(setting.model, setting.space, setting.case, setting.batch)
            )


def test_padded_positions_receive_nothing() -> None:
    torch.manual_seed(0)
    model, batch = Decoder(), tokens(4)
    space = ParameterSpace.from_model(model)
    engine = gradient_engine(model, space, Sketch(kind="identity", dim=space.size), "hooks")
    rows = engine.sketch(token_likelihood, batch)[1]
    longer = {
        "input_ids": torch.cat([batch["input_ids"][:, :4], torch.randint(1, 11, (4, 2))], 1),
        "labels": torch.cat([batch["labels"][:, :3], torch.full((4, 3), -100)], 1),
    }
    shorter = map_tensors(longer, lambda t: t[:, :4])
    assert_rows_equal(engine.sketch(token_likelihood, longer)[1], engine.sketch(token_likelihood, shorter)[1])
    positions = rows[:, space.offsets["wpe.weight"] :][:, : 6 * 8].view(4, 6, 8)
    assert (positions[3, 3:] == 0).all()  # example 3 has its last three tokens padded
    assert (positions[0, :5] != 0).any(1).all()


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-3])
def test_normalisations_of_small_numbers(size: float, dtype: torch.dtype, bare: bool) -> None:
    """Where torch's own ε, which is the type's, is not small beside them; each parameter by itself."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(4, 6), nn.RMSNorm(6), nn.Linear(6, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x) * size
            h = torch.nn.functional.rms_norm(h, (6,), self.norm.weight) if bare else self.norm(h)
            return self.last(h)[:, 0]

    torch.manual_seed(0)
    model, batch = Small().to(dtype), torch.randn(SIZE, 4, dtype=dtype)
    space = ParameterSpace.from_model(model)
    _, rows = gradient_engine(model, space, Sketch(space.size, "identity")).sketch(lambda m, x: m(x), batch)
    for b, row in enumerate(rows):
        expected = torch.autograd.grad(model(batch[b : b + 1])[0], [*model.parameters()])
        for own, plain in zip(row.split([p.numel() for p in expected]), expected, strict=True):
            torch.testing.assert_close(own, plain.flatten().float(), rtol=1e-4, atol=1e-5 * float(plain.norm()))
