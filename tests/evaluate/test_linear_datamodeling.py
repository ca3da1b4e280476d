import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from source_proj._errors import MismatchError
from source_proj.evaluate import (
    Difference,
    GroundTruth,
    calibration,
    compare,
    half_subsets,
    lds,
    mean_lds,
    noise_ceiling,
)


def problem(m=20, r=4, q=3, n=30, noise=1.0, seed=0):
    rng = np.random.default_rng(seed)
    masks = half_subsets(n, m, seed=seed)
    effect = rng.normal(size=(q, n))
    outcomes = (masks @ effect.T)[:, None, :] + noise * rng.normal(size=(m, r, q))
    return effect, masks, outcomes


def naive_lds(scores, masks, outcomes):
    values = []
    for q, row in enumerate(scores):
        predicted = [sum(row[z] for z in range(len(row)) if mask[z]) for mask in masks]
        measured = [np.mean(outcome[:, q]) for outcome in outcomes]
        values.append(scipy.stats.spearmanr(predicted, measured).statistic)
    return np.array(values)


def test_equals_its_naive_twin():
    effect, masks, outcomes = problem(q=70)  # more queries than one block of rows
    scores = effect + np.random.default_rng(1).normal(size=effect.shape)
    result = lds(scores, masks, outcomes)
    expected = naive_lds(scores, masks, outcomes)
    np.testing.assert_allclose(result.per_query, expected, rtol=1e-10)
    assert result.value == pytest.approx(expected.mean())


def test_interval_equals_a_naive_bootstrap():
    effect, masks, outcomes = problem(noise=4.0)
    result = lds(effect, masks, outcomes, bootstrap=2000, seed=1)
    rng = np.random.default_rng(2)  # other draws of the same distribution
    replicates = []
    for _ in range(2000):
        chosen = rng.integers(0, len(masks), size=len(masks))
        predicted, measured = masks[chosen] @ effect.T, outcomes[chosen].mean(1)
        pairs = [scipy.stats.spearmanr(predicted[:, q], measured[:, q]).statistic for q in range(3)]
        replicates.append(np.mean(pairs))
    spread = np.std(replicates)
    # A deviation of 2,000 draws has standard error .016 of itself; the two differ by √2 of it.
    ends = result.value + 1.96 * spread * np.array([-1, 1])
    assert np.abs(result.interval - ends).max() < 5 * 0.023 * 1.96 * spread
    assert abs(result.replicates.mean() - np.mean(replicates)) < 5 * spread * np.sqrt(2 / 2000)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    truth = lds(*_wide_problem(4000, seed=99), bootstrap=0).value
    hits = [_covers(lds(*_wide_problem(60, seed=s), bootstrap=200), truth) for s in range(200)]
    # 95 % nominal; 5σ of 200 trials is .08.
    assert np.mean(hits) > 0.95 - 0.08


def test_few_subsets_cover_the_truth_too_and_miss_it_on_either_side():
    """Percentiles cover 88 % of these, and lie below the truth otherwise: replicates of a rank correlation do."""
    effect, scores = (np.random.default_rng(seed).normal(size=(8, 40)) for seed in (0, 1))
    scores = effect + 0.5 * scores
    results = [lds(scores, *_shared_noise(effect, 30, seed), bootstrap=150) for seed in range(300)]
    truth = lds(scores, *_shared_noise(effect, 6000, 999), bootstrap=0).value
    below, above = (
        np.mean([side(r.interval) for r in results]) for side in (lambda i: i[1] < truth, lambda i: i[0] > truth)
    )
    assert below + above < 0.05 + 4 * 0.0126
    assert below < 0.025 + 4 * 0.009
    assert above < 0.025 + 4 * 0.009


def _shared_noise(effect, m, seed):
    """Retrainings of which each is off by the same for all queries."""
    masks = half_subsets(effect.shape[1], m, seed=seed)
    return masks, masks @ effect.T + 2 * np.random.default_rng(seed).normal(size=(m, 1))


def _wide_problem(m, seed):
    rng = np.random.default_rng(0)
    effect, scores = rng.normal(size=(2, 2, 30)) + rng.normal(size=(2, 30))
    masks = half_subsets(30, m, seed=seed)
    return scores, masks, masks @ effect.T + 2 * np.random.default_rng(seed).normal(size=(m, 2))


def _covers(result, truth):
    return result.interval[0] <= truth <= result.interval[1]


def test_perfect_and_reversed_predictions():
    effect, masks, outcomes = problem(noise=0.0)
    assert lds(effect, masks, outcomes).value == pytest.approx(1)
    assert lds(-effect, masks, outcomes).value == pytest.approx(-1)


def test_any_monotone_transform_of_one_query_changes_nothing():
    effect, masks, outcomes = problem()
    noisy = effect + np.random.default_rng(5).normal(size=effect.shape)
    single = outcomes.mean(1)
    np.testing.assert_allclose(
        lds(7 * noisy, masks, np.exp(single / 9)).per_query, lds(noisy, masks, single).per_query, rtol=1e-12
    )


