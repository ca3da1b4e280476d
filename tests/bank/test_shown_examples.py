"""Examples as people see them: what is shown is the data set's own, and nothing of it is code."""

from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from source_proj import Example, Examples
from source_proj.task import Answer

pytest.importorskip("PIL")


@settings(max_examples=25)
@given(size=st.integers(1, 6), data=st.data())
def test_places_are_those_of_the_data_set_through_subsets_and_stages(size, data):
    labels = data.draw(st.lists(st.integers(0, 9), min_size=size, max_size=size))
    base = TensorDataset(torch.arange(size, dtype=torch.float)[:, None], torch.tensor(labels))
    order = data.draw(st.permutations(range(size)))
    shown = Examples({"first": base, "second": DataLoader(Subset(base, order))})
    assert len(shown) == 2 * size
    expected = [*labels, *(labels[place] for place in order)]
    assert [shown.show(place, place).label for place in range(2 * size)] == [str(label) for label in expected]
    places = data.draw(st.lists(st.integers(0, 2 * size - 1), min_size=1, max_size=4))
    chosen = shown.at(places)
    assert [chosen.show(i, i).row for i in range(len(places))] == [shown.show(place, 0).row for place in places]
    with pytest.raises(IndexError, match="no example"):
        shown.show(2 * size, 0)


@given(st.integers(-9, 9), st.integers(1, 5), st.sampled_from([int, np.int64, torch.tensor]))
def test_a_label_has_the_name_of_its_class_or_none(label, classes, kind):
    """-1, as data sets have it where nobody labelled, was shown as the last class."""
    names, item = [f"class {number}" for number in range(classes)], ("text", kind(label))
    expected = names[label] if 0 <= label < classes else str(label)
    for given_names in (names, tuple(names), dict(enumerate(names))):
        shown = Examples([item], class_names=given_names)
        assert [shown.show(0, 0).label, shown.said(label), *shown.searched()] == [
            expected,
            expected,
            ("text", expected),
        ]
    assert Examples([item], class_names={label: "any"}).show(0, 0).label == "any"


def test_a_picture_has_the_shape_that_the_user_says_and_no_other():
    flat = TensorDataset(torch.rand(2, 64), torch.tensor([3, 4]))
    assert Examples(flat).show(0, 0).image is None  # nothing is guessed
    seen = Examples(flat, picture=(8, 8)).show(1, 0)
    assert (seen.image is not None, seen.pixelated, seen.label) == (True, True, "4")
    assert "pixelated" in seen._repr_html_()
    large = Examples(TensorDataset(torch.rand(1, 3, 80, 90))).show(0, 0)
    assert (large.image is not None, large.pixelated, large.label) == (True, False, "")
    with pytest.raises(ValueError, match=r"64 numbers has no shape \(9, 9\)"):
        Examples(flat, picture=(9, 9)).show(0, 0)


def test_rows_texts_files_and_tokens():
    class Folder(list):
        classes = ("cat", "dog")
        samples = (("a/cat.png", 0), ("a/dog.png", 1))

    folder = Folder([(torch.rand(3, 4, 4), 0), (torch.rand(3, 4, 4), 1)])
    folder.samples = list(Folder.samples)
    dog = Examples(ConcatDataset([Subset(folder, [1])])).show(0, 7)
    assert (dog.file, dog.label, dog.words, dog.id) == ("a/dog.png", "dog", "a/dog.png", 7)
    row = Examples([(np.array([1.0, 2.5]), 0.25)], columns=["age", "mass"]).show(0, 0)
    assert (row.row, row.label, row.words) == ((("age", "1"), ("mass", "2.5")), "0.25", "age=1, mass=2.5")
    assert Examples([np.zeros(50)]).show(0, 0).words == ""

    class Words:
        def decode(self, tokens):
            return " ".join(f"w{int(token)}" for token in np.atleast_1d(tokens))

    item = {
        "input_ids": torch.tensor([4, 5, 6]), "attention_mask": torch.tensor([1, 1, 0]),
        "labels": torch.tensor([4, 5, -100]),
    }  # fmt: skip
    assert Examples([item], tokenizer=Words()).show(0, 0).text == "w4 w5"
    asked = {**item, "labels": torch.tensor([-100, 5, -100])}
    assert Examples([asked], tokenizer=Words()).show(0, 0).text == "w4 → w5"
    assert Examples([item], tokenizer=Words()).said([5, 6]) == "w5 w6"


@settings(max_examples=25)
@given(st.text(), st.text())
def test_what_strangers_wrote_is_text_in_html(text, name):
    class Reader(HTMLParser):
        tags, data = (), ""

        def handle_starttag(self, tag, attrs):
            self.tags = (*self.tags, tag)

        def handle_data(self, data):
            self.data += data

    for example in (Example("id", text=text), Example("id", row=((name, text),)), Example("id", file=text)):
        reader = Reader()
        reader.feed(example._repr_html_())
        assert set(reader.tags) <= {"span", "table", "thead", "tbody", "tr", "th", "td"}


def test_a_frame_is_shown_row_by_row_under_its_names():
    pandas = pytest.importorskip("pandas", reason="the extra pandas is not installed")
    frame = pandas.DataFrame({"height": [1.5, 2.0, 2.5], "label": [0, 1, 0], "width": [3.0, 4.0, 5.0]}, index=[7, 8, 9])
    shown = Examples(frame).show(1, "b", prediction=0)
    assert (shown.row, shown.label, shown.prediction) == ((("height", "2"), ("width", "4")), "1", "0")
    assert shown.words == "height=2, width=4"
    assert Examples(TensorDataset(torch.ones(1, 2), torch.zeros(1))).show(0, 0).row == (("x0", "1"), ("x1", "1"))


def test_texts_beside_their_tokens_are_shown():
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = {"text": ["hello there", "good"], "input_ids": [[1, 2], [3, 4]], "labels": [0, 1]}
    shown = Examples(datasets.Dataset.from_dict(rows))
    assert shown.show(0, 0).text == "hello there"
    assert [text for text, _ in shown.searched()] == rows["text"]


def test_the_probability_of_a_continuation_is_that_of_a_token():
    shown = Example("q", text="a b")
    assert shown.with_answer(Answer(1, 0.25), "dog").said == "dog (probability 0.25)"
    assert shown.with_answer(Answer([5, 7], 0.25), "c d").said == "“c d” (probability 0.25 a token)"
    assert shown.with_answer(Answer(1, 0.25), "dog").verdict == "predicted dog (probability 0.25)"
    assert shown.with_answer(Answer(1, 0.25, chosen=False), "dog").verdict == "asked about dog (probability 0.25)"
    assert shown.with_answer(Answer([5], 0.25), "c").verdict == "continued by “c” (probability 0.25 a token)"
    assert shown.with_answer(Answer([5, 7], 0.25), "c d").text == "a b"
