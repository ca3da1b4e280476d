"""Numbers of any library are numbers: tensors with gradients and half precision, NumPy's integers; 2.0 is no count."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from source_proj import Scores
from source_proj._io.numbers import plain_numbers, whole_number
from source_proj.attribution.methods import empirical_influence
from source_proj.evaluate import (
    Candidate,
    GroundTruth,
    calibration,
    compare_methods,
    half_subsets,
    lds,
    leave_one_out,
    mislabel,
    noise_ceiling,
    random_same_class,
    retrain,
    subset_removal,
)
from source_proj.evaluate._counterfactual import bootstrap_weights

RNG = np.random.default_rng(0)
SCORES = RNG.integers(-8, 8, size=(3, 10)).astype(np.float32)  # half precision holds them
MASKS = half_subsets(10, 6)
OUTCOMES = RNG.integers(-8, 8, size=(6, 2, 3)).astype(np.float32)
ALONE = np.vstack([np.ones(10, bool), ~np.eye(10, dtype=bool)])
OUTCOMES_ALONE = RNG.integers(-8, 8, size=(11, 2, 3)).astype(np.float32)

TENSORS = {
    "with a gradient": lambda value: torch.tensor(value, requires_grad=True) * 1,
    "half": lambda value: torch.tensor(value).bfloat16().requires_grad_(),
    "double": lambda value: torch.tensor(value).double(),
    "in a list": lambda value: [torch.tensor(row, requires_grad=True) for row in value],
    "in lists": lambda value: [[torch.tensor(v, requires_grad=True) for v in row] for row in np.asarray(value)],
    "conjugated": lambda value: torch.complex(torch.zeros(np.shape(value)), torch.tensor(value)).conj().imag.neg(),
}
JUDGES = {
    "lds": lambda scores, outcomes: lds(scores, MASKS, outcomes).value,
    "calibration": lambda scores, outcomes: calibration(scores, MASKS, outcomes).slope,
    "noise": lambda _, outcomes: noise_ceiling(outcomes)[0],
    "comparison": lambda scores, outcomes: (
        (compare_methods([Candidate("a", "", lambda: [scores])], torch.tensor(MASKS), outcomes, progress=False))[
            "a"
        ].single.value
    ),
}


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_are_judged_as_their_numbers(judge, kind):
    expected = JUDGES[judge](SCORES, OUTCOMES)
    assert JUDGES[judge](TENSORS[kind](SCORES), OUTCOMES) == expected
    assert JUDGES[judge](SCORES, TENSORS["half"](OUTCOMES)) == expected


@pytest.mark.parametrize("kind", TENSORS)
def test_other_judges_take_them_too(kind):
    made, labels = TENSORS[kind], torch.arange(10) % 2
    assert (
        leave_one_out(made(SCORES), ALONE, OUTCOMES_ALONE).value == leave_one_out(SCORES, ALONE, OUTCOMES_ALONE).value
    )
    noisy = labels.bool()
    if kind != "in lists":
        assert mislabel(made(SCORES[0]), noisy).auc == mislabel(SCORES[0], noisy.numpy()).auc
    predicted = subset_removal(made(SCORES), torch.ones(3), lambda kept, seed: torch.tensor(kept[:3]).float(), [1, 2])
    assert predicted.flipped.shape == (3, 2)
    assert random_same_class(labels, labels[:2]).shape == (2, 10)


@pytest.mark.parametrize("kind", TENSORS)
def test_scores_and_what_makes_them_of_retrainings_take_them_too(kind):
    made, ids = TENSORS[kind], torch.arange(10, device="cpu", dtype=torch.int64)
    scores = Scores(made(SCORES), np.arange(3), ids, unit="u")
    np.testing.assert_array_equal(scores.top_k(10).scores, -np.sort(-SCORES, axis=1))
    for subset in ([4, 2], ids[[4, 2]], np.array([4, 2]), list(ids[[4, 2]])):
        np.testing.assert_allclose(scores.predict_removal(subset).values, -SCORES[:, [4, 2]].sum(axis=1))
    expected = empirical_influence(MASKS, OUTCOMES).values
    given_masks = torch.tensor(MASKS, device="cpu", dtype=torch.bool)
    np.testing.assert_array_equal(empirical_influence(given_masks, made(OUTCOMES)).values, expected)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=5))
def test_plain_numbers_are_the_same_numbers(values):
    for tensor in (torch.tensor(values), torch.tensor(values).bfloat16(), torch.tensor(values).half()):
        got = np.asarray(plain_numbers([tensor.requires_grad_(), list(tensor)]), dtype=np.float64)
        assert got.tolist() == [tensor.tolist()] * 2


@pytest.mark.parametrize("group", [None, 2])
@pytest.mark.parametrize("kind", TENSORS)
def test_what_training_returns_is_kept_whatever_tensor_it_is(tmp_path, kind, group):
    measured = {seed: np.float32(RNG.integers(-8, 8, size=3)) for seed in range(4)}

    def train(kept, seeds):
        one = TENSORS[kind](np.stack([measured[seed] for seed in ([seeds] if group is None else seeds)]))
        return one[0] if group is None else one

    truth = GroundTruth.subsets(tmp_path / "truth", 10, 3, count=4).fill(train, group=group, progress=False)
    assert truth.outcomes[:, 0].tolist() == [measured[seed].tolist() for seed in range(4)]


@pytest.mark.parametrize("returned", ["text", [object()] * 3, [[1.0], [1.0, 2.0], 3.0], {"a": 1.0}])
def test_what_holds_no_numbers_is_named(tmp_path, returned):
    truth = GroundTruth.subsets(tmp_path / "truth", 10, 3, count=4)
    with pytest.raises(ValueError, match=r"training on subset 0 with seed 0 returned what holds no measurements"):
        truth.fill(lambda kept, seed: returned, progress=False)
    assert len(truth.missing()) == 4


INTEGERS = [int, np.int64, np.uint8, np.array, torch.tensor]


@pytest.mark.parametrize("integer", INTEGERS)
def test_integers_of_any_library_are_counts(tmp_path, integer):
    options = {"count": integer(4), "retrainings": integer(2), "seed": integer(3), "settings": {"lr": np.float32(0.5)}}
    truth = GroundTruth.subsets(tmp_path / "truth", integer(10), integer(3), **options)
    again = GroundTruth.subsets(
        tmp_path / "truth", 10, 3, count=4, retrainings=2, seed=3, settings={"lr": 0.5}
    )  # the same store
    assert again.shape == truth.shape == (4, 2, 3)
    assert truth.seed == 3
    assert whole_number(integer(3), "n") == 3
    truth.fill(lambda kept, seeds: np.zeros((len(kept), 3)), group=integer(2), shard=(integer(0), integer(1)))
    assert truth.complete
    assert GroundTruth.leave_one_out(tmp_path / "alone", integer(10), integer(3), [2]).shape == (2, 1, 3)
    assert len(lds(SCORES, MASKS, OUTCOMES, bootstrap=integer(7)).replicates) == 7


@pytest.mark.parametrize("name", ["n", "n_queries", "count", "retrainings", "seed"])
@pytest.mark.parametrize("value", [2.0, "2", None, np.float64(2)])
def test_what_is_no_whole_number_is_refused_by_its_name(tmp_path, name, value):
    options = {"n": 10, "n_queries": 3, "count": 4, "retrainings": 1, "seed": 0, name: value}
    with pytest.raises(TypeError, match=rf"^{name} must be a whole number, got .*2|^{name} must .* got None"):
        GroundTruth.subsets(tmp_path / "truth", **options)
    assert list(tmp_path.iterdir()) == []


def test_other_counts_are_refused_by_name(tmp_path):
    truth = GroundTruth.subsets(tmp_path / "truth", 10, 3, count=4)
    with pytest.raises(TypeError, match=r"group must be a whole number, got 2\.0"):
        truth.fill(lambda kept, seed: [0.0] * 3, group=2.0)
    with pytest.raises(TypeError, match=r"shard must be a whole number, got 2\.0"):
        truth.fill(lambda kept, seed: [0.0] * 3, shard=(0, 2.0))
    with pytest.raises(TypeError, match=r"bootstrap must be a whole number, got 100\.0"):
        lds(SCORES, MASKS, OUTCOMES, bootstrap=100.0)
    inputs, targets = torch.zeros(4, 2), torch.zeros(4).long()
    for name in ("epochs", "batch_size", "group"):
        options = {"epochs": 1, "batch_size": 2, "lr": 0.1, "evaluate": lambda state: state["weight"], name: 2.0}
        with pytest.raises(TypeError, match=rf"{name} must be a whole number, got 2\.0"):
            retrain(lambda: torch.nn.Linear(2, 2), inputs, targets, [np.arange(4)], [0], **options)
    with pytest.raises(TypeError, match=r"settings must be .*of type object is none of these"):
        GroundTruth.subsets(tmp_path / "other", 10, 3, settings={"model": object()})


@pytest.mark.parametrize("train", [None, lambda kept: [0.0], "mine:train"])
def test_what_does_not_train_is_refused_before_any_training(tmp_path, train):
    truth = GroundTruth.subsets(tmp_path / "truth", 6, 2, count=3)
    with pytest.raises(TypeError, match=r"^train (is called as|must be a function) train\(kept, seed\)"):
        truth.fill(train, progress=False)


@pytest.mark.parametrize("call", [lambda: half_subsets(6, 3, seed=-1), lambda: bootstrap_weights(6, 3, -1)])
def test_a_seed_below_zero_is_named(call):
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        call()


@pytest.mark.parametrize("given", [np.ones((3, 10)) * 1j, torch.ones(3, 10, dtype=torch.complex64), [[1j] * 10] * 3])
def test_complex_numbers_are_refused(given):
    """NumPy drops the imaginary part, with a warning at best."""
    with pytest.raises(TypeError, match="real numbers are wanted, got complex ones"):
        Scores(given, range(3), range(10), unit="u")
    with pytest.raises(TypeError, match="real numbers are wanted, got complex ones"):
        lds(given, MASKS, OUTCOMES)


def test_scores_of_texts_are_refused():
    with pytest.raises(TypeError, match="scores are real numbers, got <U3: give floats"):
        Scores(np.array([["0.5", "1"]]), ["q"], [0, 1], unit="u")
