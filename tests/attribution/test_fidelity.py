"""Fidelity of scores: estimated from halves of one sketch, against scores that have no sketch."""

import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from preconditioned import adam_run
from problems import Problem, classification, source, two_stages
from torch import nn
from torch.utils.data import TensorDataset

import source_proj as sp
from source_proj.attribution.source.fidelity import Fidelity
from source_proj.attribution.spectral import DenseHessian, Spectrum, effective_dimension

SEEDS = 4


def wide(noise: float, *, n: int = 96, d: int = 40, classes: int = 8, seed: int = 0, segments: int = 1) -> Problem:
    """A linear classifier at random weights, near and far from what its labels say."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, d, generator=generator)

    def drawn(count: int) -> TensorDataset:
        labels = torch.randint(0, classes, (count,), generator=generator)
        return TensorDataset(centres[labels] + noise * torch.randn(count, d, generator=generator), labels)

    model = nn.Linear(d, classes)
    states = []
    for scale in (0.02, 0.05):
        weight = scale * torch.randn(classes, d, generator=generator)
        states.append({"weight": weight + 0.02 * centres, "bias": torch.zeros(classes)})
    run = sp.Trajectory([sp.Checkpoint(s, 50 * (i + 1), lr=0.05) for i, s in enumerate(states)], segments=segments)
    return Problem(model, sp.Classification(), run, drawn(n), drawn(24))


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = (values - values.mean(1, keepdims=True) for values in (a, b))
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


TASKS = {
    "near": lambda: wide(0.3),
    "noisy": lambda: wide(1.0, n=160),
    "segments": lambda: wide(0.5, seed=1, segments=2),
}


def differences(problem: Problem, folder, dim: int) -> tuple[float, float]:
    """The mean over queries and sketches of estimated minus true correlation, and its standard error over sketches."""
    exact = source(problem, problem.build(folder / "exact"), damping=0.01, query_gradient="mean")
    truth, values = exact.score(problem.queries).values, []
    for seed in range(SEEDS):
        method = source(problem, problem.build(folder / str(seed), sketch=sp.Sketch(dim, seed=seed)), damping=0.01)
        scores = method.score(problem.queries)
        with warnings.catch_warnings(action="ignore"):
            estimated = scores.fidelity.correlation
        values.append((estimated - correlation(scores.values, truth)).mean())
    return float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(SEEDS)


@pytest.mark.parametrize("make", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("dim", [24, 64])
def test_estimates_are_the_true_correlations(tmp_path, make, dim):
    """Three or more factors of Ĥ a column: within .06, and five standard errors of the mean over sketches."""
    difference, error = differences(make(), tmp_path, dim)
    assert abs(difference) <= 0.06 + 5 * error
    assert error < 0.06  # so that the bound says something


def test_estimates_are_too_low_where_factors_are_fewer_than_columns(tmp_path):
    difference, error = differences(wide(1.0, n=24), tmp_path, 128)
    assert difference <= 5 * error
    assert error < 0.06


def test_an_exact_sketch_is_trusted(blobs):
    problem, bank = blobs
    fidelity = source(problem, bank).fidelity(problem.queries)
    assert (fidelity.correlation == 1).all()
    assert fidelity.warning is None
    assert fidelity.sufficient_dim == bank.sketch.dim


@pytest.mark.parametrize("problem", [two_stages(20), adam_run(preconditioner="per_segment")], ids=["stages", "metrics"])
def test_it_is_there_for_every_kind_of_run(tmp_path, problem):
    banks = [problem.build(tmp_path / str(seed), sketch=sp.Sketch(20, seed=seed)) for seed in (0, 1)]
    for asked in (banks[0], banks):
        with warnings.catch_warnings(action="ignore"):
            fidelity = source(problem, asked).score(problem.queries).fidelity
        assert fidelity.correlation.shape == fidelity.leakage.shape == (len(problem.queries),)
        assert ((fidelity.correlation >= 0) & (fidelity.correlation <= 1)).all()
        assert 0 < fidelity.effective_dimension < 20


def test_leakage_is_what_the_rows_do_not_explain(tmp_path):
    problem = classification(24, segments=1)
    bank = problem.build(tmp_path / "bank", sketch=sp.Sketch(30, seed=1))
    method = source(problem, bank, damping=0.02, query_gradient="final")
    (segment,) = method.segments
    with warnings.catch_warnings(action="ignore"):
        fidelity = method.fidelity(problem.queries)
    factors = torch.cat([b.rows.double() * b.d1[:, None] for c in range(4) for b in bank.stages[0].iter_rows(c)])
    ridge = segment.decay + segment.damping
    inverse = torch.linalg.inv(factors.T @ factors / len(factors) + ridge * torch.eye(30))
    rows = method._query(bank, method.sketch(problem.queries)[0]).double()
    leakage = ridge * torch.einsum("qi,ij,qj->q", rows, inverse, rows) / (rows**2).sum(1)
    np.testing.assert_allclose(fidelity.leakage, leakage, rtol=1e-4)
    assert fidelity.effective_dimension == pytest.approx(30 - ridge * float(inverse.trace()), rel=1e-4)


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.5])
def test_effective_dimension_is_the_same_by_factor_and_by_spectrum(ridge):
    rows = torch.randn(30, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = rows.T @ rows / 30
    values, vectors = torch.linalg.eigh(matrix)

    def factor(shift, dtype):
        return torch.linalg.cholesky((matrix + shift * torch.eye(12)).to(dtype))

    norm, trace = float(matrix.norm()), float(values.sum())
    dense = DenseHessian(12, trace, norm, factor, lambda: Spectrum(values, vectors))
    expected = float((values / (values + ridge)).sum())
    assert effective_dimension(Spectrum(values, vectors), ridge) == pytest.approx(expected, rel=1e-5)
    assert effective_dimension(dense, ridge) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("correlation", [0.12, 0.5, 0.69, 0.8])
def test_errors_fall_with_one_over_k(correlation):
    fidelity = Fidelity(["a"], np.array([correlation]), np.array([0.1]), 5.0, 1024, 10**7)

    def at(dim: int) -> float:
        return 1 / math.sqrt(1 + (1 / correlation**2 - 1) * 1024 / dim)

    assert at(fidelity.sufficient_dim // 2) < 0.9 <= at(fidelity.sufficient_dim)
    assert (fidelity.warning is None) == (correlation >= 0.7)
    assert (
        fidelity.warning is None
        or f"without a sketch at the same damping; build a bank with Sketch(dim={fidelity.sufficient_dim})"
        in fidelity.warning
    )


@pytest.mark.parametrize("size", [1000, 1024, 2000, 10**9])
def test_no_more_numbers_are_asked_for_than_there_are_parameters(size):
    """As many of them are exact."""
    fidelity = Fidelity(["a"], np.array([0.12]), np.array([0.1]), 5.0, 1024, size)
    assert fidelity.sufficient_dim <= size
    assert fidelity.warning is not None
    assert (f"Sketch(dim={size}, kind='identity')" in fidelity.warning) == (size < 10**9)


def test_a_small_sketch_is_warned_of(tmp_path):
    problem = wide(1.0)
    method = source(problem, problem.build(tmp_path / "bank", sketch=sp.Sketch(8)), damping=0.01)
    for asked in ((problem.queries,), ()):
        with pytest.warns(UserWarning, match="the sketch of 8 numbers is too small"):
            fidelity = method.fidelity(*asked)
        assert "with unsketched scores at the same damping about" in repr(fidelity)
    assert fidelity.query_ids == [95 * i // 12 for i in range(12)]
    for shown in (repr(method), method._repr_html_()):
        assert f"effective dimension {fidelity.effective_dimension:.0f} of 8" in shown


def test_a_single_number_is_not_trusted_and_runs_may_differ_in_size(tmp_path):
    problem = wide(1.0, n=24)
    one, small, large = (problem.build(tmp_path / str(k), sketch=sp.Sketch(k)) for k in (1, 7, 16))
    with pytest.warns(UserWarning, match="the sketch of 1 numbers is too small"):
        assert (source(problem, one).fidelity(problem.queries).correlation == 0).all()
    with warnings.catch_warnings(action="ignore"):
        assert source(problem, [large, small]).fidelity(problem.queries).correlation.max() > 0


@pytest.mark.parametrize("n", [1, 2])
def test_too_few_examples_to_correlate_over_are_refused(tmp_path, n):
    problem = wide(1.0, n=n)
    method = source(problem, problem.build(tmp_path / "bank", sketch=sp.Sketch(8)), damping=0.01)
    for asked in ((problem.queries,), ()):
        with pytest.raises(sp.BankError, match=f"of the {n} in .* at least 3 are needed"):
            method.fidelity(*asked)
    exact = source(problem, problem.build(tmp_path / "exact", sketch=sp.Sketch(kind="identity")), damping=0.01)
    assert (exact.fidelity(problem.queries).correlation == 1).all()


def test_scores_from_elsewhere_have_none(tmp_path):
    problem = classification(16)
    bank = problem.build(tmp_path / "bank", sketch=sp.Sketch(32))
    method = source(problem, bank)
    scores = method.score(problem.queries)
    assert pickle.loads(pickle.dumps(scores)).fidelity is None
    assert method.score(problem.queries, tmp_path / "scores.zarr").fidelity is None
    assert sp.TracIn(bank, model=problem.model, progress=False).score(problem.queries).fidelity is None
