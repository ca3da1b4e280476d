import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from source_proj._errors import MismatchError, SourceProjError
from source_proj.evaluate import compare_removal, random_same_class, subset_removal

rng = np.random.default_rng(0)
EFFECT = np.round(rng.normal(size=(6, 20)), 2)
THRESHOLD = EFFECT.sum(1) - 3  # the prediction flips once 3 units of support are gone
SIZES = [1, 2, 4, 8, 16]


def train(kept, seed):
    """A world in which support is additive: predict 1 while enough of it is left."""
    return (EFFECT[:, kept].sum(1) > THRESHOLD).astype(int)


def removal(scores=EFFECT, baseline=(1,) * 6, trained=train, sizes=SIZES, **choices):
    return subset_removal(scores, baseline, trained, sizes, progress=False, **choices)


def naive(scores, size, q):
    helpful = sorted((z for z in range(20) if scores[q, z] > 0), key=lambda z: -scores[q, z])[:size]
    kept = np.array([z for z in range(20) if z not in helpful])
    return len(helpful), train(kept, 0)[q] != 1


def test_equals_its_naive_twin():
    result = removal()
    for q in range(6):
        for s, size in enumerate(SIZES):
            removed, flipped = naive(EFFECT, size, q)
            assert result.removed[q, s] == removed
            assert result.flipped[q, s] == flipped
    np.testing.assert_array_equal(result.counts, result.flipped.sum(0))
    np.testing.assert_array_equal(result.fraction, result.flipped.mean(0))
    first = [SIZES[row.argmax()] if row.any() else -1 for row in result.flipped > 0.5]
    np.testing.assert_array_equal(result.smallest, first)
    assert 0 < result.counts[1] < result.counts[3]  # the example is not trivial
    assert "at 16" in str(result)


def test_unhelpful_order_flips_later():
    good = removal(sizes=[3])
    poor = removal(np.abs(EFFECT.max() - EFFECT) + 0.1, sizes=[3])
    assert good.counts > poor.counts == 0


def test_lower_is_better_reverses_the_sign():
    class Losses(np.ndarray):
        higher_is_better = False

    plain = removal()
    for other in (removal(-EFFECT, higher_is_better=False), removal((-EFFECT).view(Losses))):
        np.testing.assert_array_equal(other.flipped, plain.flipped)
        np.testing.assert_array_equal(other.removed, plain.removed)


