"""Two results are equal, or are not: whether they hold arrays, NaN, or as many numbers as each other."""

import pickle
from dataclasses import replace

import numpy as np
import pytest

from source_proj import Scores
from source_proj._io.equality import EqualByValue
from source_proj.attribution.parts import PartScores
from source_proj.evaluate import (
    calibration,
    compare,
    compare_removal,
    half_subsets,
    lds,
    leave_one_out,
    mislabel,
    subset_removal,
)

RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=(2, 3, 8))
MASKS, ALONE = half_subsets(8, 6), np.vstack([np.ones(8, dtype=bool), ~np.eye(8, dtype=bool)])
OUTCOMES, OUTCOMES_ALONE = RNG.normal(size=(6, 3)), RNG.normal(size=(9, 3))


def removal(values, bootstrap=9):
    return subset_removal(
        values, np.ones(3), lambda kept, seed: np.full(3, kept[0] < 2), [1, 3], bootstrap=bootstrap, progress=False
    )


def as_scores(values):
    return Scores(values, "abc", range(8), unit="u")


def parts(values):
    return PartScores(values[None], ("s",), list("abc"), list(range(8)), "u", True, np.ones((1, 8), dtype=bool))


RESULTS = {
    "hits": lambda values: as_scores(values).top_k(3),
    "change": lambda values: as_scores(values).predict_removal([1, 2]),
    "parts": parts,
    "lds": lambda values: lds(values, MASKS, OUTCOMES),
    "lds without a bootstrap": lambda values: lds(values, MASKS, OUTCOMES, bootstrap=0),
    "calibration": lambda values: calibration(values, MASKS, OUTCOMES),
    "leave one out": lambda values: leave_one_out(values, ALONE, OUTCOMES_ALONE, bootstrap=9),
    "difference": lambda values: compare(lds(values, MASKS, OUTCOMES), lds(-values, MASKS, OUTCOMES)),
    "mislabel": lambda values: mislabel(values[0], np.arange(8) > 5),
    "removal": removal,
    "removal difference": lambda values: compare_removal(removal(values), removal(-values)),
}


@pytest.mark.parametrize("make", RESULTS.values(), ids=RESULTS)
def test_the_same_results_are_equal_and_others_are_not(make):
    result, again, other = make(SCORES[0]), make(SCORES[0].copy()), make(SCORES[1])
    assert isinstance(result, EqualByValue)
    assert result == again == pickle.loads(pickle.dumps(result))
    assert result != other
    assert result != "text"
    with pytest.raises(TypeError, match="unhashable"):
        hash(result)


def test_fewer_hits_and_other_units_are_other_hits():
    hits = as_scores(SCORES[0]).top_k(3)
    assert hits != as_scores(SCORES[0]).top_k(2)
    assert hits != replace(hits, unit="v")
    assert hits[:1] != hits
    assert hits == hits.with_examples([("text", 0)] * 8)  # what is shown beside them is not compared
