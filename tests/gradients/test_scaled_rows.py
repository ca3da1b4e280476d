"""Rows R D ∇f in metrics: by hooks, by the general path, and by autograd and dense matrices."""

from __future__ import annotations

from math import prod

import pytest
import torch
from gradient_models import CASES, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gradient_laws import Setting, plain_rows
from torch import Tensor, nn

from source_proj._errors import MismatchError
from source_proj.gradients import ParameterSpace, gradient_engine
from source_proj.kernels.native import native_library
from source_proj.kernels.tensor_held import is_spectral
from source_proj.kernels.tensor_native import spectral_is_cheaper
from source_proj.sketch import Sketch
from source_proj.trajectory import Scale

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


def random_scale(space: ParameterSpace, generator: torch.Generator, *, factored: bool) -> Scale:
    """Numbers over two orders of magnitude, some of them 0, as of entries that never moved."""
    sizes = [
        shape[0] + prod(shape[1:]) if factored and len(shape) > 1 else prod(shape) for shape in space.shapes
    ]  # fmt: skip
    values = torch.randn(sum(sizes), generator=generator).exp()
    return Scale(values * (torch.rand(len(values), generator=generator) > 0.1), space, factored=factored)


def dense_sketch(sketch: Sketch, space: ParameterSpace, rows: Tensor) -> Tensor:
    """R rows by R itself, parameter by parameter, float64."""
    out = torch.zeros(len(rows), sketch.dim, dtype=torch.float64)
    for name, shape in zip(space.names, space.shapes, strict=True):
        begin = space.offsets[name]
        end = begin + prod(shape)
        out += rows[:, begin:end].double() @ sketch.matrix(begin, end, shape).double().T
    return out


def sketched_whole(sketch: Sketch, space: ParameterSpace, rows: Tensor) -> Tensor:
    """The same, the gradients given whole, where R would be too large."""
    places = [(space.offsets[name], shape) for name, shape in zip(space.names, space.shapes, strict=True)]
    return torch.stack([sketch(rows[:, begin : begin + prod(s)].float(), begin, s) for begin, s in places]).sum(0)


@pytest.mark.parametrize("kind", ["tensor", "sparse"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_sketches_of_scaled_gradients(case: Case, kind: str) -> None:
    """In several metrics from one pass, on the path that auto takes and on the general one; proven by the engine."""
    setting = Setting(case, size=3)
    generator = torch.Generator().manual_seed(1)
    scales = [None, *(random_scale(setting.space, generator, factored=factored) for factored in (True, False, True))]
    plain = plain_rows(setting.model, setting.space, case, setting.batch).double()
    sketch = Sketch(256 if kind == "tensor" else 48, kind, seed=3)
    for method in ("auto", "general"):
        engine = gradient_engine(setting.model, setting.space, sketch, method)
        _, rows = engine.sketch_scaled(case.function, setting.batch, scales)
        alone = engine.sketch_scaled(case.function, setting.batch, scales[1:2])[1][0]
        for scale, made in zip([*scales, scales[1]], [*rows, alone], strict=True):
            scaled = plain if scale is None else plain * scale.diagonal
            error = (made - dense_sketch(sketch, setting.space, scaled)).norm(dim=1)
            assert (error <= 1e-5 * scaled.norm(dim=1)).all(), (method, error / scaled.norm(dim=1))


class Layers(nn.Module):
    """A linear layer over steps and a convolution, wide enough for the transforms to cost less than products."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.table = nn.Embedding(7, width)
        self.linear = nn.Linear(width, width)
        self.back = nn.Linear(width, 7, bias=False)
        self.back.weight = self.table.weight  # tied
        self.filters = nn.Conv1d(width, channels, 3, stride=2)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.linear(self.table(ids)))
        return self.back(hidden).sum((1, 2)) + self.filters(hidden.transpose(1, 2)).square().sum((1, 2))


@pytest.mark.skipif(native_library() is None, reason="the compiled kernels were not built")
@given(width=st.sampled_from([160, 192, 320]), steps=st.integers(3, 9), seed=st.integers(0, 2**20))
@settings(max_examples=4, deadline=None)
def test_factored_metrics_take_the_transforms(width: int, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = Layers(width, 130)
    space = ParameterSpace.from_model(model)
    ids = torch.randint(0, 7, (3, steps))
    sketch = Sketch(256, seed=seed)
    assert is_spectral("native", torch.zeros(3, steps, width), width, 256, shared=True)
    assert spectral_is_cheaper(3, (steps - 1) // 2, 130, 3 * width, 256, shared=True, windows=True)
    scale = random_scale(space, torch.Generator().manual_seed(seed), factored=True)
    rows = []
    for method in ("hooks", "general"):
        engine = gradient_engine(model, space, sketch, method)
        rows.append(engine.sketch_scaled(lambda m, x: m(x), ids, [scale])[1][0])
    gradients = []
    for b in range(3):
        given_back = torch.autograd.grad(model(ids[b : b + 1])[0], list(space.parameters(model).values()))
        gradients.append(torch.cat([g.flatten() for g in given_back]))
    scaled = torch.stack(gradients).double() * scale.diagonal
    expected = sketched_whole(sketch, space, scaled)
    for made in rows:
        assert ((made - expected).norm(dim=1) <= 1e-5 * scaled.norm(dim=1)).all()


def test_scales_of_other_parameters_are_refused() -> None:
    model = nn.Linear(3, 2)
    space, other = ParameterSpace.from_model(model), ParameterSpace.from_model(nn.Linear(2, 3))
    engine = gradient_engine(model, space, Sketch(8))
    scale = Scale(torch.ones(other.size), other)
    with pytest.raises(MismatchError, match=r"a scale is of 2 parameters of 9 entries; .* other ones, 2 of 8"):
        engine.sketch_scaled(lambda m, x: m(x).sum(1), torch.ones(1, 3), [scale])
