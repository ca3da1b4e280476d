"""Names, seeds and data sets as users hold them: tuples, dates, numbers of NumPy and torch, loaders, lone ids."""

import datetime
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from source_proj import curate

KINDS = {
    "tuples": [("a",), ("b", 1), ("c", 2, 3)],
    "pairs": [("a", 1), ("a", 2), ("b", 1)],
    "dates": [datetime.date(2024, 1, day) for day in (1, 2, 3)],
    "bytes": [b"x", b"y", b"z"],
    "several types": ["a", 1, ("b", 2)],
    "numbers": [1, 2, 3],
    "truths": [False, 1.5, 2],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_rival_class_is_named_by_labels_of_any_kind_and_saved(run, kind, tmp_path):
    labels = [KINDS[kind][number] for number in run.labels]
    named, plain = (curate.mislabelled(run.source, own, n=9, by="disagreement") for own in (labels, run.labels))
    names, _ = curate.labels.classes_of(labels, 44)
    numbers = [names.index(name) for name in KINDS[kind]]  # names may be sorted otherwise
    if numbers == [0, 1, 2]:
        assert named.ids == plain.ids
        words = curate.labels.named_column([KINDS[kind][rival] for rival in plain.values["rival"]])
        assert named.values["rival"].tolist() == words.tolist()
    assert named.values["rival"].shape == (9,)
    named.save(tmp_path / "list.json")
    loaded = curate.Cleaning.load(tmp_path / "list.json")
    assert loaded.values["rival"].tolist() == named.values["rival"].tolist()
    assert len(named.annotate(pd.DataFrame({"a": range(44)}))["rival"].dropna()) == 9


@pytest.mark.parametrize("seeds", [np.int64(3), torch.tensor(3), np.arange(3), torch.arange(3), range(3), {0, 1, 2}])
def test_seeds_of_any_library(seeds):
    cleaning = curate.Cleaning("by hand", [0], ["r"], {}, list(range(5)))
    assert curate.verify(cleaning, lambda kept, seed: seed, float, seeds=seeds, progress=False).seeds == [0, 1, 2]


@given(st.sets(st.integers(-(2**40), 2**40), min_size=1, max_size=4))
def test_seeds_below_zero_draw_at_random_too(seeds):
    drawn = []

    def train(kept, seed):
        drawn.append(tuple(kept))
        return seed

    cleaning = curate.Cleaning("by hand", list(range(20)), ["r"] * 20, {}, list(range(40)))
    judged = curate.verify(cleaning, train, float, seeds=list(seeds), progress=False)
    assert judged.seeds == list(seeds)
    assert len(set(drawn[2::3])) == len(seeds)
    assert all(len(set(kept)) == 20 for kept in drawn[2::3])


@pytest.mark.parametrize("seeds", [3.0, "abc", [0, 0.5, 1], None])
def test_what_are_no_seeds_is_named(seeds):
    cleaning = curate.Cleaning("by hand", [0], ["r"], {}, list(range(5)))
    with pytest.raises(TypeError, match=r"seeds? must be a whole number, got"):
        curate.verify(cleaning, lambda kept, seed: seed, float, seeds=seeds)


@pytest.mark.parametrize(
    "measure", [torch.tensor(2.0, requires_grad=True), torch.tensor([2.0]), np.array([2.0]), [2.0], np.float16(2), True]
)
def test_a_measure_is_one_number_however_it_is_held(measure):
    cleaning = curate.Cleaning("by hand", [0], ["r"], {}, list(range(5)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judged = curate.verify(cleaning, lambda kept, seed: 0, lambda model: measure, seeds=3, progress=False)
    assert (judged.whole == float(np.asarray(torch.as_tensor(measure).detach()).item())).all()


@pytest.mark.parametrize("measure", [None, [1.0, 2.0], "good", {}])
def test_what_is_no_measure_is_named(measure):
    cleaning = curate.Cleaning("by hand", [0], ["r"], {}, list(range(5)))
    with pytest.raises(TypeError, match="for seed 7: it must give one number"):
        curate.verify(cleaning, lambda kept, seed: 0, lambda model: measure, seeds=[7])


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, iter])
def test_ids_are_taken_back_whatever_holds_them(kind):
    cleaning = curate.Cleaning("by hand", [3, 1, 2], ["r"] * 3, {}, list(range(5)))
    assert cleaning.without(kind([1, 3])).ids == [2]
    with pytest.raises(ValueError, match=r"4\)?\] are not among the 3"):
        cleaning.without(kind([1, 4]))


def test_one_id_is_taken_back_by_itself():
    words = curate.Cleaning("by hand", ["ab", "a", "b"], ["r"] * 3, {}, ["a", "b", "ab"])
    assert words.without("ab").ids == ["a", "b"]
    numbers = curate.Cleaning("by hand", [3, 1], ["r"] * 2, {}, list(range(5)))
    for three in (3, np.int64(3), np.array(3), torch.tensor(3)):
        assert numbers.without(three).ids == [1]


@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_of_a_loader_its_data_set_is_taken(batch_size):
    data = TensorDataset(torch.arange(4))
    cleaning = curate.Cleaning("by hand", [1], ["r"], {}, list(range(4)))
    kept = cleaning.apply(DataLoader(data, batch_size=batch_size))
    assert [int(value) for (value,) in kept] == [0, 2, 3]


def test_what_has_no_positions_or_columns_is_refused():
    cleaning = curate.Cleaning("by hand", [1], ["r"], {}, list(range(4)))
    for data in (iter(range(4)), {0, 1, 2, 3}):
        with pytest.raises(TypeError, match="examples are taken by their positions, which a"):
            cleaning.apply(data)
    with pytest.raises(TypeError, match="Series has no columns"):
        cleaning.annotate(pd.Series(range(4)))


def test_positions_of_nothing_are_positions(tmp_path):
    nothing = curate.Cleaning("by hand", [1], ["r"], {"size": np.array([3])}, list(range(4))).first(0)
    frame = nothing.to_pandas()
    assert frame["position"].dtype == np.int64
    assert len(pd.DataFrame({"a": range(4)}).iloc[frame["position"]]) == 0
