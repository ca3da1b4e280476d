import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from source_proj.evaluate._ranks import RankedSeries, midranks, spearman, weighted_spearman

few_values = st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=30)  # many ties


@given(few_values)
def test_midranks_equal_scipy(values):
    np.testing.assert_array_equal(midranks(np.array(values)), scipy.stats.rankdata(values))


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_spearman_equals_scipy(seed, tied):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, 4, 12))
    if tied:
        x, y = np.round(x), np.round(y)
    x[:, :3], y[:, :3] = [-9, 0, 9], [-9, 0, 9]  # never constant
    expected = [scipy.stats.spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(spearman(x, y), expected, rtol=1e-12, atol=1e-12)


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_weighting_equals_resampling(seed, tied):
    """The fast path (no sort per replicate) against its naive twin: draw, then correlate what was drawn."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, 15))
    if tied:
        x, y = np.round(x), np.round(y)
    draws = rng.integers(0, 15, size=(8, 15))
    weights = np.stack([np.bincount(draw, minlength=15) for draw in draws]).astype(float)
    fast = weighted_spearman(RankedSeries.of(x), RankedSeries.of(y), weights)
    np.testing.assert_allclose(fast, spearman(x[draws], y[draws]), rtol=1e-12, atol=1e-12)


def test_constant_series_have_no_correlation():
    assert np.isnan(spearman(np.ones(4), np.arange(4.0)))


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5)])
def test_leading_axes_are_independent(shape):
    values = np.random.default_rng(0).normal(size=shape)
    expected = np.apply_along_axis(scipy.stats.rankdata, -1, values)
    np.testing.assert_array_equal(midranks(values), expected)
