"""Hits in order, in frames, in words, and as HTML in which no id is code."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import source
from torch.utils.data import TensorDataset

import source_proj as sp
from source_proj import Examples, Scores

EVIL = '<script>alert("x")</script>\x1b[2J'


def scores(seed=0, queries=3, n=8, **options):
    values = np.random.default_rng(seed).standard_normal((queries, n)).astype(np.float32)
    return Scores(values, [f"q{i}" for i in range(queries)], [f"z{i}" for i in range(n)], unit="u", **options)


@settings(max_examples=25)
@given(seed=st.integers(0, 999), k=st.integers(1, 8), up=st.booleans())
def test_helpful_and_harmful_follow_the_sense_of_the_measurement(seed, k, up):
    every = scores(seed, higher_is_better=up)
    for hits in (every.top_k(8), every.bottom_k(8)):
        assert hits.helpful(k).ids == every.helpful(k).ids
        assert hits.harmful(k).ids == every.harmful(k).ids
        np.testing.assert_array_equal(hits.harmful(k).indices, every.harmful(k).indices)
    assert every.helpful(k).ids == (every.top_k(k) if up else every.bottom_k(k)).ids


def test_hits_of_one_query_and_of_some():
    hits = scores().top_k(2)
    assert [query for query, _ in hits] == ["q0", "q1", "q2"]
    assert hits[1] == list(hits)[1][1]
    assert [hit.id for hit in hits[-1]] == hits.ids[2]
    some = hits[1:]
    assert (some.query_ids, some.ids, some.k) == (["q1", "q2"], hits.ids[1:], 2)
    with pytest.raises(IndexError):
        hits[3]


def test_a_tidy_frame_has_a_line_for_each_score():
    pytest.importorskip("pandas")
    hits = scores().top_k(2)
    frame = hits.to_pandas()
    assert list(frame.columns) == ["query_id", "train_id", "rank", "score"]
    lines = [(q, hit.id, rank, hit.score) for q, entries in hits for rank, hit in enumerate(entries, 1)]
    assert [tuple(line) for line in frame.itertuples(index=False)] == lines


def test_words_and_html_hold_no_code():
    values = np.array([[1.0, -2.0]])
    evil = Scores(values, [EVIL], [EVIL, "b"], unit="logit margin")
    hits = evil.top_k(2).with_examples(Examples([(EVIL, EVIL), ("fine", 1)]), Examples([(EVIL, EVIL)]))
    text, shown = str(hits), hits._repr_html_()
    assert "\x1b" not in text + shown
    assert "<script" not in shown
    assert "&lt;script&gt;" in shown
    assert "log-odds" in text  # the unit in words
    assert "\x1b" not in evil._repr_html_()
    assert "<script" not in evil._repr_html_() + evil.predict_removal(["b"])._repr_html_()


def test_many_queries_are_shown_by_the_first():
    many = scores(queries=50).top_k(3)
    assert "45 more queries" in str(many)
    assert many._repr_html_().count("query q") == 5
    assert repr(many).startswith("Hits(50 queries x 3")


def test_examples_are_shown_where_they_are_known():
    data = TensorDataset(torch.rand(8, 4), torch.arange(8))
    hits = scores().top_k(2).with_examples(Examples(data, picture=(2, 2)), Examples(data))
    first = hits.train_example(0, 0)
    assert first.label == hits.ids[0][0][1:]
    assert hits._repr_html_().count("<img") == 6
    assert hits[2:].query_example(0).label == "2"


def test_frames_hold_what_is_known_of_the_examples_where_that_is_asked_for():
    """Texts and labels had to be joined to the ids by hand."""
    pytest.importorskip("pandas")
    train = Examples([(f"text {place}", place % 2) for place in range(8)], class_names=["no", "yes"])
    hits = scores().top_k(3).with_examples(train, Examples([(f"query {place}", 1) for place in range(8)]))
    plain, told = hits.to_pandas(), hits.to_pandas(examples=True)
    assert list(plain.columns) == ["query_id", "train_id", "rank", "score"]
    assert list(told.columns) == [*plain.columns, "toward", "query_label", "query", "train_label", "train"]
    assert told[list(plain.columns)].equals(plain)
    for line, (query, rank) in zip(told.itertuples(), np.ndindex(*hits.scores.shape), strict=True):
        place = int(hits.indices[query, rank])
        assert (line.train, line.train_label) == (f"text {place}", ["no", "yes"][place % 2])
        assert (line.query, line.query_label) == (f"query {query}", "1")
        assert line.toward == ("helpful" if line.score > 0 else "harmful" if line.score < 0 else "neither")
    known = replace(hits, shown=replace(hits.shown, measurements=torch.arange(len(hits)) - 1.5))
    assert known.to_pandas(examples=True)["measurement"].tolist() == [
        q - 1.5 for q in range(len(hits)) for _ in range(3)
    ]
    assert list(scores().top_k(3).to_pandas(examples=True).columns) == [*plain.columns, "toward"]


def test_bare_ids_say_how_examples_are_shown():
    bare, told = scores().top_k(2), "bank.examples = sp.Examples(train_set)"
    assert told in str(bare).splitlines()[-1]
    assert "--data MODULE:FUNCTION" in str(bare).splitlines()[-1]
    assert told not in str(bare.with_examples(Examples(TensorDataset(torch.rand(8, 4), torch.arange(8)))))


@pytest.mark.parametrize("word", ["$x_$", "$5 to $6", r"\$5", "one $"])
def test_plots_draw_ids_and_labels_as_they_are(word):
    """Between two dollars matplotlib reads a formula, and raises where it is none."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    given = Scores(np.array([[1.0, -2.0]]), [word], [word, "b"], unit=word)
    known = given.top_k(2).with_examples(Examples([("text", word), ("text", "b")]))
    for plot in (given.plot, known.plot):
        figure = Figure()
        axes = plot(ax=figure.subplots())
        figure.canvas.draw()
        for text in (axes.title, axes.xaxis.label, *axes.get_yticklabels()[: 1 if plot == known.plot else 0]):
            shown, is_formula = text._preprocess_math(text.get_text())
            assert word in shown
            assert not is_formula


