"""Rows R W ∇f of parameters with weights: by hooks, by the general path, in metrics, beside autograd's gradients."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
import pytest
import torch
from gradient_models import CASES, Case
from hypothesis import given
from hypothesis import strategies as st
from test_gradient_laws import Setting, plain_rows
from test_scaled_rows import dense_sketch, random_scale
from torch import Tensor

from source_proj._errors import MismatchError
from source_proj.gradients import ParameterSpace, gradient_engine
from source_proj.gradients.proof import gradient_sink
from source_proj.sketch import Sketch

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


def random_weights(space: ParameterSpace, generator: torch.Generator) -> ParameterSpace:
    """Over two orders of magnitude, and no two alike."""
    weights = torch.randn(len(space.names), generator=generator).exp()
    return replace(space, weights=tuple(weights.double().tolist()))


def by_coordinate(space: ParameterSpace) -> Tensor:
    """The weight of each coordinate (d,)."""
    assert space.weights is not None
    pairs = zip(space.weights, space.shapes, strict=True)
    return torch.cat([torch.full((prod(shape),), weight, dtype=torch.float64) for weight, shape in pairs])


@pytest.mark.parametrize("kind", ["tensor", "identity"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_sketches_of_weighted_gradients(case: Case, kind: str) -> None:
    """On the path that auto takes and on the general one, in one metric and in several, proven by the engine."""
    setting, generator = Setting(case, size=3), torch.Generator().manual_seed(2)
    space = random_weights(setting.space, generator)
    plain = plain_rows(setting.model, setting.space, case, setting.batch).double() * by_coordinate(space)
    sketch = Sketch(256, kind, seed=4) if kind == "tensor" else Sketch(space.size, kind)
    scales = [None, random_scale(space, generator, factored=False), random_scale(space, generator, factored=True)]
    for method in ("auto", "general"):
        engine = gradient_engine(setting.model, space, sketch, method)
        _, several = engine.sketch_scaled(case.function, setting.batch, scales)
        made = [engine.sketch(case.function, setting.batch)[1], *several]
        for scale, rows in zip([None, *scales], made, strict=True):
            scaled = plain if scale is None else plain * scale.diagonal
            expected = scaled if kind == "identity" else dense_sketch(sketch, space, scaled)
            error = (rows - expected).norm(dim=1)
            assert (error <= 1e-5 * scaled.norm(dim=1)).all(), (method, error / scaled.norm(dim=1))


@given(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(0, 2**31), st.booleans())
def test_pieces_of_any_precision_are_weighted(dtype: torch.dtype, seed: int, wide: bool) -> None:
    """Outer products, windows, rows of tables and whole gradients; halves lose no more than their own rounding."""
    generator = torch.Generator().manual_seed(seed)
    o, i, steps = (5, 3, 4) if wide else (3, 5, 4)
    space = ParameterSpace(("matrix", "table"), ((o, i), (6, 3)), (0.03, 1.7))
    out = torch.zeros(2, space.size)
    sink = gradient_sink([out], Sketch(space.size, "identity"), space, [None])
    left, right, values = (torch.randn(2, steps, n, generator=generator).to(dtype) for n in (o, i, 3))
    index, whole = torch.randint(0, 6, (2, steps), generator=generator), torch.randn(2, o, i, generator=generator)
    with sink.holding():
        sink.outer("matrix", left, right)
        sink.scatter("table", index, values)
        sink.add("matrix", whole.to(dtype))

    def summed(left: Tensor, right: Tensor, values: Tensor, whole: Tensor) -> Tensor:
        table = torch.zeros(2, 6, 3).scatter_add_(1, index[:, :, None].expand(-1, -1, 3), values.float())
        matrix = torch.einsum("bto,bti->boi", left.float(), right.float()) + whole.to(dtype).float()
        return torch.cat([0.03 * matrix.flatten(1), 1.7 * table.flatten(1)], dim=1)

    room = summed(left.abs(), right.abs(), values.abs(), whole.abs())  # errors are relative to the terms, not their sum
    spacing = torch.finfo(torch.float32 if dtype == torch.float16 else dtype).eps
    assert ((out - summed(left, right, values, whole)).abs() <= 4 * spacing * room).all()


def test_weights_by_glob() -> None:
    """The first pattern that matches counts, others stay at 1; a space keeps them, and is another one."""
    space = ParameterSpace(("a.weight", "a.bias", "b.weight"), ((2, 2), (2,), (3,)))
    weighted = space.weighted({"a.bias": 2, "a.*": 0.5})
    assert weighted.weights == (0.5, 2.0, 1.0)
    assert weighted != space
    assert ParameterSpace.from_spec(weighted.spec()) == weighted
    assert "weights" not in space.spec()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"c.*": 1.0}, r"'c.\*' matches none of the parameters \['a.weight', 'b.weight'\]"),
        ({"a.*": 0.0}, r"from 1e-06 to 1e\+06, got 0.0; to leave them out, give parameters=\['!a.\*'\]"),
        ({"a.*": float("nan")}, "got nan$"),
        ({"a.*": float("inf")}, "got inf$"),
        ({"a.*": 1e-7}, "got 1e-07$"),
        ({"a.*": True}, "got True$"),
        ({"a.*": "1"}, "got '1'$"),
        ({"*": 1.0, "a.*": 2.0}, r"'a.\*' has no effect, as '\*' comes before it"),
    ],
)
def test_weights_that_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParameterSpace(("a.weight", "b.weight"), ((2,), (3,))).weighted(weights)


def test_names_count_before_globs() -> None:
    """Also those that would be globs of something else, and numbers of any kind."""
    space = ParameterSpace(("a[0]", "a0", "b"), ((2,), (3,), (4,)))
    assert space.weighted({"*": np.float32(0.5), "a[0]": 2, "b": np.int64(3)}).weights == (2.0, 0.5, 3.0)
    assert space.weighted({"a[0]": 2}).weights == (2.0, 1.0, 1.0)


def test_a_scale_knows_its_parameters_whatever_their_weights() -> None:
    """The metric of a run is of parameters, not of what a bank multiplies them by."""
    space = ParameterSpace(("a", "b"), ((2,), (3,)))
    scale = random_scale(space, torch.Generator().manual_seed(0), factored=False)
    scale.require(space.weighted({"a": 0.5}))
    with pytest.raises(MismatchError):
        scale.require(ParameterSpace(("a", "c"), ((2,), (3,)), (1.0, 1.0)))
