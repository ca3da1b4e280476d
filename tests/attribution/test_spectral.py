"""Functions of a Hessian by a Cholesky factor against dense float64 ones, and moments against plain sums."""

import dataclasses
import math
import warnings

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import classification
from test_curvature import FakeStage

import source_proj as sp
from source_proj.attribution import moments
from source_proj.attribution.fits import Fit, fitted_hessian
from source_proj.attribution.gram_hessian import GramHessian, gram_hessian
from source_proj.attribution.moments import mean_hessian
from source_proj.attribution.series import shortest_series
from source_proj.attribution.spectral import (
    DenseHessian,
    Spectrum,
    cross_operator,
    decay_operator,
    effective_dimension,
    response,
    ridge_inverse,
)

DIM = 24


def dense(hessian, asked=None):
    """A DenseHessian that has no eigenvectors to fall back on."""

    def factor(shift, dtype):
        if asked is not None:
            asked.append((shift, dtype))
        return torch.linalg.cholesky(hessian.to(dtype) + shift * torch.eye(len(hessian), dtype=dtype))

    def never():
        raise AssertionError("eigenvectors were asked for")

    return DenseHessian(len(hessian), float(hessian.trace()), float(hessian.norm()), factor, never)


def naive(hessian, kind, time, decay, damping):
    """The function by dense float64 matrices, no eigenvalues."""
    eye = torch.eye(len(hessian), dtype=torch.float64)
    damped = hessian + (decay + damping) * eye
    if kind == "inverse":
        return torch.linalg.inv(damped)
    if kind == "response":
        return torch.linalg.solve(damped, eye - torch.matrix_exp(-time * damped))
    return torch.matrix_exp(-time * (hessian + decay * eye))


FUNCTIONS = {
    "inverse": lambda time, decay, damping: ridge_inverse(decay + damping, DIM),
    "response": response,
    "decay": lambda time, decay, damping: decay_operator(time, decay),
}


@settings(max_examples=30)
@given(
    kind=st.sampled_from(sorted(FUNCTIONS)),
    seed=st.integers(0, 2**16),
    slope=st.floats(0, 3),
    scale=st.floats(1e-3, 1e3),
    reach=st.floats(1e-3, 1e3),
    decay=st.floats(0, 0.1),
)
def test_a_factor_gives_the_functions_of_the_dense_matrix(kind, seed, slope, scale, reach, decay):
    """For damping at the noise level and any spectrum, time and size; relative to what f is at most."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(DIM, DIM, dtype=torch.float64, generator=generator)).Q
    values = scale * torch.arange(1, DIM + 1, dtype=torch.float64) ** -slope
    hessian = (basis * values) @ basis.T
    damping, time, decay = float(values.mean()), reach / float(values.mean()), decay * scale
    rows = torch.randn(5, DIM, generator=generator)
    found = dense(hessian).multiply(rows, FUNCTIONS[kind](time, decay, damping))
    expected = rows.double() @ naive(hessian, kind, time, decay, damping)
    largest = float(FUNCTIONS[kind](time, decay, damping)(torch.zeros(1, dtype=torch.float64)))
    assume(largest > torch.finfo(torch.float32).tiny)  # below, float32 has fewer digits
    assert float((found - expected).norm()) <= 2e-5 * largest * float(rows.norm())


@settings(max_examples=40)
@given(
    kind=st.sampled_from([*sorted(FUNCTIONS), "cross"]),
    seed=st.integers(0, 2**16),
    n=st.integers(1, DIM - 1),
    slope=st.floats(0, 3),
    scale=st.floats(1e-3, 1e3),
    reach=st.floats(1e-3, 1e3),
    decay=st.floats(0, 0.1),
)
def test_the_gram_matrix_of_few_rows_gives_the_functions_of_the_dense_one(kind, seed, n, slope, scale, reach, decay):
    """For any rows fewer than columns, of eigenvalues over many magnitudes; relative to what f is at most."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(DIM, n, dtype=torch.float64, generator=generator)).Q
    values = scale * torch.arange(1, n + 1, dtype=torch.float64) ** -slope
    factors = ((left * values.sqrt()) @ right.T).float()
    dense_one = factors.double().T @ factors.double()
    damping, time, decay = float(values.sum()) / DIM, reach * DIM / float(values.sum()), decay * scale
    rows = torch.randn(5, DIM, generator=generator)
    if kind == "cross":
        function, zero, eye = cross_operator(time, decay), torch.zeros_like(dense_one), torch.eye(DIM).double()
        # (exp(-sĤ) - 1)/Ĥ, where Ĥ has no inverse: minus the integral of exp(-uĤ) from 0 to s
        blocks = torch.cat([torch.cat([-dense_one, eye], 1), torch.cat([zero, zero], 1)])
        whole = -math.exp(-time * decay) * torch.matrix_exp(time * blocks)[:DIM, DIM:]
    else:
        function, whole = FUNCTIONS[kind](time, decay, damping), naive(dense_one, kind, time, decay, damping)
    largest = abs(float(function(torch.zeros(1, dtype=torch.float64))))
    assume(largest > torch.finfo(torch.float32).tiny)
    hessian = gram_hessian(factors)
    found = hessian.multiply(rows, function)
    assert float((found - rows.double() @ whole).norm()) <= 2e-5 * largest * float(rows.norm())
    assert float((hessian.apply(function) - whole).norm()) <= 2e-5 * largest * DIM
    assert hessian.trace == pytest.approx(float(dense_one.trace()), rel=1e-5)
    expected = float((torch.linalg.eigvalsh(dense_one) / (torch.linalg.eigvalsh(dense_one) + damping)).sum())
    assert effective_dimension(hessian, damping) == pytest.approx(expected, rel=1e-4)


