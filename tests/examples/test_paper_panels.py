from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import source_proj as sp

EXAMPLES = Path(__file__).parents[2] / "examples"
pytest.importorskip("jinja2")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def _examples_importable(monkeypatch):
    for folder in (EXAMPLES, EXAMPLES / "paper"):
        monkeypatch.syspath_prepend(str(folder))


def show_image(which, index):
    shade = 10 * index + (5 if which == "queries" else 0)
    return np.full((4, 4, 3), shade, dtype=np.uint8), f"class {index % 2}"


def show_text(which, index):
    return f"first | of {which} {index}\nsecond <of> it", "same" if index % 2 else "other"


def small_problem(panel, show, **options):
    shared = {
        "name": "tiny", "title": "Tiny", "panel": panel, "show": show, "n": 8, "task": sp.Classification(),
        "queries": range(3), "train_sets": {"first": range(8), "second": range(5)},
    }  # fmt: skip
    return SimpleNamespace(**{**shared, **options})


def small_scores(columns=8):
    values = np.random.default_rng(0).standard_normal((2, 3, columns))
    return {"SOURCE": sp.Scores(values[0], range(3), range(columns), unit="logit margin"), "TRAK": values[1]}


def test_lists_are_sorted_and_of_the_first_stage():
    from _panels import make_panels

    scores = small_scores(columns=8 + 5)  # the second stage's five, which are strongest, are not shown
    scores["SOURCE"].values[:, 8:] = 100
    page = make_panels(small_problem("image", show_image), scores, [2, 0])
    assert [section.example.id for section in page.sections] == [2, 0]
    for section, query in zip(page.sections, [2, 0], strict=True):
        for method, lists in [("SOURCE", section), ("TRAK", section.others[0])]:
            row = np.asarray(scores[method])[query, :8]
            expected = sorted((column for column in range(8) if row[column] > 0), key=lambda column: -row[column])[:5]
            assert [hit.example.id for hit in lists.helpful] == expected
            expected = sorted((column for column in range(8) if row[column] < 0), key=lambda column: row[column])[:5]
            assert [hit.example.id for hit in lists.harmful] == expected
            assert all(hit.score == pytest.approx(row[hit.example.id]) for hit in lists.helpful + lists.harmful)
            assert all(hit.example.label == f"class {hit.example.id % 2}" for hit in lists.helpful)


def test_helpful_follows_the_task():
    from _panels import make_panels

    task = sp.Regression()
    assert not task.higher_is_better
    page = make_panels(small_problem("image", show_image, task=task), {"TRAK": small_scores()["TRAK"]}, [0])
    assert all(hit.score < 0 for hit in page.sections[0].helpful)
    assert page.unit == task.unit


def test_pictures_become_one_png(tmp_path):
    from _panels import write_panels

    png = write_panels(small_problem("image", show_image), small_scores(), tmp_path, [1, 2])
    assert [path.name for path in tmp_path.iterdir()] == ["tiny_panels.png"]
    picture = Image.open(png)
    assert picture.mode == "P"  # a palette: it is small enough to be committed
    pixels = np.asarray(picture.convert("RGB"))
    flat = {tuple(colour) for colour in np.unique(pixels.reshape(-1, 3), axis=0).tolist()}
    for query in (1, 2):  # the query's own shade, and those of its examples, are in the picture
        assert (10 * query + 5,) * 3 in flat
        for values in small_scores().values():
            best = int(np.asarray(values)[query].argmax())
            assert (10 * best,) * 3 in flat


def test_texts_become_tables(tmp_path):
    from _panels import write_panels

    scores = small_scores()
    markdown = write_panels(small_problem("text", show_text), scores, tmp_path, [0])
    text = markdown.read_text(encoding="utf-8")
    best = int(np.asarray(scores["TRAK"])[0].argmax())
    assert f"| first \\| of first {best}<br>second &lt;of&gt; it | {'same' if best % 2 else 'other'} | +" in text
    assert "> first \\| of queries 0<br>second" in text
    assert "−" in text
    for table in text.split("\n\n"):  # every row has as many cells as its header
        rows = [row.replace("\\|", "") for row in table.splitlines() if row.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1


def test_long_texts_are_cut_in_tables_only(tmp_path):
    from _panels import LONGEST, write_panels

    def show(which, index):
        return "word " * 100, "label"

    markdown = write_panels(small_problem("text", show), {"TRAK": small_scores()["TRAK"]}, tmp_path, [0])
    query, *rows = [line for line in markdown.read_text(encoding="utf-8").splitlines() if "word" in line]
    assert "…" not in query
    assert rows
    assert all("…" in row and len(row) < 2 * LONGEST + 60 for row in rows)


@pytest.mark.parametrize(
    ("problem", "scores", "queries", "message"),
    [
        ({"panel": None}, small_scores(), [0], "panel=None"),
        ({"show": None}, small_scores(), [0], "and show"),
        ({}, {}, [0], "no scores"),
        ({}, small_scores(), [3], r"from 0 to 2, got \[3\]"),
        ({}, small_scores(), [], r"got \[\]"),
        ({}, {"TRAK": np.ones((3, 7))}, [0], r"scores 'TRAK' of shape \(3, 7\)"),
        ({}, {"TRAK": np.ones((2, 8))}, [0], r"scores 'TRAK' of shape \(2, 8\)"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, problem, scores, queries, message):
    from _panels import write_panels

    made = small_problem(**{"panel": "image", "show": show_image, **problem})
    with pytest.raises(ValueError, match=message):
        write_panels(made, scores, tmp_path, queries)
    assert not list(tmp_path.iterdir())
