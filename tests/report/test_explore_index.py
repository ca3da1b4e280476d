"""A search finds what a reader would, and while examples are read for the first time it tells what is known so far."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from source_proj.bank.examples import Examples
from source_proj.report.explore import index
from source_proj.report.explore.index import ExampleIndex

TEXTS = st.lists(st.tuples(st.text("ab \x1bÄ", max_size=6), st.sampled_from([0, 1, "x"])), min_size=1, max_size=30)


class Slow:
    """A data set of texts that gives those before a place, and the others when it is let."""

    def __init__(self, records, stop):
        self.records, self.stop, self.goes_on = records, stop, threading.Event()

    def __len__(self):
        return len(self.records)

    def __getitem__(self, place):
        if place >= self.stop:
            assert self.goes_on.wait(30)
        return self.records[place]


@settings(max_examples=60, deadline=None)
@given(
    TEXTS,
    st.text("abÄ ", max_size=4),
    st.sampled_from(["", "0", "x", "absent"]),
    st.sampled_from([None, 0, 1, 2]),
    st.data(),
)
def test_a_search_is_a_filter_and_what_is_found_early_stands_first(records, words, label, stage, data):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(index, "_BLOCK", data.draw(st.integers(1, 9)))
        patched.setattr(index, "_PATIENCE", 0.005)
        first = data.draw(st.integers(0, len(records)))
        slow = Slow(records, data.draw(st.integers(0, len(records))))
        ids = [f"id{place}" for place in range(len(records))]
        searched = ExampleIndex(ids, Examples(slow), [first, len(records) - first])
        early = searched.search(words, label, stage, wanted=3)
        slow.goes_on.set()
        assert searched.labels == sorted({str(own) for _, own in records})
        found = searched.search(words, label, stage, wanted=3)
    spans = {None: range(len(records)), 0: range(first), 1: range(first, len(records)), 2: range(0)}
    shown = [f"id{place} {own} {text}".replace("\x1b", r"\x1b").casefold() for place, (text, own) in enumerate(records)]
    wanted = [
        place
        for place in spans[stage]
        if label in ("", str(records[place][1])) and all(word in shown[place] for word in words.casefold().split())
    ]
    assert (list(found.places), found.read) == (wanted, 1.0)
    assert list(early.places) == wanted[: len(early.places)]
    assert early.read < 1.0 or list(early.places) == wanted


def test_a_search_waits_for_no_more_than_it_was_asked_for(monkeypatch):
    monkeypatch.setattr(index, "_BLOCK", 2)
    monkeypatch.setattr(index, "_PATIENCE", 30.0)  # which would be the test's own time
    slow = Slow([("fine", 0)] * 10, stop=6)
    searched = ExampleIndex(range(10), Examples(slow), [10])
    assert list(searched.search("fine", "", None, wanted=5).places) == list(range(6))
    assert searched.search("fine", "", None, wanted=0).read == 0.6
    slow.goes_on.set()
    assert list(searched.search("fine", "", None, wanted=10).places) == list(range(10))


def test_who_searches_is_told_that_the_data_cannot_be_read():
    class Broken(Slow):
        def __getitem__(self, place):
            raise ValueError("the disk is gone")

    searched = ExampleIndex(range(4), Examples(Broken([("", 0)] * 4, 4)), [4])
    with pytest.raises(ValueError, match="the disk is gone"):
        searched.search("fine", "", None, wanted=1)
    with pytest.raises(ValueError, match="the disk is gone"):
        _ = searched.labels


@pytest.mark.parametrize("word", ["می\u200cخواهم", "क्\u200dष", "👩\u200d🔬"])
def test_joiners_are_letters_of_the_words_that_are_spelled_with_them(word):
    examples = Examples([(f"one {word}", 0), ("another", 0)])
    assert word in examples.show(0, "a")._repr_html_()
    assert tuple(ExampleIndex(["a", "b"], examples, [2]).search(word, "", None, 2).places) == (0,)
