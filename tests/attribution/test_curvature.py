"""Spectra by two routes, and the scalar functions of SOURCE against closed forms."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from source_proj.attribution.curvature import check_damping, damping_value, noise_floor
from source_proj.attribution.moments import spectrum
from source_proj.attribution.spectral import Spectrum, decay_operator, response, ridge_inverse
from source_proj.bank.codecs import find_codec


class FakeStage:
    """Rows in memory, in two blocks."""

    captured = False

    def __init__(self, n: int, k: int, checkpoints: int = 2, draws: int = 2, d2: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)
        self.n, self.draws, self._d2 = n, draws, d2
        self.rows = torch.randn(checkpoints, n, k, generator=generator)
        self.d1 = torch.randn(checkpoints, n, generator=generator)
        self.d2 = torch.rand(checkpoints, n, generator=generator)
        self.fisher_weight = None
        self.sampled = torch.randn(checkpoints, n * draws, k, generator=generator)

    @property
    def shard_spans(self):
        return [(0, self.n // 2), (self.n // 2, self.n)]

    def iter_rows(self, checkpoint, what="output", metric=None, shards=None):
        rows = self.rows if what == "output" else self.sampled
        half = rows.shape[1] // 2
        spans = ((0, half), (half, rows.shape[1]))
        for start, stop in spans if shards is None else [spans[shard] for shard in shards]:
            yield SimpleNamespace(
                start=start,
                stop=stop,
                rows=rows[checkpoint, start:stop].clone(),
                scale=None,
                codec=find_codec("float32"),
                d1=self.d1[checkpoint, start:stop],
                d2=self.d2[checkpoint, start:stop] if self._d2 else None,
                fisher_weight=None if self.fisher_weight is None else self.fisher_weight[checkpoint, start:stop],
            )

    def iter_encoded(self, checkpoint, shards=None, what="output", metric=None):
        return self.iter_rows(checkpoint, what, metric, shards)

    def hessian(self, curvature):
        if curvature == "sampled_fisher":
            a = self.sampled.flatten(0, 1)
        else:
            weights = {
                "empirical_fisher": self.d1 if self.fisher_weight is None else self.d1 * self.fisher_weight,
                "gauss_newton": self.d2.sqrt(),
                "features": torch.ones_like(self.d1),
            }
            a = (self.rows * weights[curvature][..., None]).flatten(0, 1)
        return (a.double().T @ a.double()) / len(a)


def test_the_empirical_fisher_counts_labels_as_the_loss_does():
    stage = FakeStage(20, 12)
    stage.fisher_weight = torch.rand(2, 20) * 5
    hessian = stage.hessian("empirical_fisher")
    torch.testing.assert_close(spectrum(stage, [0, 1], 12).apply(lambda x: x), hessian, rtol=1e-5, atol=1e-6)


CURVATURES = ["empirical_fisher", "sampled_fisher", "gauss_newton", "features"]


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("route", ["primal", "dual"])
@pytest.mark.parametrize("n", [4, 20])
def test_matrix_functions_equal_dense_ones(curvature, route, n):
    if route == "dual" and n == 20:
        pytest.skip("the dual route serves fewer rows than columns")
    stage = FakeStage(n, 12, checkpoints=1 if route == "dual" else 2)
    found = spectrum(stage, range(len(stage.rows)), 12, curvature, route=route)
    hessian = stage.hessian(curvature)
    torch.testing.assert_close(found.apply(lambda x: x), hessian, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        found.apply(decay_operator(2.0, 0.1)),
        torch.matrix_exp(-2.0 * (hessian + 0.1 * torch.eye(12, dtype=torch.float64))),
        rtol=1e-5,
        atol=1e-6,
    )
    rows = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    function = response(2.0, 0.1, 0.3)
    torch.testing.assert_close(found.multiply(rows, function), rows @ found.apply(function))
    assert found.trace == pytest.approx(float(hessian.trace()), rel=1e-5)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_dual_equals_primal(curvature):
    stage = FakeStage(3, 40)
    primal = spectrum(stage, [0, 1], 40, curvature, route="primal")
    dual = spectrum(stage, [0, 1], 40, curvature, route="dual")
    assert dual.values.numel() < 40 == primal.values.numel()
    function = response(3.0, 0.01, 0.2)
    torch.testing.assert_close(dual.apply(function), primal.apply(function), rtol=1e-5, atol=1e-6)


def test_auto_takes_the_smaller_matrix():
    stage = FakeStage(3, 40)
    assert spectrum(stage, [0], 40).values.numel() <= 3
    assert spectrum(FakeStage(30, 5), [0, 1], 5).values.numel() == 5


def test_functions_of_no_factors_are_those_of_zero():
    empty = Spectrum(torch.zeros(0, dtype=torch.float64), torch.zeros(3, 0, dtype=torch.float64))
    torch.testing.assert_close(empty.apply(response(2.0, 0.0, 0.0)), 2.0 * torch.eye(3, dtype=torch.float64))


@given(
    sigma=st.floats(0, 1e3), time=st.floats(1e-6, 1e6), decay=st.floats(0, 1), damping=st.floats(0, 1)
)  # fmt: skip
def test_response_is_the_integral_of_forgetting(sigma, time, decay, damping):
    """c(σ) = ∫_0^s exp(-t (σ + λ + ρ)) dt lies between its two limits, s and 1 / (σ + λ + ρ)."""
    x = sigma + decay + damping
    value = float(response(time, decay, damping)(torch.tensor([sigma], dtype=torch.float64)))
    assert 0 < value <= time * (1 + 1e-12)
    if x > 0:
        assert value <= (1 / x) * (1 + 1e-9)
        assert value >= min(time, 1 / x) * (1 - torch.exp(torch.tensor(-1.0))) * (1 - 1e-9)


def test_response_at_zero_is_the_time():
    assert float(response(7.0, 0.0, 0.0)(torch.zeros(1, dtype=torch.float64))) == 7.0
    tiny = float(response(7.0, 0.0, 0.0)(torch.full((1,), 1e-12, dtype=torch.float64)))
    assert tiny == pytest.approx(7.0, rel=1e-10)


def test_noise_floor():
    assert noise_floor(8.0, 4, is_exact=False) == 2.0
    assert noise_floor(8.0, 4, is_exact=True) == 0.0
    assert damping_value("noise", 8.0, 4, is_exact=False) == 2.0
    assert damping_value(None, 8.0, 4, is_exact=False) == 0.0
    assert damping_value(0.5, 8.0, 4, is_exact=False) == 0.5


def test_ridge_inverse_without_ridge_is_the_pseudo_inverse():
    stage = FakeStage(3, 6, checkpoints=1)
    found = spectrum(stage, [0], 6, route="primal")
    torch.testing.assert_close(
        found.apply(ridge_inverse(0.0, 6)), torch.linalg.pinv(stage.hessian("empirical_fisher"), rtol=1e-5),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    damped = stage.hessian("empirical_fisher") + 0.5 * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(found.apply(ridge_inverse(0.5, 6)), torch.linalg.inv(damped), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("damping", ["nose", -1.0, float("nan"), float("inf")])
def test_bad_damping_is_refused(damping):
    with pytest.raises(ValueError, match="damping must be"):
        check_damping(damping)


def test_curvatures_that_the_bank_lacks_are_refused():
    with pytest.raises(ValueError, match="unknown curvature 'hessian'"):
        spectrum(FakeStage(4, 3), [0], 3, "hessian")
    with pytest.raises(ValueError, match="sampled_fisher=1"):
        spectrum(FakeStage(4, 3, draws=0), [0], 3, "sampled_fisher")
    with pytest.raises(ValueError, match="no function of one scalar"):
        spectrum(FakeStage(4, 3, d2=False), [0], 3, "gauss_newton")
    concave = FakeStage(4, 3)
    concave.d2[0, 0] = -1.0
    with pytest.raises(ValueError, match=r">= 0, got -1\.0"):
        spectrum(concave, [0], 3, "gauss_newton")
