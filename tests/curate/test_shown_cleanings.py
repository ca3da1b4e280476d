"""The examples that a cleaning names are shown beside the reasons: whoever is to drop them must look at them first."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

import source_proj as sp
from source_proj import curate
from source_proj.curate import Cleaning

TEXTS = [(f"sentence number {place}", place % 2) for place in range(7)]
EVIL = "\x1b[2J<b>\u202e"

VERBS = {
    "mislabelled": lambda run: curate.mislabelled(run.source, run.labels, n=4),
    "mislabelled by self-influence": lambda run: curate.mislabelled(run.source, run.labels, n=4, by="self_influence"),
    "harmful of a method": lambda run: curate.drop_worst(curate.aggregate(run.source, run.queries), 4),
    "harmful of scores": lambda run: curate.drop_worst(curate.aggregate(run.source.score(run.queries)), 4),
    "selected": lambda run: curate.select(run.source, run.queries, n=5),
    "near-duplicates": lambda run: curate.near_duplicates(run.bank, threshold=0.99, progress=False),
}


def of_texts(named, ids=None, texts=TEXTS):
    ids = list(range(len(texts))) if ids is None else ids
    cleaning = Cleaning("test", [ids[place] for place in named], [f"reason {n}" for n in named], {}, ids)
    return cleaning.with_examples(texts, class_names=["bad", "good"])


@given(st.lists(st.integers(0, 6), unique=True, max_size=7), st.permutations(range(7)))
def test_each_reason_stands_by_its_own_example(named, ids):
    cleaning = of_texts(named, ids)
    for place, position in enumerate(named):
        example = cleaning.example(place)
        assert (example.id, example.text) == (ids[position], TEXTS[position][0])
        assert example.label == ["bad", "good"][TEXTS[position][1]]
        assert f"{ids[position]}: reason {position}\n    sentence number {position}" in str(cleaning)
    assert cleaning._repr_html_().count("sentence number") == len(named)
    for part in (cleaning.first(3), cleaning.without(cleaning.ids[:1])):
        assert [part.example(place).id for place in range(len(part))] == part.ids
        assert len({part.example(place).text for place in range(len(part))}) == len(part)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_shows_what_the_bank_knows(verb, run):
    run.bank.examples = run.source.banks[0].examples = None
    bare = VERBS[verb](run)
    assert bare.example(0).words == ""
    known = sp.Examples(run.train_set, class_names=["none", "one", "both"], columns=list("abcde"))
    run.bank.examples = run.source.banks[0].examples = known
    try:
        told = VERBS[verb](run)
    finally:
        run.bank.examples = run.source.banks[0].examples = None
    by_name = [
        re.sub(r"(?<=^labelled )\d|(?<=class )\d", lambda found: known.class_names[int(found[0])], reason)
        for reason in bare.reasons
    ]
    assert (told.ids, told.reasons) == (bare.ids, by_name)
    for place, its_id in enumerate(told.ids):
        row = run.train_set.tensors[0][its_id]
        np.testing.assert_allclose([float(value) for _, value in told.example(place).row], row, rtol=1e-3)
    assert "a=" in str(told)


def test_what_strangers_wrote_is_harmless():
    cleaning = of_texts([0, 1], texts=[(EVIL, 0), ("fine", 1)])
    for text in (str(cleaning), cleaning._repr_html_()):
        assert not {"\x1b", "\u202e"} & set(text)
    assert "<b>" not in cleaning._repr_html_()


def test_examples_of_another_number_are_refused_and_stages_show_their_own():
    with pytest.raises(sp.MismatchError, match="got 3 examples to show for a training set of 7"):
        of_texts([0]).with_examples(TEXTS[:3])
    ids = [("a", place) for place in range(3)] + [("b", place) for place in range(4)]
    part = of_texts([5, 1, 3], ids).of_stage("b")
    assert [part.example(place).text for place in range(2)] == ["sentence number 5", "sentence number 3"]


def test_it_is_shown_and_not_compared_or_kept(tmp_path):
    told = of_texts([2])
    told.save(tmp_path / "list.json")
    loaded = Cleaning.load(tmp_path / "list.json")
    assert loaded.ids == told.ids
    assert loaded.example(0).text is None
    assert "sentence" not in repr(told)
    pictures = told.with_examples(TensorDataset(torch.rand(7, 4), torch.arange(7)), picture=(2, 2))
    assert "<img" in pictures._repr_html_()
