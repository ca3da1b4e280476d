import numpy as np
import pytest

from source_proj.errors import MismatchError
from source_proj.evaluate import subset_removal

rng = np.random.default_rng(0)
EFFECT = np.round(rng.normal(size=(6, 20)), 2)
THRESHOLD = EFFECT.sum(1) - 3  # the prediction flips once 3 units of support are gone


def train(kept, queries):
    """A world in which support is additive: predict 1 while enough of it is left."""
    return np.array([int(EFFECT[q, k].sum() > THRESHOLD[q]) for k, q in zip(kept, queries, strict=True)])


def naive(scores, size, q):
    helpful = sorted((z for z in range(20) if scores[q, z] > 0), key=lambda z: -scores[q, z])[:size]
    kept = np.array([z for z in range(20) if z not in helpful])
    return len(helpful), train([kept], [q])[0] != 1


def test_equals_its_naive_twin():
    result = subset_removal(EFFECT, np.ones(6), train, [1, 2, 4, 8, 16])
    for q in range(6):
        for s, size in enumerate([1, 2, 4, 8, 16]):
            removed, flipped = naive(EFFECT, size, q)
            assert result.removed[q, s] == removed
            assert result.flipped[q, s] == flipped
    np.testing.assert_array_equal(result.counts, result.flipped.sum(0))
    first = [[1, 2, 4, 8, 16][row.argmax()] if row.any() else -1 for row in result.flipped > 0.5]
    np.testing.assert_array_equal(result.smallest, first)
    assert 0 < result.counts[1] < result.counts[3]  # the example is not trivial


def test_unhelpful_order_flips_later():
    good = subset_removal(EFFECT, np.ones(6), train, [3]).counts
    poor = subset_removal(np.abs(EFFECT.max() - EFFECT) + 0.1, np.ones(6), train, [3]).counts
    assert good > poor == 0


def test_lower_is_better_reverses_the_sign():
    class Losses(np.ndarray):
        higher_is_better = False

    plain = subset_removal(EFFECT, np.ones(6), train, [2, 4])
    reversed_scores = (-EFFECT).view(Losses)
    for other in (
        subset_removal(-EFFECT, np.ones(6), train, [2, 4], higher_is_better=False),
        subset_removal(reversed_scores, np.ones(6), train, [2, 4]),
    ):
        np.testing.assert_array_equal(other.flipped, plain.flipped)
        np.testing.assert_array_equal(other.removed, plain.removed)


def test_retrainings_vote():
    votes = np.array([[0, 0, 1], [0, 1, 1]])
    result = subset_removal(EFFECT[:2], [1, 1], lambda kept, queries: votes, [1])
    np.testing.assert_allclose(result.flipped[:, 0], [2 / 3, 1 / 3])
    assert result.counts.tolist() == [1]
    assert result.smallest.tolist() == [1, -1]


@pytest.mark.parametrize(
    ("scores", "baseline", "sizes", "error", "message"),
    [
        (EFFECT[0], np.ones(6), [1], ValueError, "shape"),
        (np.zeros((0, 3)), np.ones(0), [1], ValueError, "shape"),
        (np.where(EFFECT > 1, np.nan, EFFECT), np.ones(6), [1], ValueError, "not finite"),
        (EFFECT, np.ones(5), [1], MismatchError, r"\(6,\)"),
        (EFFECT, np.ones(6), [], ValueError, "increasing"),
        (EFFECT, np.ones(6), [2, 1], ValueError, "increasing"),
        (EFFECT, np.ones(6), [0, 1], ValueError, "increasing"),
        (EFFECT, np.ones(6), [0.5], ValueError, "whole"),
        (EFFECT, np.ones(6), [20], ValueError, "1 to 19"),
    ],
)
def test_degenerate_input_is_refused(scores, baseline, sizes, error, message):
    with pytest.raises(error, match=message):
        subset_removal(scores, baseline, train, sizes)


def test_a_train_function_of_the_wrong_shape_is_refused():
    with pytest.raises(MismatchError, match=r"\(12,\)"):
        subset_removal(EFFECT, np.ones(6), lambda kept, queries: np.ones(3), [1, 2])
