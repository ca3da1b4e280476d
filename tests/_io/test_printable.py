"""Words of strangers reach no terminal as commands and no spreadsheet as formulas."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from source_proj._io.printable import csv_cell, printable


@given(st.text(alphabet=st.characters(codec=None), max_size=30))
def test_what_is_printed_is_visible_text(text):
    shown = printable(text)
    assert all(unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in shown)
    shown.encode("utf-8")


@given(st.text(alphabet=st.characters(categories=["L", "N", "P", "S", "Zs"]), max_size=30))
def test_visible_text_stays(text):
    assert printable(text) == text


def naive(text):
    hidden = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    return "".join(
        character.encode("unicode_escape").decode() if unicodedata.category(character) in hidden else character
        for character in text
    )


@given(st.text(alphabet=st.characters(codec=None), max_size=5) | st.text(alphabet="ab \n\x1b\u202e\xa0", max_size=9))
def test_text_that_is_taken_whole_is_as_character_by_character(text):
    assert printable(text) == naive(text)


@given(
    st.sampled_from(["=", "+", "-", "@", "\t=", " =", "\r@", "|", "%", "＝", "＋", "－", " ＠"]), st.text(max_size=10)
)
def test_a_cell_begins_as_no_formula(start, rest):
    cell = csv_cell(start + rest)
    assert cell[0] in "'\\"  # an apostrophe, or the escape of a control character


@given(st.integers() | st.floats())
def test_numbers_stay_numbers(value):
    assert csv_cell(value) is value
