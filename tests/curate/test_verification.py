"""Retraining with and without the examples: the numbers are those of the user's own functions."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from source_proj.curate import Cleaning, verify
from source_proj.curate.verification import interval

N = 10


def cleaning_of(dropped):
    return Cleaning("test", list(dropped), ["r"] * len(dropped), {}, list(range(N)))


@given(
    st.sets(st.integers(0, N - 1), max_size=N - 1), st.lists(st.integers(0, 99), unique=True, min_size=2, max_size=20)
)
def test_three_models_a_seed_are_measured_and_paired(dropped, seeds):
    calls = []

    def train(kept, seed):
        calls.append((tuple(kept), seed))
        return float(np.random.default_rng([seed, *kept]).normal())

    judged = verify(cleaning_of(sorted(dropped)), train, float, seeds=seeds, progress=False)
    kept = tuple(sorted(set(range(N)) - dropped))
    wholes, cleaned, random = calls[::3], calls[1::3], calls[2::3]
    assert wholes == [(tuple(range(N)), seed) for seed in seeds]
    assert cleaned == [(kept, seed) for seed in seeds]
    assert all(len(set(drawn)) == len(kept) and drawn == tuple(sorted(drawn)) for drawn, _ in random)
    assert judged.whole.tolist() == [train(*call) for call in wholes]
    assert judged.gain == interval(judged.cleaned - judged.whole)
    assert judged.gain_over_random == interval(judged.cleaned - judged.random)


def test_progress_is_told_model_by_model():
    told = []
    verify(cleaning_of([0]), lambda kept, seed: 0.0, float, seeds=[3, 5], progress=lambda *step: told.append(step))
    assert told == [("verify", done, 6) for done in range(1, 7)]


@pytest.mark.parametrize("count", [*range(3, 40), 100, 1000])
def test_the_interval_is_students(count):
    values = np.random.default_rng(count).normal(size=count)
    mean, low, high = interval(values)
    assert mean == pytest.approx(values.mean())
    half = scipy.stats.t.ppf(0.975, count - 1) * scipy.stats.sem(values)
    assert [mean - low, high - mean] == pytest.approx([half, half], rel=1e-3)


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        (1.0, "better than training on all examples"),
        (-1.0, "worse than training"),
        (0.0, "not to be told apart from training"),
    ],
)
def test_the_verdict_follows_the_interval(gain, words):
    noise = lambda seed: 0.01 * (seed % 3)  # noqa: E731
    train = lambda kept, seed: gain * (0 not in kept) + noise(seed + (gain == 0) * len(kept))  # noqa: E731
    judged = verify(cleaning_of([0]), train, float, seeds=range(6), progress=False)
    assert words in judged.verdict
    assert str(judged).endswith(judged.verdict)
    assert list(judged.to_pandas().columns) == ["seed", "whole", "cleaned", "random"]


@pytest.mark.parametrize(("seeds", "words"), [([3], "1 seed"), ([3, 5], "2 seeds")])
def test_too_few_seeds_say_nothing_of_chance(seeds, words):
    """Also where both differences are equal, whose spread would be 0."""
    judged = verify(cleaning_of([0]), lambda kept, seed: 1.0 - (0 in kept), float, seeds=seeds, progress=False)
    assert judged.gain.mean == 1
    assert np.isnan(judged.gain.low)
    assert judged.verdict == f"no verdict from {words}: 3 would do, and 5 are better"
    assert "nan" not in str(judged)


def test_a_number_of_seeds_is_their_range():
    train = lambda kept, seed: float(seed)  # noqa: E731
    assert verify(cleaning_of([0]), train, float, seeds=4, progress=False).seeds == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("name", "functions"),
    [
        ("train", (lambda kept: 0.0, float)),
        ("train", ("mine:train", float)),
        ("evaluate", (lambda kept, seed: 0.0, lambda: 1.0)),
        ("evaluate", (lambda kept, seed: 0.0, lambda model, data: 1.0)),
    ],
)
def test_functions_that_cannot_be_called_are_refused_before_training(name, functions):
    with pytest.raises(TypeError, match=rf"^{name} (is called as|must be a function) {name}\("):
        verify(cleaning_of([0]), *functions, seeds=3)


def test_what_cannot_be_judged_is_refused():
    train = lambda kept, seed: 0.0  # noqa: E731
    for seeds in ([], [1, 1]):
        with pytest.raises(ValueError, match="at least one seed, and none twice"):
            verify(cleaning_of([0]), train, float, seeds=seeds)
    with pytest.raises(ValueError, match="keeps none of 10"):
        verify(cleaning_of(range(N)), train, float)
    with pytest.raises(ValueError, match="evaluate gave nan for seed 0"):
        verify(cleaning_of([0]), train, lambda model: float("nan"))
