import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from source_proj._errors import MismatchError
from source_proj.evaluate import mislabel


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_auc_equals_sklearn_and_the_naive_count(seed, tied):
    rng = np.random.default_rng(seed)
    suspicion, noisy = rng.normal(size=25), rng.random(25) < 0.4
    noisy[:2] = [True, False]
    suspicion = np.round(suspicion) if tied else suspicion
    auc = mislabel(suspicion, noisy).auc
    pairs = [(a > b) + (a == b) / 2 for a in suspicion[noisy] for b in suspicion[~noisy]]
    assert auc == pytest.approx(np.mean(pairs))
    assert auc == pytest.approx(roc_auc_score(noisy, suspicion))


def test_curve_counts_what_is_found():
    rng = np.random.default_rng(0)
    suspicion, noisy = rng.permutation(40).astype(float), rng.random(40) < 0.3
    result = mislabel(suspicion, noisy)
    for i in range(41):
        top = sorted(range(40), key=lambda z: -suspicion[z])[:i]
        assert result.found[i] == pytest.approx(sum(noisy[z] for z in top) / noisy.sum())
    assert result.found_at(0.25) == result.found[10]
    assert (np.diff(suspicion[result.order]) < 0).all()


def test_ties_give_the_expected_curve_whatever_the_order():
    noisy = np.array([True, True, False, False])
    np.testing.assert_allclose(mislabel(np.zeros(4), noisy).found, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(mislabel(np.zeros(4), noisy[::-1]).found, [0, 0.25, 0.5, 0.75, 1])
    assert mislabel(np.zeros(4), noisy).auc == 0.5


@pytest.mark.parametrize(
    ("suspicion", "noisy", "error", "message"),
    [
        ([1.0, 2.0], [1, 0], TypeError, "boolean"),
        ([[1.0, 2.0]], [True, False], ValueError, "vectors"),
        ([1.0, 2.0, 3.0], [True, False], MismatchError, "3 values"),
        ([1.0, np.nan], [True, False], ValueError, "index 1"),
        ([1.0, 2.0], [True, True], ValueError, "2 noisy, 0 clean"),
        ([1.0, 2.0], [False, False], ValueError, "0 noisy, 2 clean"),
        ([], np.zeros(0, bool), ValueError, "0 noisy"),
    ],
)
def test_degenerate_input_is_refused(suspicion, noisy, error, message):
    with pytest.raises(error, match=message):
        mislabel(suspicion, noisy)


def test_found_at_refuses_a_percentage():
    with pytest.raises(ValueError, match="25"):
        mislabel([1.0, 2.0], [True, False]).found_at(25)
