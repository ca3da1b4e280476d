"""Few queries, and queries of unequal weight, prove as little as they do: errors, degrees of freedom, false namings."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

import source_proj as sp
from source_proj import curate
from source_proj.curate import aggregate
from source_proj.curate.chance import Spread, pooled_freedom, student_cdf

SEEDS = st.integers(0, 2**32 - 1)


def noise(seed, queries, n=60):
    return sp.Scores(np.random.default_rng(seed).normal(size=(queries, n)), range(queries), range(n), unit="u")


@given(SEEDS, st.floats(1, 1e4))
def test_students_distribution_is_that_of_scipy(seed, freedom):
    values = np.append(np.random.default_rng(seed).standard_t(2, 50) * 5, [0.0, -np.inf, np.inf, -1e100, -1e-9])
    with np.errstate(over="ignore"):
        expected = scipy.stats.t.cdf(values, freedom)
        np.testing.assert_allclose(student_cdf(values, np.full(len(values), freedom)), expected, rtol=1e-9, atol=1e-300)


def test_of_very_many_queries_it_is_the_normal_one():
    values = np.linspace(-6, 6, 25)
    for freedom in (9e4, 2e5):
        np.testing.assert_allclose(student_cdf(values, np.full(25, freedom)), scipy.stats.norm.cdf(values), rtol=2e-2)


@given(SEEDS, st.integers(2, 12))
def test_a_weighted_variance_has_the_moments_of_its_quadratic_form(seed, n):
    p = np.random.default_rng(seed).exponential(size=n) + 1e-3
    p /= p.sum()
    form = np.diag(p) - np.outer(p, p)  # Σ p (s - s̄)² = sᵀ form s
    spread = Spread.of(7 * p)
    assert np.isclose(spread.factor, p @ p / np.trace(form))
    assert np.isclose(spread.freedom, np.trace(form) ** 2 / np.trace(form @ form))
    assert np.allclose(Spread.of(np.ones(n)), (1 / (n - 1), n - 1))


@pytest.mark.parametrize("weights", [np.ones(4), np.arange(1, 9), np.r_[100, np.ones(9)], np.r_[30, 20, np.ones(40)]])
def test_the_error_is_the_deviation_of_the_mean_whatever_the_weights(weights):
    summed = aggregate(noise(0, len(weights), 20_000), weights=weights)
    assert np.isclose(np.sqrt((summed.error**2).mean()), summed.mean.std(), rtol=0.03)


@given(SEEDS, st.sampled_from([0.0, -3e7, 1e12]))
def test_what_all_queries_share_leaves_their_spread(seed, shared):
    values = np.round(np.random.default_rng(seed).normal(size=(9, 5)) * 64) / 64
    shifted = aggregate(sp.Scores(values + shared, range(9), range(5), unit="u"))
    np.testing.assert_allclose(shifted.error[0], scipy.stats.sem(values), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(shifted.mean[0] - shared, values.mean(0), rtol=1e-6, atol=1e-15 * abs(shared) + 1e-12)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("queries", [2, 3, 5, 10, 40])
@pytest.mark.parametrize("groups", [1, 2])
def test_of_pure_noise_something_is_named_as_seldom_as_is_said(queries, weighted, groups):
    """Were all examples harmless, any naming is false, and one run in twenty may name some."""
    count = queries * groups
    weights = np.random.default_rng(0).uniform(0.2, 3, count) if weighted else None
    names = np.arange(count) % groups
    named = [
        len(curate.harmful(aggregate(noise(seed, count), weights=weights, groups=names), false_share=0.05)) > 0
        for seed in range(120)
    ]
    assert np.mean(named) <= 0.05 + 4 * np.sqrt(0.05 * 0.95 / 120)


@pytest.mark.parametrize("queries", [6, 30])
def test_harm_beyond_chance_is_named_and_little_else(queries):
    false = []
    for seed in range(60):
        values = np.random.default_rng(seed).normal(size=(queries, 50)) - 5 * (np.arange(50) < 5)
        named = set(curate.harmful(aggregate(sp.Scores(values, range(queries), range(50), unit="u"))).ids)
        assert len(named & set(range(5))) >= 4
        false.append(len(named - set(range(5))) / max(len(named), 1))
    assert np.mean(false) <= 0.05 + 0.03


def test_degrees_of_freedom_are_pooled_by_welch():
    errors, freedom = np.array([[1.0, 0.0, 2.0, 0.0], [1.0, 1.0, 1.0, 0.0]]), np.array([4.0, 9.0])
    welch = 25 / (16 / 4 + 1 / 9)
    assert np.allclose(pooled_freedom(errors, freedom), [4 / (1 / 4 + 1 / 9), 9, welch, 4 / (1 / 4 + 1 / 9)])


def test_without_its_degrees_of_freedom_an_aggregate_has_those_of_its_sizes():
    summed = aggregate(noise(0, 6))
    plain = curate.Aggregate(
        summed.groups, summed.sizes, summed.mean - 1, summed.error, summed.worsened, summed.train_ids, "u", True
    )
    whole = aggregate(sp.Scores(noise(0, 6).values - 1, range(6), range(60), unit="u"))
    assert curate.harmful(plain).ids == curate.harmful(whole).ids


@given(SEEDS, st.sampled_from(["read-only", "reversed", "half", "shared", "tiny", "whole numbers"]))
def test_a_selection_is_of_the_numbers_however_they_lie(seed, kind):
    values = np.round(np.random.default_rng(seed).uniform(-1, 4, size=(4, 20)) * 8)
    given_values = {
        "read-only": values.astype(np.float32),
        "reversed": np.ascontiguousarray(values[::-1, ::-1])[::-1, ::-1],
        "half": values.astype(np.float16),
        "shared": values * 2.0**-40 + 2.0**-40 * 1e3,
        "tiny": values * 2.0**-200,
        "whole numbers": values.astype(np.int64),
    }[kind]
    given_values.flags.writeable = kind != "read-only"
    plain = values + 1e3 if kind == "shared" else values
    chosen, expected = (
        curate.select(sp.Scores(one, range(4), range(20), unit="u"), n=7).ids for one in (given_values, plain)
    )
    assert chosen == expected
