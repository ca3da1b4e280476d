"""Banks of text files: what they know of their texts, wherever and whenever they are asked."""

import json
import warnings

import pytest
import test_text
from test_text import TEXTS, build, call
from typer.testing import CliRunner

import source_proj as sp
from source_proj.cli import app
from source_proj.integrations import TextData, TextSettings, load_pretrained

run = test_text.run  # the fixture


def test_queries_asked_from_another_folder_are_of_the_same_texts(run, tmp_path, monkeypatch):
    """Files of the same names lie there, too."""
    _, directory = run
    monkeypatch.chdir(directory)
    made = ("--hf-run", "run", "--hf-model", "model", "--sketch-dim", 64, "--batch-size", 8, "--no-progress")
    call("build", tmp_path / "bank", *made, "--dataset", "train.jsonl")
    there = call("top-k", tmp_path / "bank", "--dataset", "queries.jsonl", "--no-progress")
    other = tmp_path / "other"
    other.mkdir()
    lines = (directory / "train.jsonl").read_text().splitlines()
    (other / "train.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    (other / "model").mkdir()
    monkeypatch.chdir(other)
    assert call("top-k", tmp_path / "bank", "--dataset", directory / "queries.jsonl", "--no-progress") == there


@pytest.mark.filterwarnings("default:.*is no longer the file")  # which a command says
def test_texts_that_were_changed_since_are_not_shown(run, tmp_path):
    _, directory = run
    file = directory / "changing.jsonl"
    lines = (directory / "train.jsonl").read_text().splitlines(keepends=True)
    file.write_text("".join(lines))
    build(directory, tmp_path / "bank", file="changing.jsonl")
    asked = ("top-k", tmp_path / "bank", "--dataset", directory / "queries.jsonl", "--no-progress")
    assert TEXTS[0] in call(*asked)
    file.write_text("".join(reversed(lines)))
    said = CliRunner().invoke(app, [str(word) for word in asked])
    assert "is no longer the file that" in said.stderr
    assert "shown by their ids alone" in said.stderr
    assert not any(text in said.stdout for text in TEXTS[:20] if len(text.split()) > 3)


def test_a_finished_bank_keeps_its_settings(run, tmp_path):
    _, directory = run
    build(directory, tmp_path / "bank")
    before = TextSettings.read(tmp_path / "bank")
    build(directory, tmp_path / "bank", "--max-length", 9)  # no text is longer: nothing to do
    assert TextSettings.read(tmp_path / "bank") == before
    (tmp_path / "bank.text.json").unlink()  # as by a kill in between
    build(directory, tmp_path / "bank")
    assert TextSettings.read(tmp_path / "bank") == before


def test_options_of_the_task_that_the_model_has(run, tmp_path):
    kind, directory = run
    if kind == "classification":  # the run's own is another one
        said = build(directory, tmp_path / "bank", "--task-option", "label_smoothing=0.3", code=1)
        assert "trained with label smoothing 0.0" in said
    else:
        build(directory, tmp_path / "bank", "--task-option", "reduction=sum")
        assert sp.open(tmp_path / "bank").task_spec["reduction"] == "sum"
    assert "has no option ['depth']" in build(directory, tmp_path / "b", "--task-option", "depth=3", code=2)


def test_scores_of_texts_are_corrected_by_whole_gradients(run, tmp_path):
    _, directory = run
    build(directory, tmp_path / "bank")
    asked = ("top-k", tmp_path / "bank", "--dataset", directory / "queries.jsonl", "-k", 2, "--json", "--no-progress")
    corrected = json.loads(call(*asked, "--rerank", 5))
    model, words = load_pretrained(str(directory / "run" / "checkpoint-8"))
    settings = TextSettings.read(tmp_path / "bank")
    bank = sp.open(tmp_path / "bank")
    bank.examples = sp.Examples(TextData(directory / "train.jsonl", settings, model, words))
    queries = TextData(directory / "queries.jsonl", settings, model, words)
    hits = sp.Source(bank, model=model, progress=False).helpful(queries, 2, rerank=5)
    assert [[hit["id"] for hit in query["helpful"]] for query in corrected["queries"]] == hits.indices.tolist()


def test_a_class_is_no_target_of_a_language_model(run, tmp_path):
    kind, directory = run
    build(directory, tmp_path / "bank")
    asked = ("top-k", tmp_path / "bank", "--dataset", directory / "queries.jsonl", "--no-progress", "--target", 1)
    if kind == "language":
        assert "--target of a language model is label or predicted, got the class 1" in call(*asked, code=2)
    else:
        call(*asked)


def test_a_weight_that_is_no_number_is_named(run, tmp_path):
    _, directory = run
    build(directory, tmp_path / "bank")
    rows = [{"text": TEXTS[i], "label": "good", "w": weight} for i, weight in enumerate((1.0, "much"))]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    asked = ("--dataset", tmp_path / "asked.jsonl", "--weight-column", "w", "--no-progress")
    assert "the weight of query 2 is 'much'" in call("curate", "harmful", tmp_path / "bank", *asked, code=1)


def test_a_file_is_appended_and_its_texts_are_known(run, tmp_path):
    _, directory = run
    lines = (directory / "train.jsonl").read_text().splitlines(keepends=True)
    for name, some in (("first", lines[:12]), ("more", lines[12:17]), ("last", lines[17:20])):
        (tmp_path / f"{name}.jsonl").write_text("".join(some))
    bank, told = tmp_path / "bank", ("--batch-size", 4, "--no-progress", "--json")
    model = ("--hf-model", directory / "model", "--sketch-dim", 64, "--segments", 1, "--batch-size", 4, "--no-progress")
    weights = directory / "run" / "checkpoint-8" / "model.safetensors"
    run_of = ("--checkpoint", f"8={weights}", "--lr", 0.01)
    call("build", bank, *model, *run_of, "--dataset", tmp_path / "first.jsonl")
    first = json.loads(call("append", bank, "--dataset", tmp_path / "more.jsonl", *told))
    assert (first["appended"], first["examples"], first["finalized"]) == (5, 17, True)
    again = json.loads(call("append", bank, "--dataset", tmp_path / "more.jsonl", *told))
    assert (again["appended"], again["examples"]) == (0, 17)
    assert "3 examples appended, 20 in all" in call("append", bank, "--dataset", tmp_path / "last.jsonl", *told[:3])

    whole = tmp_path / "whole"
    call("build", whole, *model, *run_of, "--dataset", directory / "train.jsonl")
    asked = ("--dataset", directory / "queries.jsonl", "--no-progress", "--json", "-k", 3)
    shown, expected = (json.loads(call("top-k", each, *asked))["queries"] for each in (bank, whole))
    for query, other in zip(shown, expected, strict=True):
        for side in ("helpful", "harmful"):
            assert [hit["id"] for hit in query[side]] == [hit["id"] for hit in other[side]]
            assert [hit["text"] for hit in query[side]] == [TEXTS[hit["id"]] for hit in query[side]]
    assert "one or the other" in call("append", bank, "--dataset", "x.jsonl", "--model", "a:b", code=2)


def test_a_language_models_bank_has_no_classes(run, tmp_path):
    kind, directory = run
    build(directory, tmp_path / "bank", "--segments", 1)
    options = ("curate", "mislabelled", tmp_path / "bank", "--file", directory / "train.jsonl", "--no-progress")
    if kind == "language":
        assert "is a language model's bank, whose examples have no classes" in call(*options, code=2)
    else:  # and the texts' own labels are found where they lie
        assert call(*options, "-n", 3, "--json") == call(*options[:3], "-n", 3, "--json", "--no-progress")


def test_a_training_set_in_another_order_is_refused_before_records_are_dropped(run, tmp_path):
    _, directory = run
    lines = (directory / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines))
    build(directory, tmp_path / "bank", "--segments", 1, file=tmp_path / "train.jsonl")

    def drop(order, *words, code=0):
        (tmp_path / "other.jsonl").write_text("".join(order))
        out = ("--file", tmp_path / "other.jsonl", "--out", tmp_path / "out.jsonl", "--overwrite")
        return call("curate", "duplicates", tmp_path / "bank", "--no-progress", *out, *words, code=code)

    place = next(i for i in range(1, len(lines)) if TEXTS[i] != TEXTS[0])
    swapped = [lines[place], *lines[1:place], lines[0], *lines[place + 1 :]]
    message = drop(swapped, code=1)
    for words in ("record 1 of", repr(TEXTS[0]), repr(TEXTS[place]), str(tmp_path / "train.jsonl"), "same order"):
        assert words in message
    assert "has 19 records, and the bank 20" in drop(lines[:-1], code=1)
    assert not (tmp_path / "out.jsonl").exists()
    drop(lines)
    drop([json.dumps({**json.loads(line), "label": "bad"}) + "\n" for line in lines])  # labels were corrected
    (tmp_path / "train.jsonl").write_text("".join(swapped))
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # the command prints it: texts can't be shown, and records can be dropped
        drop(lines)
    own = ("--file", tmp_path / "train.jsonl", "--out", tmp_path / "own.jsonl")
    message = call("curate", "duplicates", tmp_path / "bank", "--no-progress", *own, code=1)
    assert "is no longer the file" in message
    assert "put the file back as it was" in message
