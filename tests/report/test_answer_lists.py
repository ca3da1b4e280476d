"""Lists of helpful and harmful examples where there are fewer of a kind than were asked for."""

import numpy as np
import pytest

from source_proj.attribution.scores import Scores
from source_proj.cli.answers import Answer
from source_proj.report import make_hits_page


@pytest.fixture(params=[True, False], ids=["higher_is_better", "lower_is_better"])
def scores(request):
    """Of queries with none, some and all of 12 examples above zero, one with zeros."""
    values = np.random.default_rng(3).normal(size=(5, 12))
    values[0], values[1], values[2] = abs(values[0]), -abs(values[1]), 0
    values[3, 4:] = abs(values[3, 4:])
    return Scores(
        values, list("abcde"), list(range(12)), unit="logit margin", higher_is_better=request.param
    )  # fmt: skip


def test_pages_list_what_helped_and_what_harmed_each_by_its_own_list(scores):
    k = 4
    page = make_hits_page("title", {"helpful": scores.helpful(k), "harmful": scores.harmful(k)})
    for section, values in zip(page.sections, scores.values, strict=True):
        good = values if scores.higher_is_better else -values
        order = np.argsort(-good, kind="stable")
        expected_helpful = [int(i) for i in order[:k] if good[i] > 0]
        expected_harmful = [int(i) for i in order[::-1][:k] if good[i] < 0]
        assert [entry.example.id for entry in section.helpful] == expected_helpful
        assert [entry.example.id for entry in section.harmful] == expected_harmful


def test_terminal_and_json_say_which_way_every_example_went(scores):
    k = 4
    answer = Answer({"helpful": scores.helpful(k), "harmful": scores.harmful(k)}, "SOURCE")
    blocks = answer.text().split("\nquery ")[1:]
    for block, entry, values in zip(blocks, answer.as_json()["queries"], scores.values, strict=True):
        good = values if scores.higher_is_better else -values
        for name, sign in (("helpful", 1), ("harmful", -1)):
            there = int((good * sign > 0).sum())
            part = block[block.index(f"most {name}") :].split("most ")[1]
            assert part.startswith(name + ("\n" if there else ": none; the least "))
            assert [each["towards"] == name for each in entry[name]] == [i < there for i in range(k)]
            other = {"helpful": "harmful", "harmful": "helpful"}[name]
            marks = [("neither" in line, f"{other} " in line) for line in part.splitlines()[1 : k + 1]]
            assert len(marks) == k
            assert all((zero or wrong) == (place >= there) for place, (zero, wrong) in enumerate(marks))
