"""The scale of a metric, whole and in factors; and the factors themselves."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from source_proj._errors import MismatchError
from source_proj.gradients import ParameterSpace
from source_proj.trajectory import Scale
from source_proj.trajectory.scale import best_factors, ordered_sum

SPACE = ParameterSpace(("table", "bias", "filters", "number"), ((5, 3), (4,), (2, 3, 2), ()))
FACTORED = (5 + 3) + 4 + (2 + 6) + 1
sizes = st.integers(1, 12)
seeds = st.integers(0, 2**32 - 1)


def spread(generator, *shape, width=3.0):
    """Positive numbers over several orders of magnitude."""
    return torch.from_numpy(np.exp(width * generator.standard_normal(shape)))


def divergence(p, v, fitted):
    """Σ v (P log(P / Q) - P + Q), with 0 log 0 = 0."""
    terms = torch.special.xlogy(p, p) - torch.special.xlogy(p, fitted) - p + fitted
    return float((v * terms)[v > 0].sum())


@given(o=sizes, i=sizes, seed=seeds)
@settings(max_examples=60, deadline=None)
def test_a_matrix_of_rank_one_is_kept(o, i, seed):
    """Also with rows and columns that no gradient has moved, and whatever v is elsewhere."""
    generator = np.random.default_rng(seed)
    moved = torch.outer(torch.from_numpy(generator.random(o) < 0.8), torch.from_numpy(generator.random(i) < 0.8))
    p = torch.outer(spread(generator, o), spread(generator, i)) * moved
    fitted = torch.outer(*best_factors(p, spread(generator, o, i) * moved))
    torch.testing.assert_close(fitted, p, rtol=1e-10, atol=0)


@given(o=sizes, i=sizes, seed=seeds)
@settings(max_examples=60, deadline=None)
def test_the_fit_is_better_than_means_and_keeps_the_trace(o, i, seed):
    generator = np.random.default_rng(seed)
    v = spread(generator, o, i, width=2.0) * torch.from_numpy(generator.random((o, i)) < 0.9)
    p = torch.where(v > 0, v.where(v > 0, 1.0).rsqrt(), 0.0)
    fitted = torch.outer(*best_factors(p, v))
    # Every row keeps its share of the trace, and so the whole does.
    torch.testing.assert_close((fitted * v).sum(1), (p * v).sum(1), rtol=1e-10, atol=0)
    means = torch.outer(p.sum(1), p.sum(0))
    kept = float((p * v).sum()) / max(float((means * v).sum()), 1e-300)
    assert divergence(p, v, fitted) <= divergence(p, v, means * kept) + 1e-9 * float((p * v).sum())


@given(o=st.integers(2, 8), i=st.integers(2, 8), seed=seeds)
@settings(max_examples=30, deadline=None)
def test_no_other_factors_are_nearer(o, i, seed):
    """Where P varies by a factor of two or so about a product, five sweeps are at the minimum: all ways lead up."""
    generator = np.random.default_rng(seed)
    v = spread(generator, o, i, width=0.3)
    p = v.rsqrt()
    a, b = best_factors(p, v)
    least = divergence(p, v, torch.outer(a, b))
    for step in (-0.02, 0.02):
        ways = (1 + step * torch.from_numpy(generator.standard_normal((2, max(o, i)))).clamp(-3, 3)).double()
        assert least <= divergence(p, v, torch.outer(a * ways[0, :o], b * ways[1, :i])) + 1e-12


@given(rows=st.integers(0, 40), columns=st.integers(1, 5), seed=seeds)
@settings(max_examples=40, deadline=None)
def test_sums_are_the_same_bits_however_they_lie_in_memory(rows, columns, seed):
    x = spread(np.random.default_rng(seed), rows, columns)
    total = ordered_sum(x)
    assert torch.equal(ordered_sum(x.T.contiguous().T), total)
    assert torch.equal(ordered_sum(x[:, :1]), total[:1])
    np.testing.assert_allclose(total, [math.fsum(column) for column in x.T.tolist()], rtol=1e-14)


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_factors_stand_for_outer_products(seed):
    values = spread(np.random.default_rng(seed), FACTORED, width=1.0).float()
    scale = Scale(values, SPACE, factored=True)
    table, bias, filters, number = values.split([8, 4, 8, 1])
    whole = torch.cat(
        [(table[:5, None] * table[5:]).flatten(), bias, (filters[:2, None] * filters[2:]).flatten(), number]
    )
    assert torch.equal(scale.diagonal, whole)
    exact = Scale(whole, SPACE)
    for name in SPACE.names:
        assert torch.equal(exact.of(name), scale.of(name))
        assert exact.factors(name) is None
    index = torch.tensor([[4, 0], [0, 2]])
    assert torch.equal(scale.rows("table", index), exact.rows("table", index))
    assert scale.factors("bias") is None
    assert scale.factors("number") is None
    assert [len(part) for part in scale.factors("filters")] == [2, 6]


def test_factors_are_no_diagonal_of_the_same_numbers():
    """A matrix of two rows and columns has as many entries as factors."""
    space = ParameterSpace(("w",), ((2, 2),))
    values = torch.ones(4)
    assert Scale(values, space).hash != Scale(values, space, factored=True).hash
    assert Scale(values, space).hash == Scale(values.clone(), space).hash


@pytest.mark.parametrize("factored", [False, True])
def test_other_parameters_are_refused(factored):
    counts = {False: SPACE.size, True: FACTORED}
    with pytest.raises(
        MismatchError, match=rf"has \({counts[not factored]},\) numbers; the space has {counts[factored]}"
    ):
        Scale(torch.ones(counts[not factored]), SPACE, factored=factored)
    turned = ParameterSpace(SPACE.names, ((3, 5), *SPACE.shapes[1:]))
    scale = Scale(torch.ones(counts[factored]), SPACE, factored=factored)
    scale.require(SPACE)
    with pytest.raises(MismatchError, match="use the scales of its own bank"):
        scale.require(turned)
