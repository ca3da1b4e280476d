"""The report in a real browser: from a phone to a wide screen every text and row has the room that it needs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import source_proj as sp
from source_proj.report import Check, make_page, write_report

WORDS = ["a", "film", "that", "knows", "what", "it", "wants", "says", "so", "without", "one", "word", "too", "many"]


def texts(count, seed):
    draws = np.random.default_rng(seed)
    made = [" ".join(draws.choice(WORDS, size=draws.integers(3, 40))) for _ in range(count)]
    return [(text, i % 2) for i, text in enumerate([*made[:-1], "unbroken" * 40])]


def rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(1000 * torch.randn(count, 9, generator=generator), torch.arange(count) % 2)


KINDS = {"text": (texts, None), "row": (rows, [f"a_column_of_a_long_name_{i}" for i in range(9)])}


@pytest.fixture(params=KINDS)
def address(request, tmp_path):
    make, columns = KINDS[request.param]
    values = np.random.default_rng(0).standard_normal((2, 12))
    scores = sp.Scores(values, ["a", "b"], list(range(12)), unit="logit margin")
    page = make_page("Why?", scores, make(12, 1), make(2, 2), columns=columns, predictions=[0, 1])
    return f"file://{write_report(page, tmp_path / 'page.html')}"


@pytest.mark.parametrize("width", [360, 1000, 3840])
def test_examples_have_room_and_nothing_has_to_be_scrolled_sideways(browser, address, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(address)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = page.locator(".text, .row").evaluate_all("boxes => boxes.map(box => [box.offsetWidth, box.scrollWidth])")
    assert len(boxes) > 12
    for own, needed in boxes:
        assert needed <= own
    names = page.locator(".row th").evaluate_all("cells => cells.map(cell => cell.offsetWidth)")
    assert all(name > 80 for name in names)  # a name is not broken letter by letter
    if width == 360:
        shares = page.locator(".tile p.text").evaluate_all(
            "all => all.map(p => p.offsetWidth / p.parentNode.offsetWidth)"
        )
        assert all(share > 0.9 for share in shares)
    page.close()


@pytest.mark.parametrize("width", [360, 1280])
def test_no_word_is_wider_than_the_page(browser, tmp_path, width):
    """Of what the model said, notes, ids and all that a caller wrote, one long word moved the whole page aside."""
    word = "unbroken" * 40
    values = np.random.default_rng(0).standard_normal((1, 6))
    scores = sp.Scores(values, [word], [f"{word}{i}" for i in range(6)], unit=word)
    data = [(word, word)] * 6, [(word, word)]
    page = make_page(word, scores, *data, predictions=[word], notes=[word], method=word, others={word: scores})
    check = Check(word, 0.5, 0.4, 0.1, 3, word)
    page = replace(page, summary=word, facts=((word, word),), checks=(check,), check_title=word, segments=(word,))
    shown = browser.new_page(viewport={"width": width, "height": 900})
    shown.goto(f"file://{write_report(page, tmp_path / 'page.html')}")
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    shown.close()


def test_a_text_begins_where_its_letters_do(browser, tmp_path):
    scores = sp.Scores(np.array([[1.0, 0.5]]), ["q"], [0, 1], unit="u")
    data = [("שלום, עולם!", 0), ("hello, world!", 1)], [("?", 0)]
    page = browser.new_page()
    page.goto(f"file://{write_report(make_page('t', scores, *data), tmp_path / 'page.html')}")
    shown = page.locator(".tile .text").evaluate_all("texts => texts.map(text => getComputedStyle(text).direction)")
    assert shown == ["rtl", "ltr"]
    page.close()
