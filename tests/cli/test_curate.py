"""``source-proj curate``: the library's own cleanings, their files, and their judge."""

import csv
import json
import re

import numpy as np
import pytest
from command_line import ASK

import source_proj as sp
from source_proj import curate
from source_proj.integrations import TextSettings

JUDGE = """
import numpy as np

def train(kept, seed):
    return np.isin(3, kept), seed

def evaluate(model):
    return 1.0 - float(model[0]) + 0.001 * model[1]

text = "no function"
"""


@pytest.fixture(scope="module", autouse=True)
def files(home):
    import mine

    inputs, labels = mine.train_set().tensors
    rows = [
        [*(f"{value:.4f}" for value in row), f'class "{label}"\r\n'] for row, label in zip(inputs, labels, strict=True)
    ]
    with (home / "train.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows([["a", "b", "c", "d", "e", "label"], *rows])
    (home / "judge.py").write_text(JUDGE)
    return rows


@pytest.fixture
def source(home, monkeypatch):
    monkeypatch.chdir(home)
    import mine

    return sp.Source(sp.open("bank"), model=mine.model(), progress=False)


def cleaned_rows(path):
    with path.open(newline="", encoding="utf-8-sig") as file:
        return [row for row in csv.reader(file) if row][1:]


@pytest.mark.parametrize("verb", ["harmful", "drop-worst", "select", "mislabelled", "duplicates"])
def test_lists_and_files_are_those_of_the_library(verb, call, home, source, files, tmp_path):
    import mine

    labels = [row[-1] for row in files]
    summed = curate.aggregate(source, mine.queries())
    options, expected = {
        "harmful": ([*ASK, "--false-share", "0.5"], lambda: curate.harmful(summed, false_share=0.5)),
        "drop-worst": (
            [*ASK, "-n", "7", "--label-column", "label"], lambda: curate.drop_worst(summed, 7, labels=labels)
        ),
        "select": ([*ASK, "-n", "9"], lambda: curate.select(source, mine.queries(), n=9)),
        "mislabelled": (
            ["-n", "5", "--by", "disagreement"], lambda: curate.mislabelled(source, labels, n=5, by="disagreement")
        ),
        "duplicates": (["--threshold", "0.5"], lambda: curate.near_duplicates(source.banks[0], threshold=0.5)),
    }[verb]  # fmt: skip
    made = expected()
    out, listing = tmp_path / "clean.csv", tmp_path / "list.json"
    written = ["--file", "train.csv", "--out", out, "--list", listing]
    told = call("curate", verb, "bank", *options, *written, "--json")
    assert [(entry["id"], entry["reason"]) for entry in told["examples"]] == list(made)
    assert curate.Cleaning.load(listing).ids == made.ids
    assert cleaned_rows(out) == [files[place] for place in made.kept]
    again = tmp_path / "again.csv"
    assert "wrote" in call("curate", "clean", listing, "train.csv", again)
    assert again.read_bytes() == out.read_bytes()
    assert "exists" in call("curate", verb, "bank", *options, *written, code=2)
    shown = call("curate", verb, "bank", *options, *written, "--overwrite")
    assert shown.splitlines()[0] == repr(made)


def test_verify_tells_the_gain_by_the_users_functions(call, home, tmp_path):
    listing = tmp_path / "list.json"
    curate.Cleaning("by hand", [3], ["it is wrong"], {}, list(range(40))).save(listing)
    judge = ["--train", "judge:train", "--evaluate", "judge:evaluate", "--no-progress"]
    told = call("curate", "verify", listing, *judge, "--json")
    assert told["gain"]["mean"] == pytest.approx(1)
    assert np.allclose(told["measures"]["kept"], 1 + 0.001 * np.arange(5))
    assert told["verdict"].startswith("better than training on all examples")
    assert "kept - random" in call("curate", "verify", listing, *judge, "--seeds", 2)
    alone = call("curate", "verify", listing, *judge, "--seeds", 1, "--json")
    assert (alone["gain"]["mean"], alone["gain"]["low"]) == (1, None)  # JSON has no NaN
    refused = call("curate", "verify", listing, "--train", "judge:text", "--evaluate", "judge:evaluate", code=2)
    assert "--train 'judge:text' must name a function" in refused


def test_slips_are_named_before_any_work(call, home, tmp_path):
    assert "--out needs --file" in call("curate", "duplicates", "bank", "--out", tmp_path / "x.csv", code=2)
    assert "give --file FILE" in call("curate", "mislabelled", "bank", code=2)
    for option in ("--out", "--list"):
        words = ["duplicates", "bank", "--file", "train.csv", "--out", tmp_path / "x.csv", option, home / "train.csv"]
        assert f"is the training set itself, which is never replaced: give another {option}" in call(
            "curate", *words, "--overwrite", code=2
        )
    listing = tmp_path / "list.json"
    words = ["duplicates", "bank", "--file", "train.csv", "--list", listing]
    assert "are both" in call("curate", *words, "--out", listing, "--overwrite", code=2)
    assert "must end in .csv" in call("curate", *words, "--out", tmp_path / "x.jsonl", code=2)
    assert "new columns would change" in call("curate", *words, "--out", tmp_path / "x.csv", "--annotated", code=2)
    assert "--annotated needs --out" in call("curate", *words, "--annotated", code=2)
    assert "--file needs --out" in call("curate", *words, code=2)
    assert f"--out '{tmp_path}/no/x.csv': the directory" in call(
        "curate", *words, "--out", tmp_path / "no" / "x.csv", code=2
    )
    assert "--list 'no/list.json': the directory 'no' does not exist" in call(
        "curate", "duplicates", "bank", "--list", "no/list.json", code=2
    )
    (tmp_path / "short.csv").write_text("a,label\n1,2\n")
    short = ["duplicates", "bank", "--file", tmp_path / "short.csv", "--out", tmp_path / "x.csv", "--list", listing]
    assert "has 1 records" in call("curate", *short, code=1)
    assert [path.name for path in tmp_path.iterdir()] == ["short.csv"]  # neither is written where one cannot be
    assert "names a column of --dataset" in call("curate", "harmful", "bank", *ASK, "--group-column", "label", code=2)


@pytest.mark.parametrize("verb", [["mislabelled", "bank"], ["drop-worst", "bank", *ASK], ["select", "bank", *ASK]])
def test_labels_are_read_as_the_file_is_written(verb, call, files, tmp_path):
    written = {"comma.csv": (",", "utf-8"), "semicolon.csv": (";", "latin-1"), "tab.csv": (r"\t", "utf-8")}
    told = {}
    for name, (typed, encoding) in written.items():
        delimiter = typed.replace(r"\t", "\t")
        with (tmp_path / name).open("w", newline="", encoding=encoding) as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerows([["tête", "label"], *([row[0], f"né {row[-1]}"] for row in files)])
        options = ["-n", "5", "--label-column", "label", "--file", tmp_path / name, "--out", tmp_path / f"out-{name}"]
        told[name] = call("curate", *verb, *options, "--delimiter", typed, "--encoding", encoding, "--json")
        assert (tmp_path / f"out-{name}").read_text(encoding).startswith(f"tête{delimiter}label")
    assert told["comma.csv"]["examples"] == told["semicolon.csv"]["examples"] == told["tab.csv"]["examples"]


def test_the_column_that_a_bank_of_texts_was_told_is_that_of_its_labels(call, home, tmp_path):
    text = (home / "train.csv").read_bytes().decode("utf-8-sig")
    (tmp_path / "train.csv").write_bytes(text.replace("label", "kind", 1).encode())
    expected = call("curate", "mislabelled", "bank", "-n", "5", "--file", "train.csv", "--json")
    assert "has no 'label'" in call("curate", "mislabelled", "bank", "--file", tmp_path / "train.csv", code=1)
    beside = home / "bank.text.json"
    TextSettings("model", label="kind").write(home / "bank", {}, "digest")
    try:
        found = call("curate", "mislabelled", "bank", "-n", "5", "--file", tmp_path / "train.csv", "--json")
    finally:
        beside.unlink()
    assert found["examples"] == expected["examples"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty: its first line must name the columns"),
        ("a,a\n1,2\n", "the column 'a' is there twice"),
        ("a,b\n1,2,3\n", "record 1 has 3 fields"),
        ("a,b\n1,2\n", "example 1 of .* has no 'label', only"),
        ('a,label\n1,x\n2,""\n', "example 2 of .* has nothing in its column 'label': fill it in"),
    ],
)
def test_what_is_wrong_within_a_file_has_the_exit_code_of_bad_data(call, tmp_path, content, message):
    """As in ``build``: 2 is for what the command line says itself."""
    (tmp_path / "data.csv").write_text(content)
    assert re.search(message, call("curate", "mislabelled", "bank", "--file", tmp_path / "data.csv", code=1))
    assert "does not exist" in call("curate", "mislabelled", "bank", "--file", tmp_path / "no.csv", code=2)


