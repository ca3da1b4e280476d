"""Labels, groups and scores that stand for nothing are refused by name and place, by every verb that takes them."""

import datetime

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

import source_proj as sp
from source_proj import curate
from source_proj.curate.labels import classes_of
from source_proj.evaluate import random_same_class

N, Q = 44, 16  # of the fixture
KINDS = {
    "list": list,
    "array": np.array,
    "objects": lambda given: np.array(given, dtype=object),
    "tensor": torch.tensor,
}


def scores_of(seed=0, queries=Q, n=N):
    values = np.random.default_rng(seed).normal(size=(queries, n)).astype(np.float32)
    return sp.Scores(values, list(range(queries)), [f"z{i}" for i in range(n)], unit="u")


def verbs(run, labels):
    """Each verb that takes labels of the training examples."""
    scores = scores_of()
    return {
        "drop_worst": lambda: curate.drop_worst(curate.aggregate(scores), 5, labels=labels),
        "select": lambda: curate.select(scores, n=5, labels=labels),
        "mislabelled": lambda: curate.mislabelled(run.source, labels, n=5),
        "aggregate": lambda: curate.aggregate(scores_of(queries=N), groups=labels),
    }


VERBS = ["drop_worst", "select", "mislabelled", "aggregate"]


@given(st.lists(st.one_of(st.integers(0, 3), st.sampled_from("abc"), st.booleans()), min_size=1))
def test_classes_are_those_of_equal_names(labels):
    names, member = classes_of(labels, len(labels))
    assert [names[number] for number in member] == labels
    assert len(names) == len(set(labels))
    if len({type(name) for name in labels}) == 1:
        assert names == sorted(set(labels))


@pytest.mark.parametrize("kind", ["list", "array", "tensor"])
def test_labels_of_any_kind_are_the_same_classes(kind):
    given_labels = [2, 0, 2, 1]
    names, member = classes_of(KINDS[kind](given_labels), 4)
    assert names == [0, 1, 2]
    assert all(type(name) is int for name in names)
    assert member.tolist() == given_labels


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", [0, 17, N - 1])
def test_nan_is_no_class(run, verb, kind, place):
    labels = [float(i % 3) for i in range(N)]
    labels[place] = float("nan")
    with pytest.raises(ValueError, match=rf"(labels|groups) hold nan at place {place}: leave it out"):
        verbs(run, KINDS[kind](labels))[verb]()


def missing():
    pandas = pytest.importorskip("pandas")
    return {"none": None, "pandas": pandas.NA, "no time": np.datetime64("NaT"), "no pandas time": pandas.NaT}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", ["none", "pandas", "no time", "no pandas time"])
def test_what_stands_for_a_missing_label_is_none(run, verb, name):
    with pytest.raises(ValueError, match=r"(labels|groups) hold (None|<NA>|NaT) at place 1: leave it out"):
        verbs(run, ["a", missing()[name]] * (N // 2))[verb]()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("rows", [torch.zeros(N, 1), np.eye(4)[np.arange(N) % 4], [[0, 1]] * N, [{0}] * N])
def test_rows_are_no_labels(run, verb, rows):
    with pytest.raises(ValueError, match=r"(labels|groups) are one name for each, got .* at place 0: .*argmax"):
        verbs(run, rows)[verb]()


@pytest.mark.parametrize("verb", VERBS)
def test_a_data_set_is_no_labels(run, verb):
    data = TensorDataset(torch.zeros(N, 2), torch.zeros(N))
    for whole in (data, DataLoader(data)):
        with pytest.raises(
            TypeError, match=r"(labels|groups) are one name for each, got a \w+ of .* for _, label in data"
        ):
            verbs(run, whole)[verb]()


@pytest.mark.parametrize("verb", VERBS)
def test_labels_of_several_types_are_labels(run, verb):
    labels = [("a", 1, ("b", 2), datetime.date(2020, 1, 1))[i % 4] for i in range(N)]
    verbs(run, labels)[verb]()


def asked_of(scores):
    return {
        "aggregate": lambda: curate.aggregate(scores),
        "select": lambda: curate.select(scores, n=3),
        "harmful": lambda: curate.harmful(curate.aggregate(scores)),
    }


@pytest.mark.parametrize("verb", ["aggregate", "select", "harmful"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@given(seed=st.integers(0, 999), whole=st.booleans())
def test_scores_that_are_not_finite_are_refused_by_name(verb, value, seed, whole):
    scores = scores_of(seed, 4, 9)
    query, place = np.random.default_rng(seed).integers([4, 9])
    scores.values[slice(None) if whole else query, place] = value
    with pytest.raises(ValueError, match=rf"training example 'z{place}' for query {0 if whole else query} is {value}"):
        asked_of(scores)[verb]()


def test_a_mean_that_is_not_finite_is_refused():
    aggregated = curate.aggregate(scores_of())
    aggregated.mean[0, 7] = np.nan
    for verb in (curate.harmful, lambda given: curate.drop_worst(given, 3)):
        with pytest.raises(ValueError, match="mean score of 'z7' in group 'all' is nan"):
            verb(aggregated)


def test_a_random_order_of_a_class_has_no_class_of_nan():
    known = np.array([0.0, np.nan, 1.0])
    with pytest.raises(ValueError, match="train_labels hold nan at place 1"):
        random_same_class(known, [0.0])
    with pytest.raises(ValueError, match="query_labels hold nan at place 1"):
        random_same_class([0.0, 1.0], known[:2])


@given(named=st.integers(0, 5), n=st.integers(-3, 8))
def test_the_first_cases_are_as_many_as_are_asked_for(named, n):
    cleaning = curate.Cleaning("test", list(range(named)), ["r"] * named, {}, list(range(6)))
    if n < 0:
        with pytest.raises(ValueError, match=f"at least 0, got {n}"):
            cleaning.first(n)
    else:
        assert cleaning.first(n).ids == cleaning.first(np.int64(n)).ids == list(range(min(n, named)))