def test_infinite_time_takes_one_solution():
    """Where nothing is left to forget, the polynomial has degree 0, whatever it is of."""
    assert len(shortest_series(response(1e6, 0.0, 0.1), 40.0).coefficients) == 1
    assert len(shortest_series(ridge_inverse(0.1, DIM), 40.0).coefficients) == 1


@pytest.mark.parametrize("reach", [1e-4, 1e-2, 1.0, 10.0, 1e2, 1e5])
@pytest.mark.parametrize("norm", [0.0, 1e-3, 1.0, 1e4])
def test_every_operator_of_source_has_a_short_series(reach, norm):
    for function in (response(reach, 0.0, 0.0), response(reach, 0.1, 1.0), decay_operator(reach, 0.1)):
        assert len(shortest_series(function, norm).coefficients) <= 20
    assert len(shortest_series(cross_operator(reach, 0.1), norm).coefficients) <= 20


def test_a_function_with_a_jump_takes_eigenvectors():
    assert shortest_series(ridge_inverse(0.0, DIM), 1.0) is None
    values = torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64)
    vectors = torch.eye(3, dtype=torch.float64)
    hessian = DenseHessian(3, 2.0, 2.0, lambda *_: None, lambda: Spectrum(values, vectors))
    found = hessian.multiply(torch.ones(1, 3), ridge_inverse(0.0, 3))
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0, 0.5]], dtype=torch.float64))


def test_an_ill_conditioned_factor_is_double():
    asked = []
    hessian = dense(torch.diag(torch.tensor([1e6, 1.0, 0.0], dtype=torch.float64)), asked)
    found = hessian.multiply(torch.eye(3), ridge_inverse(1e-3, 3))
    torch.testing.assert_close(found.diagonal(), torch.tensor([1e-6, 1 / 1.001, 1e3], dtype=torch.float64), rtol=1e-6,
                               atol=0)  # fmt: skip
    assert asked == [(1e-3, torch.float64)]


@pytest.mark.parametrize("n", [3, 9, 40])
@pytest.mark.parametrize("curvature", ["empirical_fisher", "sampled_fisher"])
def test_panels_make_the_whole_product(monkeypatch, n, curvature):
    monkeypatch.setattr(moments, "_SMALL", 4)
    stage = FakeStage(n, 17)
    found = mean_hessian(stage, [0, 1], 17, curvature)
    torch.testing.assert_close(found, stage.hessian(curvature), rtol=1e-5, atol=1e-5)


def by_factors_as_by_spectra(problem, bank, monkeypatch, cache, options):
    """Source by eigenvectors and by factors, as for a large k, whose scores are the same; and the queries' sketches."""
    options = {"model": problem.model, "progress": False, **options}
    expected = sp.Source(bank, cache=False, **options)
    features = expected.sketch(problem.queries)
    scores, own = expected.score(features).to_numpy(), expected.self_influence()
    monkeypatch.setattr(moments, "_SMALL", 4)
    method = sp.Source(bank, cache=cache, **options)
    found = method.score(features).to_numpy()
    assert abs(found - scores).max() <= 2e-5 * abs(scores).max()
    assert abs(method.self_influence() - own).max() <= 2e-5 * abs(own).max()
    again = sp.Source(sp.open(bank.path), cache=cache, **options).score(features).to_numpy()
    assert (again == found).all()
    return expected, method, features


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("options", [{}, {"segments": 1}, {"damping": 0.01}, {"damping": None}, {"time_scale": 1e4}])
def test_source_by_factors_equals_source_by_spectra(tmp_path, monkeypatch, options, cache):
    """As for a large k; a second Source finds the factors beside the bank."""
    problem = classification(n=60)
    bank = problem.build(tmp_path / "bank", sp.Sketch(dim=20))
    _, method, _ = by_factors_as_by_spectra(problem, bank, monkeypatch, cache, options)
    assert isinstance(method._of(bank).hessian(method.segments[0]), DenseHessian)
    assert any(path.name.startswith("factor-") for path in bank.fits.folder.glob("*")) == cache


def test_factors_take_at_most_twice_the_hessian_on_disk(tmp_path, monkeypatch):
    problem = classification(n=60)
    bank = problem.build(tmp_path / "bank", sp.Sketch(dim=32))
    monkeypatch.setattr(moments, "_SMALL", 4)
    source = sp.Source(bank, model=problem.model, progress=False, segments=1).fit()
    names = sorted(path.name.split("-")[0] for path in bank.fits.folder.iterdir() if path.is_dir())
    assert names == ["factor", "hessian", "sizes"]
    source.score(problem.queries)
    assert len([path for path in bank.fits.folder.iterdir() if path.is_dir()]) == 3