def test_a_list_that_is_none_is_bad_data_too(call, home, tmp_path):
    refused = call("curate", "clean", tmp_path / "list.json", "train.csv", tmp_path / "x.csv", code=2)
    assert "list.json': give the file that Cleaning.save or --list wrote" in refused
    (tmp_path / "list.json").write_text(json.dumps({"format": "x"}))
    assert "holds no list" in call("curate", "clean", tmp_path / "list.json", "train.csv", tmp_path / "x.csv", code=1)


def test_outputs_that_are_there_are_named_all_at_once(call, home, tmp_path):
    for name in ("out.csv", "list.json"):
        (tmp_path / name).touch()
    told = ("--file", home / "train.csv", "--out", tmp_path / "out.csv", "--list", tmp_path / "list.json")
    message = call("curate", "mislabelled", "bank", *told, "--no-progress", code=2)
    assert all(f"{tmp_path / name} exists" in message for name in ("out.csv", "list.json"))


SHOWN = """
import mine
import source_proj as sp

def examples():
    return sp.Examples(mine.train_set(), class_names=["none", "one", "both"], columns=list("abcde"))

def unlabelled():
    return [inputs for inputs, _ in mine.train_set()]
"""


def test_labels_and_what_is_shown_come_of_data(call, home, source):
    """The labels of a data set of one's own had to be written to a file first, and examples were ids alone."""
    import mine

    (home / "shown.py").write_text(SHOWN)
    inputs, labels = mine.train_set().tensors
    named = curate.mislabelled(source, labels, n=4).ids
    words = ["curate", "mislabelled", "bank", "-n", "4", "--data", "shown:examples"]
    assert [entry["id"] for entry in call(*words, "--json")["examples"]] == named
    text, shown = call(*words), ["none", "one", "both"]
    for its_id in named:
        assert f"{its_id}: labelled {shown[labels[its_id]]}, " in text
        assert f"a={inputs[its_id, 0]:.4g}, " in text
    assert "a=" in call("curate", "duplicates", "bank", "--threshold", "0.9", "--data", "shown:examples")
    refused = call("curate", "mislabelled", "bank", "--data", "shown:unlabelled", code=1)
    assert "example 0 of --data 'shown:unlabelled' has no label" in refused
    assert "or --data MODULE:FUNCTION" in call("curate", "mislabelled", "bank", code=2)
    assert "name its training set" in call("curate", "duplicates", "bank", "--data", "mine:queries", code=1)


def test_lists_show_examples_as_they_say_themselves(call, home):
    """`Examples` were taken for a data set, whose examples could not be read."""
    (home / "shown.py").write_text(SHOWN)
    asked = ["top-k", "bank", *ASK, "-k", "1", "--data", "shown:examples"]
    assert re.search(r"label (none|one|both)  .*a=", call(*asked))
    assert "leave --picture out" in call(*asked, "--picture", "5x1", code=2)
