"""Every method against its formula in dense float64, one table for all."""

import numpy as np
import pytest
import torch
from problems import classification, two_stages
from torch import Tensor

import source_proj as sp


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    problem = classification()
    bank = problem.build(tmp_path_factory.mktemp("bank") / "bank", sp.Sketch(dim=24, seed=3))
    return problem, bank


class Dense:
    """The bank's rows as float64 matrices, and queries at every checkpoint."""

    def __init__(self, problem, bank) -> None:
        stage = bank.stages[0]
        self.n, self.k = stage.n, bank.sketch.dim
        self.phi = [torch.cat([b.rows for b in stage.iter_rows(c)]).double() for c in range(4)]
        self.d1 = [torch.cat([b.d1 for b in stage.iter_rows(c)]).double() for c in range(4)]
        self.g = [p * d[:, None] for p, d in zip(self.phi, self.d1, strict=True)]
        features = sp.TracIn(bank, model=problem.model, progress=False).sketch(problem.queries)[0]
        self.q = [features.at(bank.checkpoint(0, c)).double() for c in range(4)]
        self.eye = torch.eye(self.k, dtype=torch.float64)

    def hessian(self, checkpoints: list[int]) -> Tensor:
        return sum(self.g[c].T @ self.g[c] for c in checkpoints) / (self.n * len(checkpoints))


def tracin(d: Dense) -> Tensor:
    return -sum(20 * 0.05 / 0.5 * q @ g.T for q, g in zip(d.q, d.g, strict=True)) / d.n


def hydra(d: Dense) -> Tensor:
    time, lam = 20 * 0.05 / 0.5, 1e-2
    weights = [np.exp(-lam * time * (3 - c)) * (1 - np.exp(-lam * time)) / lam for c in range(4)]
    return -sum(w * d.q[3] @ g.T for w, g in zip(weights, d.g, strict=True)) / d.n


def influence(d: Dense, *, average: bool, damping: float | None) -> Tensor:
    checkpoints = [0, 1, 2, 3] if average else [3]
    h = d.hessian(checkpoints)
    rho = float(h.trace()) / d.k if damping is None else damping
    mean = sum(d.g[c] for c in checkpoints) / len(checkpoints)
    return -d.q[3] @ torch.linalg.inv(h + (1e-2 + rho) * d.eye) @ mean.T / d.n


def datainf(d: Dense, factor: float = 0.1) -> Tensor:
    damping = factor * float(d.hessian([3]).trace()) / d.k + 1e-2
    mean = sum(torch.linalg.inv(torch.outer(g, g) + damping * d.eye) for g in d.g[3]) / d.n
    return -d.q[3] @ mean @ d.g[3].T / d.n


def arnoldi(d: Dense, rank: int) -> Tensor:
    values, vectors = torch.linalg.eigh(d.hessian([3]))
    inverse = (vectors[:, -rank:] / (values[-rank:] + 1e-2)) @ vectors[:, -rank:].T
    return -d.q[3] @ inverse @ d.g[3].T / d.n


def trak(d: Dense, ridge: float) -> Tensor:
    kernel = d.phi[3].T @ d.phi[3] + ridge * d.n * d.eye
    return d.q[3] @ torch.linalg.inv(kernel) @ d.phi[3].T * -d.d1[3]


def cosine(d: Dense) -> Tensor:
    return -torch.nn.functional.normalize(d.q[3]) @ torch.nn.functional.normalize(d.g[3]).T


TABLE = {
    "tracin": (sp.TracIn, {}, tracin),
    "hydra": (sp.Hydra, {}, hydra),
    "graddot": (sp.GradDot, {}, lambda d: -d.q[3] @ d.g[3].T / d.n),
    "gradcos": (sp.GradCos, {}, cosine),
    "influence": (sp.InfluenceFunction, {}, lambda d: influence(d, average=False, damping=None)),
    "influence, damped": (
        sp.InfluenceFunction,
        {"damping": 0.3},
        lambda d: influence(d, average=False, damping=0.3),
    ),
    "influence, averaged": (
        sp.InfluenceFunction,
        {"average": True, "query_gradient": "final"},
        lambda d: influence(d, average=True, damping=None),
    ),
    "datainf": (sp.DataInf, {}, datainf),
    "datainf, damped": (sp.DataInf, {"damping_factor": 2.0}, lambda d: datainf(d, 2.0)),
    "arnoldi": (sp.ArnoldiInfluence, {"rank": 5}, lambda d: arnoldi(d, 5)),
    "arnoldi, every eigenvector": (
        sp.ArnoldiInfluence,
        {"damping": "noise"},
        lambda d: influence(d, average=False, damping=None),
    ),
    "trak, ridge": (sp.Trak, {"ridge": 0.1}, lambda d: trak(d, 0.1)),
    "trak": (sp.Trak, {}, lambda d: trak(d, 0.0)),
}


