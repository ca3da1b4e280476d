"""What rounding leaves of equal numbers is no difference: neither a rank, nor a slope, nor a correlation."""

import warnings

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from source_proj.evaluate import calibration, half_subsets, lds, leave_one_out, noise_ceiling
from source_proj.evaluate._ranks import joined, pearson, weighted_pearson

seeds = st.integers(0, 2**32 - 1)


def tied(seed, n=20, m=20):
    """Scores of two values, whose sums over subsets are equal for many of these."""
    rng = np.random.default_rng(seed)
    masks, marked = half_subsets(n, m, seed=seed % 1000), np.zeros((3, n))
    marked[:, :3] = 1
    outcomes = masks @ rng.normal(size=(n, 3)) + 2 * masks @ marked.T
    return rng, masks, marked, outcomes


@given(seeds, st.sampled_from([0.1, 1 / 3, 1e-9]))
def test_lds_of_tied_predictions_is_that_of_whole_numbers(seed, offset):
    rng, masks, marked, outcomes = tied(seed)
    order = rng.permutation(masks.shape[1])
    result = lds((offset + 0.3 * marked)[:, order], masks[:, order], outcomes, bootstrap=20)
    counted = [scipy.stats.spearmanr(masks @ row, y).statistic for row, y in zip(marked, outcomes.T, strict=True)]
    np.testing.assert_allclose(result.per_query, counted, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(result.replicates, lds(marked, masks, outcomes, bootstrap=20).replicates, atol=1e-9)


@given(seeds)
def test_the_order_of_retrainings_changes_no_rank(seed):
    rng, masks, marked, _ = tied(seed)
    outcomes = rng.integers(0, 11, size=(len(masks), 5, 3)) / 10  # accuracies over ten examples
    scores, shuffled = rng.normal(size=marked.shape), rng.permuted(outcomes, axis=1)
    ours, other = (lds(scores, masks, given, bootstrap=0).per_query for given in (outcomes, shuffled))
    np.testing.assert_allclose(ours, other, atol=1e-12)
    tenths = np.round(outcomes * 10).sum(1)  # whole numbers
    np.testing.assert_allclose(ours, lds(scores, masks, tenths, bootstrap=0).per_query, atol=1e-12)


def test_halves_of_retrainings_that_agree_are_reliable():
    outcomes = np.tile([[[0.1], [0.2], [0.3], [0.3], [0.2], [0.1]], [[0.2]] * 6], (3, 1, 1))
    outcomes[-1] += 1
    outcomes[1::2, :3] = [[0.3], [0.1], [0.2]]  # the same half means, in another order
    counted = np.round(outcomes * 10)
    np.testing.assert_allclose(noise_ceiling(outcomes), noise_ceiling(counted), atol=1e-12)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20))
def test_joining_within_nothing_changes_nothing(values):
    given_values = np.array(values)
    np.testing.assert_array_equal(joined(given_values, np.zeros(1)), given_values)
    assert np.ptp(joined(given_values, np.full(1, 1e4))) == 0


@pytest.mark.parametrize("m", [3, 4, 6])
@given(seed=seeds)
def test_slopes_are_resampled_where_predictions_differ(m, seed):
    """Against its naive twin in whole numbers; the other resamplings know no slope."""
    rng = np.random.default_rng(seed)
    masks = half_subsets(8, m, seed=seed % 1000)
    masks[0, :4], masks[1, :4] = True, False
    marked = np.arange(8) < 4
    counts, outcomes = masks @ marked.astype(float), rng.integers(-5, 6, size=m).astype(float)
    outcomes[0] = outcomes[1] + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = calibration(0.1 * marked[None], masks, outcomes[:, None], bootstrap=50, seed=1)
    draws = np.random.default_rng(1).multinomial(m, np.full(m, 1 / m), size=50)
    for draw, slope in zip(draws, result.replicates, strict=True):
        x, y = np.repeat(counts, draw), np.repeat(outcomes, draw)
        expected = np.polyfit(x, y, 1)[0] / 0.1 if np.ptp(x) else np.nan
        np.testing.assert_allclose(slope, expected, rtol=1e-6, atol=1e-6)


@given(st.floats(0.01, 100), st.integers(2, 30))
def test_a_constant_series_has_no_linear_correlation(value, count):
    constant, other = np.full(count, value), np.arange(float(count))
    assert np.isnan(pearson(constant, other))
    assert np.isnan(pearson(constant, constant))
    weights = np.full((1, count), 1.0)
    assert np.isnan(weighted_pearson(constant, other, weights)).all()


def test_resamplings_of_equal_changes_are_left_out_of_both_correlations():
    masks = np.vstack([np.ones(5, dtype=bool), ~np.eye(5, dtype=bool)])
    outcomes = np.array([1.0, 0.9, 0.9, 0.9, 0.9, 0.3])[:, None]
    result = leave_one_out(np.array([[0.1, 0.1, 0.1, 0.1, 0.7]]), masks, outcomes)
    np.testing.assert_allclose(result.interval, 1)
    np.testing.assert_allclose(result.pearson_interval, 1)
