"""Results show an interval where they have one, and none where none was asked for."""

import numpy as np
import pytest

from source_proj.evaluate import compare, half_subsets, lds, leave_one_out

RNG = np.random.default_rng(0)
EFFECT, OTHER = RNG.normal(size=(2, 2, 12))
MASKS = half_subsets(12, 9)
WITHOUT_ONE = np.vstack([np.ones(12, bool), ~np.eye(12, dtype=bool)])

RESULTS = {
    "lds": lambda b: lds(OTHER, MASKS, MASKS @ EFFECT.T, bootstrap=b),
    "leave one out": lambda b: leave_one_out(OTHER, WITHOUT_ONE, WITHOUT_ONE @ EFFECT.T, bootstrap=b),
    "compare": lambda b: compare(*(lds(scores, MASKS, MASKS @ EFFECT.T, bootstrap=b) for scores in (EFFECT, OTHER))),
}


@pytest.mark.parametrize("kind", RESULTS)
def test_an_interval_is_shown_where_there_is_one(kind):
    without, bootstrapped = (RESULTS[kind](b) for b in (0, 50))
    assert "nan" not in str(without)
    assert "[" not in str(without)
    low, high = bootstrapped.interval
    form = "+.3f" if kind == "compare" else ".3f"
    assert f"{bootstrapped.value:{form}} [{low:{form}}, {high:{form}}]" in str(bootstrapped)
