import numpy as np
import pytest

from source_proj._errors import MismatchError
from source_proj.evaluate import Candidate, calibration, compare, compare_methods, half_subsets, lds, mean_lds


@pytest.fixture
def truth():
    """Effects of 32 examples on 6 queries, noise of that size, and outcomes of 30 half-subsets."""
    rng = np.random.default_rng(0)
    effect, noise = rng.normal(size=(2, 6, 32))
    masks = half_subsets(32, 30)
    return effect, noise, masks, (masks @ effect.T)[:, None, :] + 0.1 * rng.normal(size=(30, 2, 6))


def fixed(method, setting, *runs, **rest):
    return Candidate(method, setting, lambda: list(runs), **rest)


def test_no_query_has_a_say_in_its_own_setting(truth):
    """One setting is right for even queries, the other for odd ones: each half must get the other half's pick."""
    effect, noise, masks, outcomes = truth
    even = np.arange(6)[:, None] % 2 == 0
    first, second = np.where(even, effect, noise), np.where(even, noise, effect)
    found = compare_methods(
        [fixed("best", "only", effect), fixed("rival", "even", first), fixed("rival", "odd", second)],
        masks, outcomes, progress=False,
    )  # fmt: skip
    best, rival = found.results
    assert best.single.value > 0.9
    assert rival.setting == "odd / even"  # for even queries, then for odd ones
    assert rival.single.value == pytest.approx(lds(noise, masks, outcomes, bootstrap=0).value)
    assert rival.single_behind.value == best.single.value - rival.single.value


def test_single_is_the_mean_over_runs_and_multiple_the_lds_of_the_mean(truth):
    effect, noise, masks, outcomes = truth
    runs = [(effect + noise).astype(np.float32), (effect - 0.5 * noise).astype(np.float32)]
    result = compare_methods([fixed("both", "", *runs)], masks, outcomes, progress=False)["both"]
    own = [lds(one, masks, outcomes) for one in runs]
    assert result.single.value == pytest.approx(mean_lds(own).value)
    assert result.spread == pytest.approx(np.std([one.value for one in own]))
    together = np.mean(runs, axis=0)
    assert result.multiple.value == pytest.approx(lds(together, masks, outcomes).value)
    assert result.slope.slope == pytest.approx(calibration(together, masks, outcomes).slope)
    np.testing.assert_allclose(result.scores, together)


def test_a_methods_own_ensembling_is_used(truth):
    effect, noise, masks, outcomes = truth
    rival = fixed("rival", "", noise, noise, ensemble=lambda: effect, calibrated=False)
    result = compare_methods([rival], masks, outcomes, progress=False)["rival"]
    assert result.multiple.value == pytest.approx(lds(effect, masks, outcomes).value, abs=1e-3)
    assert result.slope is None


def test_differences_are_paired_and_to_the_first(truth):
    effect, noise, masks, outcomes = truth
    found = compare_methods(
        [fixed("first", "", effect, effect), fixed("second", "", noise, noise)], masks, outcomes, progress=False
    )
    expected = compare(lds(effect.astype(np.float32), masks, outcomes), lds(noise.astype(np.float32), masks, outcomes))
    assert found["second"].single_behind == expected
    assert found["first"].single_behind.value == 0


def test_table_has_a_row_for_each_method_and_number_of_runs(truth):
    pytest.importorskip("pandas")
    effect, noise, masks, outcomes = truth
    candidates = [fixed("one", "a", effect), fixed("two", "b", noise)]
    table = compare_methods(candidates, masks, outcomes, progress=False).table()
    assert table[["method", "runs", "setting"]].to_numpy().tolist() == [["one", "single", "a"], ["two", "single", "b"]]
    assert table["diff"].tolist() == [0.0, table["lds"][0] - table["lds"][1]]
    doubled = [fixed("one", "a", effect, effect), fixed("two", "b", noise, noise)]
    table = compare_methods(doubled, masks, outcomes, progress=False).table()
    assert table["runs"].tolist() == ["single", "multiple"] * 2
    assert (table["low"] <= table["lds"]).all()
    assert (table["lds"] <= table["high"]).all()


def test_bad_candidates_are_refused(truth):
    effect, _, masks, outcomes = truth
    with pytest.raises(ValueError, match="different pairs of method and setting"):
        compare_methods([fixed("one", "a", effect)] * 2, masks, outcomes, progress=False)
    with pytest.raises(ValueError, match="at least one"):
        compare_methods([], masks, outcomes, progress=False)
    with pytest.raises(MismatchError, match="training examples"):
        compare_methods([fixed("one", "a", effect[:, :5])], masks, outcomes, progress=False)
    with pytest.raises(KeyError, match="no method 'three'"):
        compare_methods([fixed("one", "a", effect)], masks, outcomes, progress=False)["three"]


@pytest.mark.parametrize("place", [0, 1])
def test_one_query_has_no_other_to_choose_a_setting_on(truth, place):
    effect, noise, masks, outcomes = truth
    own, rivals = outcomes[:, :, :1], [fixed("rival", "bad", noise[:1]), fixed("rival", "good", effect[:1])]
    with pytest.raises(ValueError, match=r"best setting of 'rival' .* one query: give at least two"):
        compare_methods([fixed("first", "", effect[:1]), rivals[place], rivals[1 - place]], masks, own, progress=False)
    alone = compare_methods([fixed("first", "", effect[:1]), rivals[1]], masks, own, progress=False)
    assert alone["rival"].single.value == pytest.approx(alone["first"].single.value)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_a_candidate_whose_scores_are_not_finite_is_named(truth, place, value):
    effect, noise, masks, outcomes = truth
    broken = noise.copy()
    broken[3, 5] = value
    candidates = [fixed("rival", "good", effect)]
    candidates.insert(place, fixed("rival", "broken", broken))
    with pytest.raises(ValueError, match=r"'rival', 'broken' has 1 scores that are not finite .*\(3, 5\)"):
        compare_methods(candidates, masks, outcomes, progress=False)
    together = fixed("rival", "good", effect, effect, ensemble=lambda: broken)
    with pytest.raises(ValueError, match=r"'rival', 'good' has 1 scores that are not finite"):
        compare_methods([together], masks, outcomes, progress=False)


@pytest.mark.parametrize("place", [0, 1])
def test_a_candidate_of_no_runs_or_fewer_is_named(truth, place):
    effect, noise, masks, outcomes = truth
    for runs in ((), (noise,)):
        candidates = [fixed("rival", "good", effect, effect)]
        candidates.insert(place, fixed("rival", "short", *runs))
        with pytest.raises(ValueError, match=r"'rival', '(short|good)' has scores of \d runs"):
            compare_methods(candidates, masks, outcomes, progress=False)
