"""Texts are read alike from every file and from every kind of data set in memory."""

import csv
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_text import LABELS, TEXTS, build, call, run  # noqa: F401 (a fixture)

import source_proj as sp
from source_proj import MismatchError
from source_proj.integrations import TextBank, load_pretrained
from source_proj.integrations.text_rows import text_rows

# What str.splitlines takes for the end of a line, and CSV and JSON do not.
TEXT = st.text(st.sampled_from('ab ",\n\x0b\x0c\x1c\x85\u2028\u2029é'), min_size=1, max_size=8)


@given(
    st.lists(st.fixed_dictionaries({"text": TEXT, "label": st.sampled_from("01")}), min_size=1, max_size=4),
    st.booleans(),
)
def test_lines_end_where_the_format_says(tmp_path_factory, rows, marked):
    folder = tmp_path_factory.mktemp("files")
    encoding = "utf-8-sig" if marked else "utf-8"
    with (folder / "d.csv").open("w", newline="", encoding=encoding) as file:
        table = csv.DictWriter(file, ["text", "label"], quoting=csv.QUOTE_MINIMAL)
        table.writeheader()
        table.writerows(rows)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "d.jsonl").write_bytes(lines.encode(encoding))
    assert text_rows(folder / "d.csv")[1] == rows
    assert text_rows(str(folder / "d.jsonl"))[1] == rows
    assert text_rows(rows)[1] == rows


def test_frames_and_data_sets_are_rows(tmp_path):
    pandas = pytest.importorskip("pandas")
    datasets = pytest.importorskip("datasets", reason="needs datasets: install source-proj[datasets]")
    rows = [{"text": "a", "label": 1}, {"text": None, "label": 0}]
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(str(tmp_path / "saved"))
    data.to_parquet(tmp_path / "d.parquet")
    for given_data in (pandas.DataFrame(rows), data, tmp_path / "saved", tmp_path / "d.parquet"):
        assert text_rows(given_data)[1] == rows
    with pytest.raises(TypeError, match=r"splits \['train'\]: give one of them"):
        text_rows(datasets.DatasetDict({"train": data}))
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(MismatchError, match=r"splits'?: it holds the splits \['train'\]: give .*splits/train'"):
        text_rows(tmp_path / "splits")
    assert text_rows(tmp_path / "splits" / "train")[1] == rows
    with pytest.raises(TypeError, match="list has no named columns"):
        text_rows(["a", "b"])


def test_queries_in_memory_are_tokenised_as_the_banks_were(run, tmp_path):  # noqa: F811
    pandas = pytest.importorskip("pandas")
    _, directory = run
    build(directory, tmp_path / "bank", "--hf-model", directory / "model")
    rows = [{"text": TEXTS[i], "label": "good" if LABELS[i] else "bad"} for i in range(20, 24)]
    expected = TextBank(tmp_path / "bank").read(directory / "queries.jsonl", labelled=True)
    for queries in (rows, pandas.DataFrame(rows)):
        made = TextBank(tmp_path / "bank").read(queries, labelled=True)
        for i in range(4):
            assert all(torch.equal(made[i][name], expected[i][name]) for name in expected[i])
    model, _ = load_pretrained(str(directory / "model"))
    scores = sp.Source(sp.open(tmp_path / "bank"), model=model, progress=False).score(made)
    call(
        "score",
        tmp_path / "bank",
        "--dataset",
        directory / "queries.jsonl",
        "--out",
        tmp_path / "s.npy",
        "--no-progress",
    )
    assert np.array_equal(np.load(tmp_path / "s.npy"), scores.to_numpy())