@pytest.mark.parametrize("name", TABLE)
def test_method_equals_its_formula(setup, name):
    problem, bank = setup
    method, options, formula = TABLE[name]
    scores = method(bank, model=problem.model, progress=False, **options).score(problem.queries)
    expected = formula(Dense(problem, bank)).numpy()
    np.testing.assert_allclose(scores, expected, rtol=2e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", TABLE)
def test_every_method_has_the_same_verbs(setup, name):
    problem, bank = setup
    method, options, _ = TABLE[name]
    one = method(bank, model=problem.model, progress=False, **options)
    features = one.sketch(problem.queries)
    scores = one.score(features)
    np.testing.assert_array_equal(one.top_k(features, 4).indices, scores.top_k(4).indices)
    np.testing.assert_array_equal(one.bottom_k(features, 4).indices, scores.bottom_k(4).indices)
    assert scores.unit == ("cosine" if name == "gradcos" else sp.Classification().unit)


def test_trak_ensembles_kernels_and_weights_separately(tmp_path):
    problems = [classification(seed=0), classification(seed=1)]
    problems[1].train = problems[0].train
    banks = [p.build(tmp_path / str(i), sp.Sketch(dim=16, seed=i)) for i, p in enumerate(problems)]
    scores = sp.Trak(banks, model=problems[0].model, progress=False, ridge=0.1).score(problems[0].queries)
    dense = [Dense(p, b) for p, b in zip(problems, banks, strict=True)]
    for one, bank in zip(dense, banks, strict=True):  # both are asked the first problem's queries
        features = sp.TracIn(bank, model=problems[0].model, progress=False).sketch(problems[0].queries)[0]
        one.q = [features.at(bank.checkpoint(0, c)).double() for c in range(4)]
    kernels = [trak(one, 0.1) / -one.d1[3] for one in dense]
    weights = [-one.d1[3] for one in dense]
    expected = (kernels[0] + kernels[1]) / 2 * (weights[0] + weights[1]) / 2
    np.testing.assert_allclose(scores, expected, rtol=2e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("method", [sp.Trak, sp.InfluenceFunction, sp.DataInf, sp.ArnoldiInfluence])
def test_methods_of_one_optimum_leave_earlier_stages_alone(tmp_path, method):
    problem = two_stages()
    bank = problem.build(tmp_path / "bank")
    scores = np.asarray(method(bank, model=problem.model, progress=False).score(problem.queries))
    assert scores.shape == (6, 45)
    assert not scores[:, :30].any()
    assert np.isfinite(scores).all()
    assert scores[:, 30:].any()


def test_tracin_sums_over_stages(tmp_path):
    problem = two_stages()
    bank = problem.build(tmp_path / "bank")
    method = sp.TracIn(bank, model=problem.model, progress=False)
    features = method.sketch(problem.queries)
    assert len(features[0].rows) == 5
    scores = np.asarray(method.score(features))
    assert scores[:, :30].any(axis=1).all()
    assert scores[:, 30:].any(axis=1).all()
    np.testing.assert_array_equal(method.top_k(features, 7).indices, method.score(features).top_k(7).indices)


def test_features_of_one_method_are_refused_by_another_that_needs_more(setup):
    problem, bank = setup
    final_only = sp.GradDot(bank, model=problem.model, progress=False).sketch(problem.queries)
    with pytest.raises(sp.MismatchError, match="step 20"):
        sp.TracIn(bank, model=problem.model, progress=False).score(final_only)


@pytest.mark.parametrize("ridge", [-1.0, float("nan")])
def test_bad_ridge_is_refused(setup, ridge):
    with pytest.raises(ValueError, match="ridge must be"):
        sp.Trak(setup[1], ridge=ridge)


@pytest.mark.parametrize("factor", [0, -0.1, float("nan"), float("inf")])
def test_bad_damping_factor_is_refused(setup, factor):
    with pytest.raises(ValueError, match="damping_factor must be a number > 0"):
        sp.DataInf(setup[1], damping_factor=factor)


def test_curvatures_that_a_bank_does_not_offer_are_refused_by_datainf(setup):
    problem, bank = setup
    with pytest.raises(ValueError, match="needs rows of sampled labels"):
        sp.DataInf(bank, model=problem.model, curvature="sampled_fisher").score(problem.queries)
