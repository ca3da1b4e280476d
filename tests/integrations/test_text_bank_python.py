"""Banks of text files in Python: opened with model, tokenizer and texts; documents token by token."""

import json
import re

import numpy as np
import pytest
import test_text
from test_text import TEXTS, build, call
from torch.utils.data import Subset

import source_proj as sp
from source_proj.integrations import TextBank

run = test_text.run  # the fixture


@pytest.fixture
def texts(run, tmp_path):
    build(run[1], tmp_path / "bank")
    return TextBank(tmp_path / "bank")


def test_a_bank_of_texts_is_opened_with_all_that_questions_need(run, texts, tmp_path):
    """Lists, their words and their corrections are those of the command."""
    queries = run[1] / "queries.jsonl"
    source = sp.Source(texts.bank, model=texts.model, progress=False)
    for options, arguments in (({}, ()), ({"rerank": 5}, ("--rerank", 5))):
        asked = ("top-k", texts.bank.path, "--dataset", queries, "-k", 2, "--json", "--no-progress", *arguments)
        told = json.loads(call(*asked))
        hits = source.helpful(texts.read(queries), 2, **options)
        for q, query in enumerate(told["queries"]):
            assert [hit["id"] for hit in query["helpful"]] == hits.ids[q]
            assert [hit["text"] for hit in query["helpful"]] == [hits.train_example(q, rank).text for rank in range(2)]
            assert query["text"] == hits.query_example(q).text
    assert hits.train_example(0, 0).text in str(hits)
    assert repr(texts).startswith(f"TextBank(Bank({str(texts.bank.path)!r}")


def test_what_labels_queries_have_is_seen_or_said(run, texts):
    kind, _ = run
    row = {"text": TEXTS[0], "label": "good"}
    assert "labels" in texts.read([row])[0]
    assert "labels" not in texts.read([row], labelled=False)[0]
    if kind == "classification":
        assert "labels" not in texts.read([{"text": TEXTS[0]}])[0]
        with pytest.raises(sp.MismatchError, match="'label'"):
            texts.read([{"text": TEXTS[0]}], labelled=True)


def test_documents_are_split_into_words(run, texts):
    kind, directory = run
    if kind == "classification":
        with pytest.raises(TypeError, match="queries of CausalLM alone"):
            sp.Source(texts.bank, model=texts.model).by_token(
                texts.read(directory / "queries.jsonl"), texts.training_set
            )
        return
    source = sp.Source(texts.bank, model=texts.model, progress=False)
    queries, places = texts.read(directory / "queries.jsonl"), [3, 0, 7]
    parts = source.by_token(queries, Subset(texts.training_set, places), ids=places)
    for document, place in enumerate(places):
        words = parts.tokens(document)
        ids = texts.training_set[place]["input_ids"].tolist()
        assert words == [texts.tokenizer.decode([token]) for token in ids]
        assert all(
            word.strip() in TEXTS[place] for t, word in enumerate(words) if parts.present[t : t + 1, document].any()
        )
    counted = [range(1 + max(np.flatnonzero(parts.present[:, document]))) for document in range(3)]
    frame = parts.to_pandas(tokens=True)
    assert list(frame.columns) == [*parts.to_pandas().columns, "token"]
    for line in frame.sample(20, random_state=0).itertuples():
        assert line.token == parts.tokens(places.index(line.train_id))[int(line.part)]
        query = parts.query_ids.index(line.query_id)
        assert line.score == parts.values[int(line.part), query, places.index(line.train_id)]
    said, page = str(parts), parts._repr_html_()
    best = int(np.argmax(parts.total().values[0]))
    strongest = int(np.argmax(np.abs(parts.values[:, 0, best])))
    line = said.splitlines()[4]
    assert line.strip().startswith(f"“{parts.tokens(best)[strongest].strip()}” ({strongest}) ")
    assert page.count('<span style="background') == sum(len(present) for present in counted)
    seen = " ".join(re.sub(r"<[^>]*>", "", page.replace("</td>", " ")).split())  # as a reader sees it
    assert parts.shown.queries.show(0, 0).text in seen
    assert all(TEXTS[place][: len(TEXTS[place]) // 2] in seen for place in places)


def test_words_that_are_not_known_are_positions(run, texts):
    kind, directory = run
    if kind == "classification":
        return
    texts.bank.examples, documents = None, Subset(texts.training_set, [2])
    source = sp.Source(texts.bank, model=texts.model, progress=False)
    parts = source.by_token(texts.read(directory / "queries.jsonl"), documents)
    assert parts.tokens() is None
    assert "token 1 " in str(parts)
    assert "background" not in parts._repr_html_()
    with pytest.raises(ValueError, match=r"sp.Examples\(train_set, tokenizer="):
        parts.to_pandas(tokens=True)


def test_parts_by_segment_are_said_in_words(run, texts):
    source = sp.Source(texts.bank, model=texts.model, segments=2, progress=False)
    parts = source.by_segment(texts.read([{"text": TEXTS[0], "label": "good"}]))
    said = str(parts).splitlines()
    assert said[0] == repr(parts)
    assert all(f"segment {name} " in said[4] for name in parts.names)
    assert parts.tokens() is None


@pytest.mark.filterwarnings("default:.*is no longer the file")
def test_texts_that_changed_are_no_documents(run, tmp_path):
    _, directory = run
    file = directory / "altered.jsonl"
    file.write_text((directory / "train.jsonl").read_text())
    build(directory, tmp_path / "bank", file="altered.jsonl")
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    with pytest.warns(UserWarning, match="shown by their ids alone"):
        texts = TextBank(tmp_path / "bank")
    with pytest.raises(sp.MismatchError, match="no longer the file"):
        _ = texts.training_set
    file.unlink()
    with pytest.raises(sp.MismatchError, match="put it back"):
        _ = texts.training_set
    with pytest.raises(sp.BankError, match="no bank"):
        TextBank(tmp_path / "other")
