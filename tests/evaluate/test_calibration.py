import numpy as np
import pytest

from source_proj.evaluate import calibration, half_subsets


def problem(noise, m=60, seed=0):
    rng = np.random.default_rng(seed)
    masks, effect = half_subsets(30, m, seed=seed), rng.normal(size=(4, 30))
    return effect, masks, 5 + (masks @ effect.T)[:, None, :] + noise * rng.normal(size=(m, 2, 4))


@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0])
def test_slope_undoes_a_wrong_unit(scale):
    effect, masks, outcomes = problem(noise=0.0)
    result = calibration(scale * effect, masks, outcomes)
    assert result.slope == pytest.approx(1 / scale)
    np.testing.assert_allclose(result.per_query, 1 / scale)
    np.testing.assert_allclose(result.interval, 1 / scale)
    assert result.correlation == pytest.approx(1)


def test_equals_polyfit_by_query_and_pooled():
    effect, masks, outcomes = problem(noise=2.0)
    result = calibration(effect, masks, outcomes, bootstrap=0)
    x, y = masks @ effect.T, outcomes.mean(1)
    expected = [np.polyfit(x[:, q], y[:, q], 1)[0] for q in range(4)]
    np.testing.assert_allclose(result.per_query, expected)
    pooled = np.polyfit((x - x.mean(0)).ravel(), (y - y.mean(0)).ravel(), 1)[0]
    assert result.slope == pytest.approx(pooled)
    assert np.isnan(result.interval).all()


def test_interval_equals_resampling_with_the_same_draws():
    effect, masks, outcomes = problem(noise=2.0)
    result = calibration(effect, masks, outcomes, bootstrap=300, seed=5)
    counts = np.random.default_rng(5).multinomial(60, np.full(60, 1 / 60), size=300)
    slopes = []
    for count in counts:
        chosen = np.repeat(np.arange(60), count)
        slopes.append(calibration(effect, masks[chosen], outcomes[chosen], bootstrap=0).slope)
    np.testing.assert_allclose(result.interval, np.quantile(slopes, [0.025, 0.975]))


def test_constant_predictions_are_refused():
    effect, masks, outcomes = problem(noise=1.0)
    with pytest.raises(ValueError, match="same value for every subset"):
        calibration(np.zeros_like(effect), masks, outcomes)
