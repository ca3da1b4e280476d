import numpy as np
import pytest
import scipy.stats
import torch

from source_proj._errors import MismatchError
from source_proj.attribution.scores import Scores
from source_proj.evaluate import GroundTruth, calibration, compare, lds, leave_one_out

N, LEFT_OUT = 30, np.array([3, 0, 17, 9, 25, 11, 12, 28])


def problem(noise=1.0, r=4, q=3, seed=0):
    """Retrainings of a world in which every example adds its effect."""
    rng = np.random.default_rng(seed)
    effect = rng.normal(size=(q, N))
    masks = np.ones((len(LEFT_OUT) + 1, N), dtype=bool)
    masks[np.arange(len(LEFT_OUT)) + 1, LEFT_OUT] = False
    return effect, masks, (masks @ effect.T)[:, None] + noise * rng.normal(size=(len(masks), r, q))


def naive(scores, outcomes, left_out):
    """Rank correlations, Pearson's, and slopes of each query."""
    found = []
    for q, row in enumerate(scores):
        predicted = [-row[z] for z in left_out]
        actual = [np.mean(outcome[:, q]) - np.mean(outcomes[0][:, q]) for outcome in outcomes[1:]]
        found.append(
            (
                scipy.stats.spearmanr(predicted, actual).statistic,
                scipy.stats.pearsonr(predicted, actual).statistic,
                np.polyfit(predicted, actual, 1)[0],
            )
        )
    return np.array(found).T


def test_equals_its_naive_twin():
    effect, masks, outcomes = problem()
    scores = effect + np.random.default_rng(1).normal(size=effect.shape)
    result = leave_one_out(scores, masks, outcomes)
    ranked, linear, slopes = naive(scores, outcomes, LEFT_OUT)
    np.testing.assert_allclose(result.per_query, ranked)
    np.testing.assert_allclose(result.pearson_per_query, linear)
    np.testing.assert_allclose(result.calibration.per_query, slopes)
    assert (result.value, result.pearson) == (pytest.approx(ranked.mean()), pytest.approx(linear.mean()))
    assert f"slope {result.calibration.slope:.3g}" in str(result)


def test_perfect_and_reversed_predictions_and_their_slope():
    effect, masks, outcomes = problem(noise=0.0)
    right, wrong = (leave_one_out(scale * effect, masks, outcomes) for scale in (0.5, -1))
    for measured, expected in [(right.value, 1), (right.pearson, 1), (wrong.value, -1), (wrong.pearson, -1)]:
        assert measured == pytest.approx(expected)
    assert (right.calibration.slope, wrong.calibration.slope) == (pytest.approx(2), pytest.approx(-1))
    np.testing.assert_allclose([*right.interval, *right.pearson_interval], 1)


def test_intervals_equal_resampling_with_the_same_draws():
    effect, masks, outcomes = problem(noise=2.0)
    result = leave_one_out(effect, masks, outcomes, bootstrap=150, seed=5)
    count = len(LEFT_OUT)
    draws = np.random.default_rng(5).multinomial(count, np.full(count, 1 / count), size=150)
    replicates = []
    for draw in draws:
        chosen = np.repeat(np.arange(count), draw)
        if len(set(chosen)) > 1:
            one = naive(effect, outcomes[[0, *(chosen + 1)]], LEFT_OUT[chosen])
            replicates.append(one.mean(axis=1)[:2])
    spread = 1.959964 * np.std(replicates, axis=0)
    for interval, value, half in zip(
        (result.interval, result.pearson_interval), (result.value, result.pearson), spread, strict=True
    ):
        np.testing.assert_allclose(interval, np.clip([value - half, value + half], -1, 1), rtol=1e-6)


def test_renormalised_retraining_scales_by_n_over_n_minus_one_and_keeps_the_correlations():
    """The claim of the docstring, against ``Scores.predict_removal``."""
    effect, masks, _ = problem()
    scores = Scores(effect, range(3), range(N), unit="logit margin")
    changes = [scores.predict_removal(~mask, renormalize=True).values for mask in masks]
    result = leave_one_out(scores, masks, np.array(changes))
    assert result.value == pytest.approx(1)
    assert result.pearson == pytest.approx(1)
    assert result.calibration.slope == pytest.approx(N / (N - 1))


@pytest.mark.parametrize("correlate", ["spearman", "pearson"])
def test_ceiling_is_what_split_halves_say(correlate):
    effect, masks, outcomes = problem(r=2)
    result = leave_one_out(effect, masks, outcomes)
    function = {"spearman": scipy.stats.spearmanr, "pearson": scipy.stats.pearsonr}[correlate]
    halves = [outcomes[1:, r] - outcomes[:1, r] for r in range(2)]
    r = np.mean([function(halves[0][:, q], halves[1][:, q]).statistic for q in range(3)])
    found = result.ceiling if correlate == "spearman" else result.pearson_ceiling
    assert found == pytest.approx(np.sqrt(2 * r / (1 + r)))