def test_retrainings_vote():
    votes = np.array([[0, 0], [0, 1], [1, 1]])  # of three seeds
    result = removal(
        EFFECT[:2], [1, 1], lambda kept, seed: votes[seed // 1_000_003], [1], retrainings=3, bootstrap=0
    )  # fmt: skip
    np.testing.assert_allclose(result.flipped[:, 0], [2 / 3, 1 / 3])
    assert result.counts.tolist() == [1]
    assert result.smallest.tolist() == [1, -1]
    assert np.isnan(result.interval).all()
    assert str(result) == "fraction of 2 queries flipped: 0.50 at 1"


def test_only_correctly_predicted_queries_are_asked_about():
    correct = np.array([True, False, True, True, False, True])
    base = np.where(correct, 1, 0)
    some, every = removal(baseline=base, correct=correct), removal()
    assert some.queries.tolist() == [0, 2, 3, 5]
    np.testing.assert_array_equal(some.flipped, every.flipped[correct])
    np.testing.assert_array_equal(some.removed, every.removed[correct])
    np.testing.assert_array_equal(some.fraction, every.flipped[correct].mean(0))


@pytest.mark.parametrize("choice", [{"group": 1}, {"group": 4}])
def test_groups_change_nothing(choice):
    def together(kept, seeds):
        return [train(*pair) for pair in zip(kept, seeds, strict=True)]

    np.testing.assert_array_equal(removal(trained=together, **choice).flipped, removal().flipped)


def test_equal_removals_are_trained_once():
    trained = []
    scores = np.zeros((3, 20))
    scores[:, 4], scores[:, 7], scores[2, 1] = 3, 2, 1  # three sets in all: {4}, {4, 7} and {4, 7, 1}
    result = removal(
        scores, (1, 1, 1), lambda kept, seed: trained.append(tuple(kept)) or np.ones(3), [1, 2, 3, 5], retrainings=2
    )
    assert len(trained) == 2 * len(set(trained)) == 2 * 3
    assert result.removed.tolist() == [[1, 2, 2, 2], [1, 2, 2, 2], [1, 2, 3, 3]]


def test_interval_equals_resampling_with_the_same_draws():
    result = removal(bootstrap=200, seed=4)
    draws = np.random.default_rng(4).multinomial(6, np.full(6, 1 / 6), size=200)
    fractions = [result.flipped[np.repeat(np.arange(6), draw)].mean(0) for draw in draws]
    np.testing.assert_allclose(result.interval, np.quantile(fractions, [0.025, 0.975], axis=0).T)


def test_two_methods_are_compared_on_the_same_queries():
    good, poor = removal(), removal(np.abs(EFFECT.max() - EFFECT) + 0.1)
    difference = compare_removal(good, poor)
    np.testing.assert_allclose(difference.value, good.fraction - poor.fraction)
    expected = np.quantile(good.replicates - poor.replicates, [0.025, 0.975], axis=0).T
    np.testing.assert_allclose(difference.interval, expected)
    np.testing.assert_array_equal(difference.significant, (expected[:, 0] > 0) | (expected[:, 1] < 0))
    assert difference.significant.any()
    assert not compare_removal(good, good).significant.any()


@pytest.mark.parametrize("choice", [{"sizes": [1, 2]}, {"seed": 1}, {"correct": np.arange(6) > 0}, {"bootstrap": 9}])
def test_unpaired_removals_are_refused(choice):
    with pytest.raises(MismatchError, match="not paired"):
        compare_removal(removal(), removal(**choice))


def test_random_order_of_the_same_class():
    known, asked = np.array([0, 1, 1, 0, 2, 1]), np.array([1, 0, 1, 2])
    scores = random_same_class(known, asked, seed=3)
    np.testing.assert_array_equal(scores > 0, asked[:, None] == known)
    np.testing.assert_array_equal(scores, random_same_class(known, asked, seed=3))
    same = random_same_class(np.zeros(40, int), np.zeros(200, int))
    assert len({tuple(row) for row in np.argsort(same, axis=1)}) == 200  # each query has an order of its own
    first = np.bincount(same.argmax(1), minlength=40)
    assert first.max() <= 5 + 5 * np.sqrt(5)  # no example is preferred: 5 expected each, 5σ
    with pytest.raises(ValueError, match="query 1 is of class 7"):
        random_same_class(known, [0, 7])
    with pytest.raises(ValueError, match="vectors"):
        random_same_class([known], asked)


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    program = textwrap.dedent(
        """
        import os, signal, sys
        import numpy as np
        from source_proj.evaluate import subset_removal
        calls = []
        def train(kept, seed):
            calls.append(seed)
            if len(calls) == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return np.full(3, len(kept) % 2)
        scores = np.random.default_rng(0).normal(size=(3, 12))
        subset_removal(scores, [1, 0, 1], train, [1, 2, 4], path=sys.argv[1], settings={"epochs": 2})
        """
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "kept"], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    scores, calls = np.random.default_rng(0).normal(size=(3, 12)), []

    def counted(kept, seed):
        calls.append(seed)
        return np.full(3, len(kept) % 2)

    arguments = (scores, [1, 0, 1], counted, [1, 2, 4])
    resumed = subset_removal(*arguments, path=tmp_path / "kept", settings={"epochs": 2})
    assert len(calls) == 9 - 4
    np.testing.assert_array_equal(resumed.flipped, subset_removal(*arguments).flipped)
    calls.clear()
    subset_removal(*arguments, path=tmp_path / "kept", settings={"epochs": 2})
    assert calls == []
    with pytest.raises(MismatchError, match="epochs"):
        subset_removal(*arguments, path=tmp_path / "kept", settings={"epochs": 3})
    with pytest.raises(MismatchError, match="other subsets"):
        subset_removal(-scores, *arguments[1:], path=tmp_path / "kept", settings={"epochs": 2})
    with pytest.raises(SourceProjError, match="no ground truth"):
        subset_removal(*arguments, path=tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"scores": EFFECT[0]}, ValueError, "shape"),
        ({"scores": np.zeros((0, 3)), "baseline": np.ones(0)}, ValueError, "shape"),
        ({"scores": np.where(EFFECT > 1, np.nan, EFFECT)}, ValueError, "not finite"),
        ({"baseline": np.ones(5)}, MismatchError, r"\(6,\)"),
        ({"baseline": list("abcdef")}, TypeError, "numbers of classes"),
        ({"sizes": []}, ValueError, "increasing"),
        ({"sizes": [2, 1]}, ValueError, "increasing"),
        ({"sizes": np.array([2, 1], np.uint8)}, ValueError, "increasing"),
        ({"baseline": [1, 1, np.nan, 1, 1, 1]}, ValueError, "no class for 1 queries, the first at place 2"),
        ({"sizes": [0, 1]}, ValueError, "increasing"),
        ({"sizes": [0.5]}, ValueError, "whole"),
        ({"sizes": [20]}, ValueError, "1 to 19"),
        ({"correct": np.ones(6)}, TypeError, "boolean"),
        ({"correct": np.ones(5, bool)}, MismatchError, r"\(6,\)"),
        ({"correct": np.zeros(6, bool)}, ValueError, "none of them"),
        ({"trained": lambda kept, seed: np.ones(3)}, MismatchError, r"shape \(3,\) for 1 model\(s\) and 6 queries"),
        ({"bootstrap": -1}, ValueError, "-1"),
    ],
)
def test_degenerate_input_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        removal(**changes)
