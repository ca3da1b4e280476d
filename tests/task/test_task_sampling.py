"""Labels drawn from the model's prediction: their distribution, and the Fisher matrix that they make."""

import itertools

import pytest
import torch
from torch.func import jacrev
from torch.nn.functional import cross_entropy, mse_loss

from source_proj.task import CausalLM, Classification, Regression

DRAWS = 20_000


def identity(inputs):
    return inputs


def uniforms(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda n: torch.rand(rows, n, generator=generator)


def assert_five_sigma(counts, p):
    n = counts.sum()
    assert ((counts / n - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()


@pytest.mark.parametrize("p", [[0.5, 0.3, 0.2], [0.001, 0.9, 0.099], [0.25, 0.23, 0.24, 0.28], [0.0, 0.6, 0.0, 0.4]])
def test_classes_follow_the_softmax(p):
    p = torch.tensor(p)
    batch = (p.log().expand(DRAWS, -1), torch.zeros(DRAWS, dtype=torch.long))
    logp = Classification().sampled_output(identity, batch, uniforms(DRAWS))
    counts = torch.stack([torch.isclose(logp.exp(), q, rtol=1e-3).sum() for q in p if q > 0]).double()
    assert counts.sum() == DRAWS
    assert_five_sigma(counts, p[p > 0].double())


def test_tokens_follow_the_softmax_and_positions_are_independent():
    logits = torch.tensor([[0.0, 1.0], [1.5, 0.0]])  # two positions, two tokens
    batch = (logits.expand(DRAWS, 2, 2), torch.zeros(DRAWS, 2, dtype=torch.long))
    drawn = CausalLM(shift=False, reduction="sum").sampled_output(identity, batch, uniforms(DRAWS))
    logp = logits.log_softmax(-1)
    pairs = [logp[0, a] + logp[1, b] for a, b in itertools.product(range(2), range(2))]
    counts = torch.stack([torch.isclose(drawn, pair).sum() for pair in pairs]).double()
    assert counts.sum() == DRAWS
    assert_five_sigma(counts, torch.stack(pairs).exp().double())


@pytest.mark.parametrize("loss", ["mse", "half_mse"])
def test_numbers_follow_the_gaussian_of_the_loss(loss):
    task = Regression(loss=loss)
    batch = (torch.full((DRAWS,), 3.0), torch.zeros(DRAWS))
    likelihood = task.sampled_output(identity, batch, uniforms(DRAWS)).double()
    squares = -2 * likelihood  # squares of standard normal numbers: mean 1, variance 2, third moment 15
    assert abs(squares.mean() - 1) <= 5 * (2 / DRAWS) ** 0.5
    assert abs(squares.square().mean() - 3) <= 5 * (96 / DRAWS) ** 0.5


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval(u):
    ends = lambda n: torch.full((1, n), u)  # noqa: E731
    for task, batch in (
        (Classification(), (torch.tensor([[-1e4, 0.0, -1e4]]), torch.tensor([0]))),
        (CausalLM(shift=False), (torch.tensor([[[-1e4, 0.0, -1e4]]]), torch.tensor([[0]]))),
    ):
        assert task.sampled_output(identity, batch, ends) == 0  # the one token that is possible
    assert Regression().sampled_output(identity, (torch.ones(1), torch.ones(1)), ends).isfinite()


def gauss_newton(model_output, loss):
    """Gauss-Newton Hessian Jᵀ (∂²loss/∂outputs²) J at parameters θ, by autograd."""

    def at(theta):
        jacobian = jacrev(model_output)(theta).reshape(-1, len(theta))
        inner = jacrev(jacrev(loss))(model_output(theta).detach()).reshape(len(jacobian), len(jacobian))
        return jacobian.T @ inner @ jacobian

    return at


def middles(p):
    """Uniform numbers that pick each class once: the middles of the classes' intervals."""
    return p.cumsum(0) - p / 2


THETA = torch.linspace(-1, 1, 6, dtype=torch.float64)


@pytest.mark.parametrize("weight", [None, 3.0])
def test_expected_fisher_of_classification(weight):
    mixing = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits_of = lambda theta: (mixing @ theta.sin())[None]  # noqa: E731
    label = torch.tensor([2])
    p = logits_of(THETA).softmax(-1)[0]
    task = Classification(sample_weight=None if weight is None else 2)
    extra = () if weight is None else (torch.tensor([weight]),)
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for probability, u in zip(p, middles(p), strict=True):
        theta = THETA.clone().requires_grad_()
        value = task.sampled_output(logits_of, (theta, label, *extra), lambda n, u=u: u.expand(1, n))
        (g,) = torch.autograd.grad(value.sum(), theta)
        expected += probability * torch.outer(g, g)
    reference = gauss_newton(logits_of, lambda z: (weight or 1.0) * cross_entropy(z, label))(THETA)
    torch.testing.assert_close(expected, reference)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_expected_fisher_of_language(reduction):
    mixing = torch.randn(3, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits_of = lambda theta: (mixing @ theta.sin())[None]  # noqa: E731  (1, T, V)
    labels = torch.tensor([[1, -100, 2]])
    p = logits_of(THETA).softmax(-1)[0]
    task = CausalLM(shift=False, reduction=reduction)
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for a, b in itertools.product(range(3), range(3)):
        u = torch.stack([middles(p[0])[a], torch.tensor(0.5), middles(p[2])[b]])[None]
        theta = THETA.clone().requires_grad_()
        value = task.sampled_output(logits_of, (theta, labels), lambda n, u=u: u[:, :n])
        (g,) = torch.autograd.grad(value.sum(), theta)
        expected += p[0, a] * p[2, b] * torch.outer(g, g)
    loss = lambda z: cross_entropy(z[0], labels[0], reduction=reduction)  # noqa: E731
    torch.testing.assert_close(expected, gauss_newton(logits_of, loss)(THETA))


@pytest.mark.parametrize("loss", ["mse", "half_mse"])
@pytest.mark.parametrize("weight", [None, 3.0])
def test_expected_fisher_of_regression(loss, weight):
    """The gradient is a standard normal number times a fixed vector: the square of that vector is the mean."""
    prediction_of = lambda theta: theta.sin().sum()[None]  # noqa: E731
    target = torch.zeros(1, dtype=torch.float64)
    u = torch.tensor([[0.3, 0.1]], dtype=torch.float64)
    normal = (-2 * torch.log1p(-u[0, 0])).sqrt() * torch.cos(2 * torch.pi * u[0, 1])
    task = Regression(loss=loss, sample_weight=None if weight is None else 2)
    extra = () if weight is None else (torch.tensor([weight]),)
    theta = THETA.clone().requires_grad_()
    value = task.sampled_output(prediction_of, (theta, target, *extra), lambda n: u)
    (g,) = torch.autograd.grad(value.sum(), theta)
    scale = (weight or 1.0) * (1 if loss == "mse" else 0.5)
    reference = gauss_newton(prediction_of, lambda z: scale * mse_loss(z, target))(THETA)
    torch.testing.assert_close(torch.outer(g, g) / normal**2, reference)


def test_draws_are_reproducible_and_carry_no_gradient():
    logits = torch.randn(5, 3, requires_grad=True)
    batch = (logits, torch.zeros(5, dtype=torch.long))
    first = Classification().sampled_output(identity, batch, uniforms(5))
    assert torch.equal(first, Classification().sampled_output(identity, batch, uniforms(5)))
    (gradient,) = torch.autograd.grad(first.sum(), logits)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(5), atol=1e-6, rtol=0)  # one-hot minus softmax


def test_labels_are_drawn_by_default_for_language_models_of_our_own_likelihood_alone():
    class Another(CausalLM):
        pass

    tasks = (Classification(), Regression(), CausalLM(), CausalLM(reduction="sum"), Another())
    assert [task.sampled_draws for task in tasks] == [0, 0, 1, 1, 0]