def test_one_retraining_has_no_ceiling():
    effect, masks, outcomes = problem()
    result = leave_one_out(effect, masks, outcomes[:, 0])
    assert result.ceiling is result.pearson_ceiling is None
    assert "ceiling" not in str(result)


def test_the_noise_of_models_trained_on_everything_cancels():
    effect, masks, outcomes = problem()
    shifted = outcomes.copy()
    shifted[0] += 7
    one, other = (leave_one_out(effect, masks, values, bootstrap=0) for values in (outcomes, shifted))
    np.testing.assert_allclose(
        [one.value, one.pearson, one.calibration.slope], [other.value, other.pearson, other.calibration.slope]
    )


def test_a_ground_truth_of_retrained_models(tmp_path):
    """Ridge regression, whose leave-one-out effects have a closed form: first-order influence agrees."""
    generator = torch.Generator().manual_seed(0)
    n, queries = 200, torch.randn(4, 3, generator=generator, dtype=torch.float64)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    y = x.sum(1) + torch.randn(n, generator=generator, dtype=torch.float64)

    def solve(kept):
        return torch.linalg.solve(x[kept].T @ x[kept], x[kept].T @ y[kept])

    whole = solve(torch.arange(n))
    # -∇mᵀ H⁻¹ g / N, with H and g of the mean loss (wᵀx - y)²/2: the change that including an example made
    influence = queries @ torch.linalg.solve(x.T @ x, (x * (y - x @ whole)[:, None]).T)
    truth = GroundTruth.leave_one_out(tmp_path / "truth", n, 4, np.arange(0, n, 5))
    truth.fill(lambda kept, seed: queries @ solve(torch.from_numpy(kept)), progress=False)
    result = leave_one_out(influence, truth)
    assert result.value > 0.99
    assert result.pearson > 0.99
    assert result.calibration.slope == pytest.approx(1, abs=0.05)


def test_results_are_compared_in_pairs_but_not_with_lds():
    effect, masks, outcomes = problem(noise=0.1)
    noise = np.random.default_rng(3).normal(size=effect.shape)
    good, bad = (leave_one_out(scores, masks, outcomes) for scores in (effect, noise))
    difference = compare(good, bad)
    assert difference.value == good.value - bad.value
    half = 1.959964 * np.std(good.replicates - bad.replicates)
    np.testing.assert_allclose(difference.interval, [difference.value - half, difference.value + half], rtol=1e-6)
    with pytest.raises(MismatchError, match="not paired"):
        compare(good, lds(effect, masks, outcomes))


def test_no_bootstrap_no_interval_and_calibration_is_the_pooled_slope():
    effect, masks, outcomes = problem()
    result = leave_one_out(effect, masks, outcomes, bootstrap=0)
    assert np.isnan([*result.interval, *result.pearson_interval, *result.calibration.interval]).all()
    rest = calibration(effect, masks[1:], outcomes[1:], bootstrap=0)  # sums over the others: the same up to a constant
    assert result.calibration.slope == pytest.approx(rest.slope)


EFFECT, MASKS, OUTCOMES = problem()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"truth": MASKS[1:], "outcomes": OUTCOMES[1:]}, ValueError, "subset 0 drops 1"),
        ({"truth": MASKS[[0, 0, 1, 2]], "outcomes": OUTCOMES[:4]}, ValueError, "subset 1 drops 0"),
        ({"truth": MASKS[[0, 1, 2, 3]] & MASKS[3], "outcomes": OUTCOMES[:4]}, ValueError, "subset 0 drops 1"),
        ({"truth": MASKS[:3], "outcomes": OUTCOMES[:3]}, ValueError, "at least 3 of them, got 2"),
        ({"outcomes": None}, TypeError, "give both"),
        ({"scores": EFFECT[:, 1:]}, MismatchError, "29 training examples"),
        ({"scores": EFFECT[:2]}, MismatchError, "2 queries"),
        ({"scores": np.zeros_like(EFFECT)}, ValueError, r"same for queries \[0, 1, 2\]"),
        ({"outcomes": np.ones_like(OUTCOMES)}, ValueError, "whichever example"),
        ({"bootstrap": -1}, ValueError, "-1"),
    ],
)
def test_degenerate_input_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        leave_one_out(**{"scores": EFFECT, "truth": MASKS, "outcomes": OUTCOMES, **changes})