def test_accepts_tensors_scores_objects_and_single_retrainings():
    effect, masks, outcomes = problem()
    single = lds(effect, masks, outcomes[:, 0])
    assert single.ceiling is None
    assert lds(torch.tensor(effect), torch.tensor(masks), torch.tensor(outcomes[:, 0])).value == single.value
    assert str(single).startswith("LDS ")


def test_same_seed_same_interval_and_no_bootstrap_no_interval():
    effect, masks, outcomes = problem()
    assert lds(effect, masks, outcomes, seed=3).interval == lds(effect, masks, outcomes, seed=3).interval
    assert np.isnan(lds(effect, masks, outcomes, bootstrap=0).interval).all()


def test_compare_is_paired():
    effect, masks, outcomes = problem(m=40, noise=3.0)
    rng = np.random.default_rng(1)
    good, bad = (lds(effect + s * rng.normal(size=effect.shape), masks, outcomes) for s in (0.1, 2.0))
    difference = compare(good, bad)
    assert difference.value == pytest.approx(good.value - bad.value)
    ends = difference.value + 1.959964 * np.std(good.replicates - bad.replicates) * np.array([-1, 1])
    np.testing.assert_allclose(difference.interval, ends, rtol=1e-6)
    assert compare(good, good).interval == (0.0, 0.0)
    assert not compare(good, good).significant


def test_mean_over_runs():
    effect, masks, outcomes = problem()
    rng = np.random.default_rng(1)
    runs = [lds(effect + rng.normal(size=effect.shape), masks, outcomes) for _ in range(3)]
    mean = mean_lds(runs)
    assert mean.value == pytest.approx(np.mean([run.value for run in runs]))
    np.testing.assert_allclose(mean.per_query, np.mean([run.per_query for run in runs], axis=0))
    spread = np.std(np.mean([run.replicates for run in runs], axis=0))
    np.testing.assert_allclose(mean.interval, mean.value + 1.959964 * spread * np.array([-1, 1]), rtol=1e-6)


def test_calibration_comes_along():
    effect, masks, outcomes = problem()
    result = lds(effect / 3, masks, outcomes, seed=2)
    alone = calibration(effect / 3, masks, outcomes, seed=2)
    assert (result.calibration.slope, result.calibration.interval) == (alone.slope, alone.interval)
    assert f"slope {alone.slope:.3g}" in str(result)
    without = lds(effect / 3, masks, outcomes, bootstrap=0).calibration
    assert without.slope == alone.slope
    assert np.isnan(without.interval).all()


def test_mean_over_runs_has_the_mean_slope():
    effect, masks, outcomes = problem()
    runs = [lds(scale * effect, masks, outcomes) for scale in (0.5, 2.0)]
    mean = mean_lds(runs).calibration
    slopes = [run.calibration for run in runs]
    assert mean.slope == pytest.approx((slopes[0].slope + slopes[1].slope) / 2)
    np.testing.assert_allclose(mean.per_query, (slopes[0].per_query + slopes[1].per_query) / 2)
    # One run's slope is four times the other's in every resampling, so the mean's interval is theirs, scaled.
    np.testing.assert_allclose(mean.interval, np.array(slopes[1].interval) * 2.5)