def test_plots(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    pytest.importorskip("matplotlib")
    import matplotlib.pyplot as plt

    axes = scores().top_k(3).plot(1)
    assert len(axes.patches) == 3
    assert sum(bar.get_height() for bar in scores().plot(0).patches) == 8
    plt.close("all")


def test_examples_of_another_number_than_the_banks_are_not_shown_and_counted(blobs):
    problem, bank = blobs[0], sp.open(blobs[1].path)
    method = source(problem, bank)
    n = bank.n_rows
    assert "to see them, set bank.examples" in str(method.top_k(problem.queries, 2))
    bank.examples = Examples([("some", 0)] * (n - 1))
    for hits in (method.top_k(problem.queries, 2), method.score(problem.queries).top_k(2)[1:]):
        assert (
            f"named by their ids, as bank.examples are {n - 1} and the bank has {n} (appended ones count): set bank."
            in (str(hits))
        )
    bank.examples = Examples([("some", 0)] * n)
    assert "named by their ids" not in str(method.top_k(problem.queries, 2))


def test_features_are_counted_and_not_printed(blobs):
    problem, bank = blobs
    features = source(problem, bank).sketch(problem.queries)
    k, points = features[0].sketch["dim"], len(features[0].rows)
    said = f"{len(features.ids)} queries, k={k}, at {points} checkpoint{'s' if points > 1 else ''}"
    assert repr(features) == f"SketchedQueries({said})"
    assert repr(features[0]) == f"QueryFeatures({said})"
    assert repr(type(features)([*features, *features])) == f"SketchedQueries({said}; 2 banks)"
    assert repr(type(features)()) == "SketchedQueries()"