def test_ridges_and_their_absence_by_factors(tmp_path, monkeypatch):
    problem = classification(n=60)
    bank = problem.build(tmp_path / "bank", sp.Sketch(dim=20))
    methods = [(sp.Trak, {}), (sp.Trak, {"ridge": 0.1}), (sp.InfluenceFunction, {"average": True})]
    options = {"model": problem.model, "progress": False, "cache": False}
    expected = [method(bank, **options, **own).score(problem.queries).to_numpy() for method, own in methods]
    monkeypatch.setattr(moments, "_SMALL", 4)
    for (method, own), scores in zip(methods, expected, strict=True):
        found = method(bank, **options, **own).score(problem.queries).to_numpy()
        assert abs(found - scores).max() <= 1e-4 * abs(scores).max()


def test_few_rows_are_fitted_by_their_gram_matrix(tmp_path, monkeypatch):
    problem = classification(n=6)
    bank = problem.build(tmp_path / "bank", sp.Sketch(dim=30))
    monkeypatch.setattr(moments, "_SMALL", 4)
    assert isinstance(fitted_hessian(Fit(bank, 0, [0], "empirical_fisher")), GramHessian)
    assert isinstance(fitted_hessian(Fit(bank, 0, range(4), "empirical_fisher")), DenseHessian)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("options", [{}, {"segments": 2}, {"damping": 0.01}, {"damping": None}, {"time_scale": 1e4}])
@pytest.mark.parametrize("preconditioner", ["scalar", "per_segment"])
def test_source_by_gram_matrices_equals_source_by_spectra(tmp_path, monkeypatch, options, cache, preconditioner):
    """Of few rows and a large k, with several segments and metrics; a second Source finds the factors in the bank."""
    problem = classification(n=6)
    trajectory = sp.Trajectory.from_stages(
        [dataclasses.replace(stage, preconditioner=preconditioner) for stage in problem.trajectory.stages]
    )
    problem = dataclasses.replace(problem, trajectory=trajectory)
    bank = problem.build(tmp_path / "bank", sp.Sketch(dim=40))
    expected, method, features = by_factors_as_by_spectra(problem, bank, monkeypatch, cache, options)
    assert all(isinstance(method._of(bank).hessian(segment), GramHessian) for segment in method.segments)
    assert method.fidelity(features).effective_dimension == pytest.approx(
        expected.fidelity(features).effective_dimension, rel=1e-4
    )
    if cache and options.get("damping", 1) is not None:
        names = {path.name.split("-")[0] for path in bank.fits.folder.iterdir() if path.is_dir()}
        assert names - {"crossing"} == {"gram_factor", "gram_sizes"}


def test_damping_that_sums_do_not_resolve_is_warned_of(tmp_path, monkeypatch):
    bank = classification(n=30).build(tmp_path / "bank", sp.Sketch(dim=12))
    monkeypatch.setattr(moments, "_SMALL", 4)
    hessian = fitted_hessian(Fit(bank, 0, [0], "empirical_fisher"))
    with pytest.warns(UserWarning, match=r"damping, .* of 1e-14 is less than the sums of Ĥ resolve.*Give damping="):
        hessian.multiply(torch.ones(1, 12), ridge_inverse(1e-14, 12))


@pytest.mark.parametrize("ridge", [1e-3, 1e-5, 1e-7, 1e-9])
def test_small_ridges_are_exact_where_there_are_few_rows(tmp_path, monkeypatch, ridge):
    """Even below what sums in single precision resolve, of which there is no need to warn."""
    problem = classification(n=6)
    bank = problem.build(tmp_path / "bank", sp.Sketch(dim=80))
    options = {"model": problem.model, "progress": False, "cache": False, "ridge": ridge}
    expected = sp.Trak(bank, **options).score(problem.queries).to_numpy()
    monkeypatch.setattr(moments, "_SMALL", 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = sp.Trak(bank, **options).score(problem.queries).to_numpy()
    assert abs(found - expected).max() <= 1e-4 * abs(expected).max()


@pytest.mark.parametrize("n", [20, 200])
def test_the_rank_is_the_effective_dimension_of_an_unregularised_hessian(n):
    """Where no factor can be had of a shift that rounding loses, eigenvalues are counted."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(n, 3, generator=generator) @ torch.randn(3, 40, generator=generator)
    gram = gram_hessian(factors)
    whole = factors.double().T @ factors.double()

    def factor(shift, dtype):
        return torch.linalg.cholesky((whole + shift * torch.eye(40)).to(dtype))

    dense_one = DenseHessian(40, gram.trace, gram.norm, factor, lambda: moments.decomposed(whole))
    for hessian in (gram, dense_one):
        assert effective_dimension(hessian, 0.0) == pytest.approx(3, abs=0.05)
