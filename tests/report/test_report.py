import base64
import io
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from source_proj.attribution.hits import Shown
from source_proj.attribution.parts import PartScores
from source_proj.attribution.scores import Scores
from source_proj.attribution.source import Segment
from source_proj.bank.examples import Examples
from source_proj.report import (
    Attribution,
    Check,
    Example,
    MethodLists,
    Page,
    QuerySection,
    image_uri,
    make_hits_page,
    make_page,
    render,
    write_report,
)

pytest.importorskip("jinja2")
Image = pytest.importorskip("PIL.Image")


class Reader(HTMLParser):
    """Collects what the laws below speak of: every tag with its attributes, and the visible text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def find(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def small_scores(**options):
    values = np.array([[0.5, -0.25, 0.125, 0.0], [-1.0, 2.0, -3.0, 4.0]])
    return Scores(values, ["q0", "q1"], ["a", "b", "c", "d"], unit="logit margin", **options)


def small_data(n):
    return [(torch.rand(1, 6, 5), i % 2) for i in range(n)]


def small_page(**options):
    return make_page("A title", options.pop("scores", small_scores()), small_data(4), small_data(2), **options)


def small_parts(scores, *factors):
    segments = [Segment(0, f"segment {i}", (i,), 1.0, 0.0, 4, 1.0, 0.0) for i in range(len(factors))]
    values = np.stack([scores.values * factor for factor in factors])
    ids = scores.query_ids, scores.train_ids
    present = np.ones((len(factors), len(scores.train_ids)), dtype=bool)
    return PartScores(values, tuple(segments), *ids, scores.unit, True, present)


def test_lists_hold_the_strongest_examples_of_their_own_sign():
    first, second = small_page(top=3).sections
    assert [(hit.example.id, hit.score) for hit in first.helpful] == [("a", 0.5), ("c", 0.125)]
    assert [(hit.example.id, hit.score) for hit in first.harmful] == [("b", -0.25)]
    assert [hit.example.id for hit in second.helpful] == ["d", "b"]
    assert [hit.example.id for hit in second.harmful] == ["c", "a"]


def test_helpful_follows_the_direction_of_the_measurement():
    first, _ = small_page(scores=small_scores(higher_is_better=False)).sections
    assert [hit.example.id for hit in first.helpful] == ["b"]
    assert [hit.example.id for hit in first.harmful] == ["a", "c"]
    html = render(small_page(scores=small_scores(higher_is_better=False)))
    assert "Negative: helpful." in html
    assert "Positive: helpful." not in html


def test_parts_become_shares_that_sum_to_one():
    page = small_page(parts=small_parts(small_scores(), 1.5, -0.5))
    hit = page.sections[0].helpful[0]
    assert hit.parts == (0.75, -0.25)
    assert hit.shares == (0.75, 0.25)
    html = render(page)
    assert html.count('class="shares"') == 3 + 4  # one for every score that is not zero
    assert "<strong>1</strong>: segment 0; <strong>2</strong>: segment 1." in html


def test_parts_of_other_scores_are_refused():
    with pytest.raises(ValueError, match=r"parts of shape \(1, 1, 1\)"):
        small_page(parts=small_parts(Scores(np.ones((1, 1)), [0], [0], unit="u"), 1.0))


def test_all_zero_parts_have_no_share():
    assert Attribution(Example("a", "b"), 0.0, (0.0, 0.0)).shares == (0.0, 0.0)


def test_other_methods_stand_below_with_their_own_unit():
    other = Scores(-small_scores().values, ["q0", "q1"], ["a", "b", "c", "d"], unit="cosine")
    page = small_page(method="SOURCE", others={"RepSim": other}, top=1)
    first, _ = page.sections
    assert first.method == "SOURCE"
    assert [one.method for one in first.others] == ["RepSim"]
    assert [(hit.example.id, hit.score) for hit in first.others[0].helpful] == [("b", 0.25)]
    assert [(hit.example.id, hit.score) for hit in first.others[0].harmful] == [("a", -0.5)]
    html = render(page)
    assert html.count('<span class="unit"> logit margin') == html.count('<span class="unit"> cosine') == 4
    assert re.findall(r'class="method">(\w+)<', html) == ["SOURCE", "RepSim"] * 2
    assert Reader(html).open == []


def test_one_method_goes_unnamed():
    assert 'class="method"' not in render(small_page())


def test_other_scores_must_be_of_the_same_examples():
    with pytest.raises(ValueError, match=r"scores 'TRAK' of shape \(1, 1\)"):
        small_page(others={"TRAK": Scores(np.ones((1, 1)), [0], [0], unit="u")})


def test_the_same_examples_in_another_order_are_refused():
    """Their columns would be shown as the examples that stand at these places here."""
    turned = Scores(small_scores().values[:, ::-1], ["q0", "q1"], ["d", "c", "b", "a"], unit="u")
    message = r"whose training example 0 is 'a' and not 'd'"
    with pytest.raises(ValueError, match=rf"scores 'TRAK' of shape \(2, 4\) .* {message}"):
        small_page(others={"TRAK": turned})
    with pytest.raises(ValueError, match=rf"parts of shape \(2, 2, 4\) .* {message}"):
        small_page(parts=small_parts(turned, 0.5, 0.5))


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="got 2 and 3"):
        make_page("t", small_scores(), small_data(3), small_data(2))
    for count in (1, 3):
        for name in ("predictions", "measurements", "notes"):
            with pytest.raises(ValueError, match=f"got {count} {name} for 2 queries"):
                small_page(**{name: [0] * count})


def test_data_come_as_scores_take_them():
    train, queries = small_data(4), small_data(2)
    loaders = DataLoader(train, batch_size=3), DataLoader(queries, batch_size=3)
    expected = make_page("t", small_scores(), train, queries)
    assert make_page("t", small_scores(), *loaders) == expected
    assert make_page("t", small_scores(), {"a": train[:1], "b": train[1:]}, queries) == expected


def test_page_needs_nothing_beside_it():
    reader = Reader(render(small_page()))
    assert reader.open == []  # every element is closed
    assert not reader.find("link")
    assert not reader.find("script")
    assert len(reader.find("img")) == 2 + 3 + 4
    for image in reader.find("img"):
        assert image["src"].startswith("data:image/png;base64,")
        assert image["alt"].startswith("example ")
    assert "http" not in reader.text


def test_page_speaks_of_sign_unit_light_dark_and_phone():
    html = render(small_page())
    assert "+0.500" in html
    assert "−0.250" in html
    assert html.count('<span class="unit"> logit margin') == 7
    assert "prefers-color-scheme: dark" in html
    assert "width=device-width" in html
    assert "@media (max-width" in html


EVIL = '<script>alert("x")</script>'


def test_every_text_is_escaped():
    example = Example(EVIL, EVIL, text=EVIL, prediction=EVIL)
    hit = Attribution(example, 0.5, (0.25, 0.25))
    other = MethodLists(EVIL, (hit,), (hit,), EVIL)
    section = QuerySection(example, (hit,), (hit,), 1.0, EVIL, EVIL, (other,))
    page = Page(
        EVIL, EVIL, (section,), EVIL, (EVIL, EVIL), ((EVIL, EVIL),),
        (Check(EVIL, 1.0, 1.0, 0.1, 3, EVIL),), EVIL,
    )  # fmt: skip
    html = render(page)
    assert "<script" not in html
    assert Reader(html).text.count(EVIL) >= 24


def test_ids_and_labels_are_words_as_everywhere():
    """Of a stage, or turned round by a mark of direction that would take the id behind it along."""
    ids = [("first", np.int64(3)), ("second\u202e", "b")]
    scores = Scores(np.array([[1.0, -1.0]]), [np.int64(7)], ids, unit="u")
    data = [("one", 0), ("two", 1)], [("asked", 1)]
    page = make_page("t", scores, *data, predictions=[1], class_names=["no", "yes\u202e"])
    of_hits = make_hits_page("t", {"helpful": scores.helpful(1), "harmful": scores.harmful(1)})
    for text in (Reader(render(page)).text, Reader(render(of_hits)).text):
        assert "id first/3" in text
        assert "id second\\u202e/b" in text
        assert "Query 7" in text
        assert "\u202e" not in text
    assert "label yes\\u202e id second" in Reader(render(page)).text
    assert "np.int64" not in page._repr_html_()


def test_text_inputs_are_shown_as_text():
    scores = Scores(np.array([[1.0]]), [0], [0], unit="u")
    data = [("a training sentence", 1)], [("a query sentence", 0)]
    html = render(make_page("t", scores, *data, predictions=[1], class_names={0: "bad", 1: "good"}))
    assert "a training sentence" in html
    assert "a query sentence" in html
    assert 'class="wrong"' in html  # predicted good, labelled bad


def test_charts_hold_every_mark():
    checks = (Check("one", -1.0, -0.5, 0.3, 4, "v"), Check("two", 0.1, 2.0, 0.5, 4, "v"), Check("none", 0, 0, 0, 1, ""))
    html = render(Page("t", "u", (), checks=checks))
    places = [float(x) for x in re.findall(r"(?:left|right):(-?[\d.]+)%", html)]
    assert len(places) == 3 * 5
    assert all(0 <= place <= 100 for place in places)
    assert "predicted −1.00, actual −0.500 with standard error 0.300" in html


def test_report_is_written_where_asked(tmp_path):
    path = write_report(small_page(), tmp_path / "new" / "page.html")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


PICTURES = {
    "rows": np.arange(12).reshape(3, 4),
    "channel first": np.random.default_rng(0).random((3, 5, 4)),
    "one channel": torch.rand(1, 5, 4),
    "channel last": torch.rand(5, 4, 3),
    "one channel last": np.zeros((5, 4, 1), dtype=np.uint8),
    "half precision": torch.rand(5, 4).bfloat16(),
    "mask": np.eye(4, dtype=bool),
    "constant": torch.full((5, 4), 7.0),
    "not a number": np.array([[np.nan, 1.0], [0.0, 2.0]]),
    "pillow": Image.new("P", (4, 5)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_encoded(name):
    value = PICTURES[name]
    uri = image_uri(value)
    image = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    expected = {"rows": (4, 3), "mask": (4, 4), "not a number": (2, 2)}.get(name, (4, 5))
    assert image.size == expected


def test_pixels_keep_their_place_and_order():
    value = np.array([[0.0, 1.0], [2.0, 4.0]])
    image = Image.open(io.BytesIO(base64.b64decode(image_uri(value).split(",")[1])))
    assert np.array_equal(np.asarray(image), [[0, 64], [128, 255]])
    whole = np.array([[0, 200], [100, 255]])
    image = Image.open(io.BytesIO(base64.b64decode(image_uri(whole).split(",")[1])))
    assert np.array_equal(np.asarray(image), whole)


@pytest.mark.parametrize("value", ["text", 3, None, np.zeros(5), np.zeros((2, 5, 4)), np.zeros((0, 3)), {"x": 1}])
def test_other_values_are_no_pictures(value):
    assert image_uri(value) is None


@pytest.mark.parametrize(("module", "call"), [("jinja2", lambda: render(small_page())), ("PIL", lambda: image_uri(1))])
def test_a_missing_extra_is_named(monkeypatch, module, call):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"source-proj\[demo\]"):
        call()


def test_no_text_turns_what_stands_beside_it():
    """Whatever strangers wrote: texts, notes, names of methods and segments, facts."""
    mark = "\u202e\x00"
    scores = Scores(np.array([[1.0, -1.0]]), [0], [0, 1], unit=f"unit{mark}")
    page = make_page(
        f"title{mark}", scores, [(f"text{mark}", 0), ("b", 1)], [(f"asked{mark}", 1)],
        notes=[f"note{mark}"], method=f"method{mark}", others={f"other{mark}": scores},
    )  # fmt: skip
    page = replace(page, summary=f"summary{mark}", facts=((f"fact{mark}", f"value{mark}"),))
    text = render(page)
    assert not set(mark) & set(text)
    for word in ("title", "unit", "text", "asked", "note", "method", "other", "summary", "fact", "value"):
        assert f"{word}\\u202e\\x00" in text


def test_what_scores_know_of_their_examples_is_on_the_page():
    """As they do where `bank.examples` was set; and examples that were described once are not described again."""
    train = Examples([("good", 1), ("bad", 0), ("fine", 1), ("poor", 0)], class_names=["no", "yes"])
    shown = Shown(train, train.like([("great", 1), ("dull", 0)]))
    page = make_page("Why?", small_scores(shown=shown))
    assert [(s.example.text, s.example.label) for s in page.sections] == [("great", "yes"), ("dull", "no")]
    assert [hit.example.text for hit in page.sections[0].helpful] == ["good", "fine"]
    assert make_page("Why?", small_scores(), train, [("great", 1), ("dull", 0)]) == page
    with pytest.raises(ValueError, match=r"bank\.examples = sp\.Examples"):
        make_page("Why?", small_scores())
    with pytest.raises(ValueError, match="queries="):
        make_page("Why?", small_scores(), train)
    with pytest.raises(ValueError, match="have theirs"):
        make_page("Why?", small_scores(), train, [("great", 1), ("dull", 0)], class_names=["a", "b"])