def test_a_ground_truth_stands_for_its_masks_and_outcomes(tmp_path):
    effect, masks, outcomes = problem()
    truth = GroundTruth.of_masks(tmp_path / "truth", masks, 3, retrainings=4)
    cells = {tuple(np.flatnonzero(mask)): row for mask, row in zip(masks, outcomes, strict=True)}
    truth.fill(lambda kept, seed: cells[tuple(kept)][seed // 1_000_003], progress=False)
    one, other = lds(effect, truth), lds(effect, masks, outcomes)
    assert (one.value, one.interval, one.ceiling, one.draws) == (
        other.value,
        other.interval,
        other.ceiling,
        other.draws,
    )
    assert calibration(effect, truth).slope == other.calibration.slope
    assert noise_ceiling(truth) == noise_ceiling(outcomes)
    with pytest.raises(TypeError, match="its own outcomes"):
        lds(effect, truth, outcomes)


def test_unpaired_results_are_refused():
    effect, masks, outcomes = problem()
    other = problem(seed=4)
    with pytest.raises(MismatchError, match="not paired"):
        compare(lds(effect, masks, outcomes), lds(*other))
    with pytest.raises(MismatchError, match="not paired"):
        mean_lds([lds(effect, masks, outcomes, seed=0), lds(effect, masks, outcomes, seed=1)])
    with pytest.raises(ValueError, match="at least one"):
        mean_lds([])


@pytest.mark.parametrize("r", [2, 3, 4, 5])
def test_noise_ceiling_equals_its_naive_twin(r):
    _, _, outcomes = problem(r=r, noise=3.0)
    half, correlations = r // 2, []
    for left in itertools.combinations(range(r), half):
        for right in itertools.combinations(set(range(r)) - set(left), half):
            for q in range(outcomes.shape[2]):
                a, b = (outcomes[:, list(side), q].mean(1) for side in (left, right))
                correlations.append(scipy.stats.spearmanr(a, b).statistic)
    one = np.mean(correlations)  # of half means; every pair of halves counted twice
    factor = r / half
    expected = factor * one / (1 + (factor - 1) * one)
    reliability, ceiling = noise_ceiling(outcomes)
    assert reliability == pytest.approx(expected)
    assert ceiling == pytest.approx(np.sqrt(expected))


def test_noise_ceiling_is_what_the_true_effect_reaches():
    """Normal signal and noise of equal variance: r = (2/π·3) asin(ρ/2) for Spearman; ρ_half = 1.5/2.5."""
    rng = np.random.default_rng(0)
    m, r = 3000, 3
    signal = rng.normal(size=(m, 1, 4))
    outcomes = signal + rng.normal(size=(m, r, 4))
    reliability, ceiling = noise_ceiling(outcomes)
    one = 6 / np.pi * np.arcsin(1 / 2 / 2)  # halves of one retraining each: ρ = 1/2
    expected = 3 * one / (1 + 2 * one)
    assert reliability == pytest.approx(expected, abs=0.02)  # 5σ: dρ ≈ 1/√(m·4) each
    reached = np.mean([scipy.stats.spearmanr(signal[:, 0, q], outcomes.mean(1)[:, q]).statistic for q in range(4)])
    assert ceiling == pytest.approx(reached, abs=0.03)  # Spearman-Brown is exact for Pearson only


def test_many_retrainings_use_random_splits():
    _, _, outcomes = problem(r=9, noise=2.0)
    first, again = noise_ceiling(outcomes, seed=1), noise_ceiling(outcomes, seed=1)
    assert first == again
    assert first[0] == pytest.approx(noise_ceiling(outcomes, seed=2)[0], abs=0.1)


def test_pure_noise_has_a_low_ceiling_and_never_a_complex_one():
    outcomes = np.random.default_rng(3).normal(size=(12, 2, 1))
    outcomes[:, 1] = -outcomes[:, 0]
    assert noise_ceiling(outcomes) == (0.0, 0.0)


def bad(**changes):
    effect, masks, outcomes = problem()
    return {"scores": effect, "truth": masks, "outcomes": outcomes, **changes}


def with_nan(values):
    values = values.copy()
    values.flat[7] = np.nan
    return values


EFFECT, MASKS, OUTCOMES = problem()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"truth": MASKS.astype(int)}, TypeError, "boolean"),
        ({"truth": MASKS[0]}, ValueError, r"shape \(subsets, examples\)"),
        ({"truth": MASKS[:0], "outcomes": OUTCOMES[:0]}, ValueError, "shape"),
        ({"truth": MASKS[:2], "outcomes": OUTCOMES[:2]}, ValueError, "at least 3"),
        ({"truth": MASKS[:-1]}, MismatchError, "19 subsets but outcomes 20"),
        ({"outcomes": OUTCOMES[:, :, :, None]}, ValueError, "outcomes must have shape"),
        ({"outcomes": with_nan(OUTCOMES)}, ValueError, r"\(0, 2, 1\)"),
        ({"outcomes": np.ones_like(OUTCOMES)}, ValueError, "same on every subset"),
        ({"scores": EFFECT[:, :-1]}, MismatchError, "29 training examples but masks 30"),
        ({"scores": EFFECT[:-1]}, MismatchError, "2 queries but outcomes 3"),
        ({"scores": EFFECT[0]}, ValueError, r"\(queries, examples\)"),
        ({"scores": with_nan(EFFECT)}, ValueError, r"\(0, 7\)"),
        ({"scores": np.zeros_like(EFFECT)}, ValueError, r"queries \[0, 1, 2\]"),
        ({"scores": np.full_like(EFFECT, 0.1)}, ValueError, "same value for every subset"),
        ({"bootstrap": -1}, ValueError, "-1"),
        ({"outcomes": None}, TypeError, "give both, or one GroundTruth"),
    ],
)
def test_degenerate_input_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        lds(**bad(**changes))


@pytest.mark.parametrize("outcomes", [OUTCOMES[:, 0], OUTCOMES[:, :1], OUTCOMES[:2], with_nan(OUTCOMES)])
def test_noise_ceiling_refuses(outcomes):
    with pytest.raises(ValueError, match="outcomes"):
        noise_ceiling(outcomes)


@given(low=st.floats(), high=st.floats())
def test_a_difference_is_significant_if_its_interval_lies_on_one_side(low, high):
    """NaNs, of no bootstrap, lie on none."""
    assert Difference(1.0, (low, high)).significant == (low > 0 or high < 0)


def test_without_a_bootstrap_nothing_is_significant():
    masks, rng = half_subsets(20, 12), np.random.default_rng(0)
    effect, unrelated = rng.normal(size=(2, 3, 20))
    results = [lds(scores, masks, masks @ effect.T, bootstrap=0) for scores in (effect, unrelated)]
    assert not any(compare(first, second).significant for first, second in itertools.product(results, repeat=2))
