"""A cleaning: what it names, what it leaves of data sets and files, and how it is kept."""

import codecs
import csv
import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Subset, TensorDataset

import source_proj as sp
from source_proj.curate import Cleaning
from source_proj.integrations.text_rows import text_rows

N = 7


def cleaning_of(named, n=N, selects=False, ids=None):
    ids = list(range(n)) if ids is None else ids
    reasons = [f"reason {place}" for place in named]
    return Cleaning("test", [ids[place] for place in named], reasons, {"value": np.array(named) / 2}, ids, selects)


NAMED = st.lists(st.integers(0, N - 1), unique=True, max_size=N)


@given(NAMED, st.booleans())
def test_dropped_and_kept_are_all_and_apart(named, selects):
    cleaning = cleaning_of(named, selects=selects)
    assert sorted([*cleaning.dropped, *cleaning.kept]) == list(range(N))
    assert set(cleaning.kept if selects else cleaning.dropped) == set(named)
    assert cleaning.apply(list(range(N))) == sorted(set(range(N)) - set(named)) if not selects else True
    assert [place for place, _ in cleaning.first(2)] == named[:2]
    assert cleaning.without(named[:1]).ids == named[1:]


@given(NAMED, st.booleans(), st.sampled_from(["numbers", "texts", "pairs"]))
def test_saved_and_loaded_it_is_the_same(tmp_path_factory, named, selects, kind):
    ids = {"numbers": range(N), "texts": [f"{i}\u202e\n" for i in range(N)], "pairs": [("train", i) for i in range(N)]}
    cleaning = cleaning_of(named, selects=selects, ids=list(ids[kind]))
    file = tmp_path_factory.mktemp("saved") / "list.json"
    cleaning.save(file)
    loaded = Cleaning.load(file)
    for name in ("what", "ids", "reasons", "train_ids", "selects"):
        assert getattr(loaded, name) == getattr(cleaning, name)
    assert loaded.values["value"].tolist() == cleaning.values["value"].tolist()
    with pytest.raises(FileExistsError):
        cleaning.save(file)
    cleaning.save(file, overwrite=True)


@pytest.mark.parametrize(
    "ids", [list(np.arange(3)), [("a", np.int64(i)) for i in range(3)], [("a", ("b", i)) for i in range(3)]]
)
def test_ids_of_a_saved_cleaning_are_those_that_were_named(tmp_path, ids):
    cleaning = cleaning_of([2, 0], 3, ids=ids)
    cleaning.save(tmp_path / "list.json")
    loaded = Cleaning.load(tmp_path / "list.json")
    assert (loaded.ids, loaded.train_ids) == (cleaning.ids, ids)
    assert loaded.dropped.tolist() == [0, 2]


@given(NAMED, st.sampled_from(["integers", "floats", "texts", "pairs"]))
def test_ids_of_numpy_are_saved_as_those_that_they_equal(tmp_path_factory, named, kind):
    ids = {
        "integers": list(np.arange(N)),
        "floats": list(np.arange(N) / 2),
        "texts": list(np.array([f"t{i}" for i in range(N)])),
        "pairs": [("train", i) for i in np.arange(N)],
    }[kind]
    cleaning = cleaning_of(named, ids=ids)
    file = tmp_path_factory.mktemp("saved") / "list.json"
    cleaning.save(file)
    loaded = Cleaning.load(file)
    assert (loaded.ids, loaded.train_ids) == (cleaning.ids, ids)
    assert loaded.kept.tolist() == cleaning.kept.tolist()


def test_ids_that_a_file_does_not_hold_are_refused_before_it_is_made(tmp_path):
    with pytest.raises(TypeError, match=r"an id in a file is a number, a string, .* of type bytes"):
        cleaning_of([0], n=1, ids=[b"a"]).save(tmp_path / "list.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": "other"}', '{"format": "source-proj cleaning 1"}'])
def test_what_is_no_list_is_refused(content, tmp_path):
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(sp.SourceProjError, match="holds no list of a cleaning"):
        Cleaning.load(tmp_path / "list.json")


def test_a_list_with_unknown_ids_is_refused(tmp_path):
    cleaning_of([1]).save(tmp_path / "list.json")
    content = json.loads((tmp_path / "list.json").read_text()) | {"ids": [99]}
    (tmp_path / "list.json").write_text(json.dumps(content))
    with pytest.raises(sp.SourceProjError, match=r"unknown training ids \[99\]"):
        Cleaning.load(tmp_path / "list.json")


@pytest.mark.parametrize(
    ("ids", "reasons", "values", "message"),
    [
        ([9], ["r"], {}, "unknown training ids"),
        ([1, 1], ["r", "r"], {}, "named twice"),
        ([1], [], {}, "1 ids and 0 reasons"),
        ([1], ["r"], {"value": np.zeros(2)}, "1 ids and 2 value"),
    ],
)
def test_what_does_not_fit_is_refused(ids, reasons, values, message):
    with pytest.raises(ValueError, match=message):
        Cleaning("test", ids, reasons, values, [0, 1, 2])


@given(st.lists(st.integers(0, N - 1), min_size=2, max_size=N + 2), st.booleans())
def test_a_repeated_training_id_is_refused_whatever_is_named(train_ids, selects):
    """It would stand for the last example that has it, and another one would be dropped."""
    named = list(dict.fromkeys(train_ids))[:2]
    arguments = ("test", named, ["r"] * len(named), {}, train_ids, selects)
    if len(set(train_ids)) == len(train_ids):
        cleaning = Cleaning(*arguments)
        places = cleaning.kept if selects else cleaning.dropped
        assert {train_ids[place] for place in places} == set(named)
        return
    with pytest.raises(ValueError, match=r"the training id \d stands for \d examples, .*an id of its own"):
        Cleaning(*arguments)
    with pytest.raises(ValueError, match="the training id"):
        Cleaning("test", [], [], {}, train_ids, selects)


def test_for_a_terminal_ids_and_reasons_are_harmless():
    shown = str(Cleaning("test", ["a\x1b[2J"], ["as \u202e says"], {}, ["a\x1b[2J"]))
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    many = str(cleaning_of(list(range(30)), n=40))
    assert many.endswith("... and 20 more")


def test_in_a_notebook_ids_and_reasons_are_a_table_of_harmless_text():
    shown = Cleaning("test", ["<script>\x1b"], ["as <b>\u202e"], {}, ["<script>\x1b"])._repr_html_()
    assert "<script" not in shown
    assert "<b>" not in shown
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert "&lt;script&gt;" in shown
    many = cleaning_of(list(range(30)), n=40)._repr_html_()
    assert many.count("<tr>") == 1 + 10
    assert "drops 30 of 40 examples). The first 10:" in many


def test_stages_are_taken_one_by_one(tmp_path):
    ids = [("first", 0), ("first", 1), ("second", 0)]
    cleaning = cleaning_of([2, 1], ids=ids, n=3)
    with pytest.raises(ValueError, match="take one by of_stage"):
        cleaning.apply([1, 2, 3])
    assert cleaning.of_stage("first").apply(["x", "y"]) == ["x"]
    assert cleaning.of_stage("second").ids == [0]
    with pytest.raises(ValueError, match="the stages are"):
        cleaning.of_stage("third")


def test_data_sets_in_memory(tmp_path):
    pandas = pytest.importorskip("pandas")
    cleaning = cleaning_of([5, 0])
    frame = pandas.DataFrame({"a": np.arange(N)}, index=[f"row {i}" for i in range(N)])
    assert cleaning.apply(frame)["a"].tolist() == [1, 2, 3, 4, 6]
    marked = cleaning.annotate(frame)
    assert marked["kept"].tolist() == [False, True, True, True, True, False, True]
    assert marked["reason"].tolist()[5] == "reason 5"
    assert marked.index.equals(frame.index)
    assert list(frame.columns) == ["a"]
    table = cleaning.to_pandas()
    assert table.to_dict("list") == {
        "id": [5, 0], "position": [5, 0], "value": [2.5, 0.0], "reason": ["reason 5", "reason 0"]
    }  # fmt: skip
    subset = cleaning.apply(TensorDataset(torch.arange(N)))
    assert isinstance(subset, Subset)
    assert [int(entry) for (entry,) in subset] == [1, 2, 3, 4, 6]
    with pytest.raises(sp.MismatchError, match="8 examples and the training set of the bank 7"):
        cleaning.apply(list(range(8)))
    with pytest.raises(ValueError, match="column 'kept' already"):
        cleaning.annotate(marked)
    with pytest.raises(TypeError, match="list has no columns"):
        cleaning.annotate(list(range(N)))


def test_data_sets_of_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs datasets: install source-proj[datasets]")
    cleaning = cleaning_of([5, 0])
    data = datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(N)], "label": [i % 2 for i in range(N)]})
    assert cleaning.apply(data)["text"][:] == ["t1", "t2", "t3", "t4", "t6"]
    splits = datasets.DatasetDict({"train": data, "test": data})
    applied = cleaning.apply(splits)
    assert isinstance(applied, datasets.DatasetDict)
    assert (len(applied["train"]), len(applied["test"])) == (N - 2, N)
    with pytest.raises(ValueError, match="no split 'dev'"):
        cleaning.apply(splits, split="dev")
    marked = cleaning.annotate(splits)["train"]
    assert marked["reason"][:] == ["reason 0", None, None, None, None, "reason 5", None]
    assert marked.features["label"] == data.features["label"]
    data.save_to_disk(str(tmp_path / "data"))
    cleaning.write(tmp_path / "data", tmp_path / "clean")
    assert datasets.load_from_disk(str(tmp_path / "clean"))["text"][:] == ["t1", "t2", "t3", "t4", "t6"]
    with pytest.raises(FileExistsError):
        cleaning.write(tmp_path / "data", tmp_path / "clean", annotated=True)
    cleaning.write(tmp_path / "data", tmp_path / "clean", annotated=True, overwrite=True)
    assert datasets.load_from_disk(str(tmp_path / "clean"))["kept"][:] == marked["kept"][:]
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"no folder that a datasets.Dataset was saved to"):
        cleaning.write(tmp_path / "other", tmp_path / "out")
    with pytest.raises(FileExistsError, match="another kind"):
        cleaning.write(tmp_path / "data", tmp_path / "other", overwrite=True)


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_files_of_text_lose_the_records_and_nothing_else(mark, line_end, tmp_path):
    lines = [b'"a ""quoted""\r\n\xc3\xa9, text",%d' % i for i in range(N)]
    content = mark + line_end.join([b"text,label", *lines[:3], b"", *lines[3:]])
    (tmp_path / "data.csv").write_bytes(content)
    cleaning = cleaning_of([6, 2])
    cleaning.write(tmp_path / "data.csv", tmp_path / "clean.csv")
    kept = [lines[i] for i in range(N) if i not in (2, 6)]
    expected = mark + line_end.join([b"text,label", *kept[:2], b"", *kept[2:], b""])
    assert (tmp_path / "clean.csv").read_bytes() == expected
    text = io.StringIO(expected.decode("utf-8-sig"), newline="")
    assert [row[1] for row in csv.reader(text) if row] == ["label", "0", "1", "3", "4", "5"]
    with pytest.raises(FileExistsError, match="say overwrite=True"):
        cleaning.write(tmp_path / "data.csv", tmp_path / "clean.csv")
    cleaning.write(tmp_path / "data.csv", tmp_path / "data.csv", overwrite=True)
    assert (tmp_path / "data.csv").read_bytes() == expected


@given(st.lists(st.tuples(st.text('ab,\t" \n', max_size=5), st.integers(0, 1)), min_size=N, max_size=N), NAMED)
def test_tables_by_tabs_are_read_and_written_as_such(tmp_path_factory, rows, named):
    folder = tmp_path_factory.mktemp("tables")
    with (folder / "data.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([("text", "label"), *rows])
    _, found = text_rows(folder / "data.tsv")
    assert [(row["text"], row["label"]) for row in found] == [(text, str(label)) for text, label in rows]
    cleaning_of(named).write(folder / "data.tsv", folder / "clean.tsv")
    _, left = text_rows(folder / "clean.tsv")
    assert [dict(row) for row in left] == [dict(row) for place, row in enumerate(found) if place not in named]


def test_files_that_do_not_fit_are_refused(tmp_path):
    (tmp_path / "data.csv").write_text("a\n" + "1\n" * (N + 1))
    (tmp_path / "data.jsonl").write_text("{}\n" * N)
    (tmp_path / "data.txt").write_text("")
    cleaning = cleaning_of([1])
    with pytest.raises(sp.MismatchError, match="8 records and the training set 7"):
        cleaning.write(tmp_path / "data.csv", tmp_path / "out.csv")
    with pytest.raises(ValueError, match="records are not converted"):
        cleaning.write(tmp_path / "data.jsonl", tmp_path / "out.csv")
    with pytest.raises(ValueError, match="new columns would change the records"):
        cleaning.write(tmp_path / "data.jsonl", tmp_path / "out.jsonl", annotated=True)
    with pytest.raises(ValueError, match=r"must be a .csv"):
        cleaning.write(tmp_path / "data.txt", tmp_path / "out.txt")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        cleaning.write(tmp_path / "none.csv", tmp_path / "out.csv")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "data.txt")
    with pytest.raises(FileExistsError, match="symbolic link"):
        cleaning.write(tmp_path / "data.jsonl", tmp_path / "link.jsonl", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.csv", "data.jsonl", "data.txt", "link.jsonl"]


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_parquet_keeps_schema_groups_and_compression(compression, tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow: install source-proj[datasets]")
    from pyarrow import parquet

    table = pa.table({"text": [f"t{i}" for i in range(N)], "label": pa.array(range(N), pa.int16())})
    table = table.replace_schema_metadata({b"made": b"here"})
    parquet.write_table(table, tmp_path / "data.parquet", row_group_size=3, compression=compression)
    cleaning = cleaning_of([0, 4])
    cleaning.write(tmp_path / "data.parquet", tmp_path / "clean.parquet")
    left = parquet.ParquetFile(tmp_path / "clean.parquet")
    assert left.read().equals(table.take([1, 2, 3, 5, 6]))
    assert left.schema_arrow.equals(table.schema, check_metadata=True)
    assert [left.metadata.row_group(group).num_rows for group in range(3)] == [2, 2, 1]
    assert left.metadata.row_group(0).column(0).compression == compression.upper().replace("NONE", "UNCOMPRESSED")
    cleaning.write(tmp_path / "data.parquet", tmp_path / "marked.parquet", annotated=True)
    marked = parquet.read_table(tmp_path / "marked.parquet")
    assert marked.select(["text", "label"]).equals(table)
    assert marked["kept"].to_pylist() == [False, True, True, True, False, True, True]
    assert marked["value"].to_pylist() == [0.0, None, None, None, 2.0, None, None]


def test_an_index_of_pandas_survives(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow", reason="needs pyarrow: install source-proj[datasets]")
    frame = pandas.DataFrame({"a": np.arange(N)})
    frame.to_parquet(tmp_path / "data.parquet")
    cleaning_of([0, 4]).write(tmp_path / "data.parquet", tmp_path / "clean.parquet")
    assert pandas.read_parquet(tmp_path / "clean.parquet")["a"].tolist() == [1, 2, 3, 5, 6]


def test_taking_some_back_looks_at_each_id_a_few_times_whatever_their_number():
    looked = 0

    class Id(int):
        def __hash__(self):
            nonlocal looked
            looked += 1
            return super().__hash__()

    ids = list(map(Id, range(300)))
    cleaning = Cleaning("by hand", ids, [""] * 300, {}, ids)
    looked = 0
    assert len(cleaning.without(ids[::2])) == 150
    assert looked < 10 * 300


def test_a_saved_list_is_json_also_where_an_error_is_not_known(tmp_path):
    """Of one query there is none: NaN, which JSON has no word for."""
    scores = sp.Scores(np.array([[1.0, -2.0, 3.0]]), ["q"], ["a", "b", "c"], unit="u")
    cleaning = sp.curate.drop_worst(sp.curate.aggregate(scores), 2)
    assert np.isnan(cleaning.values["error"]).all()
    cleaning.save(tmp_path / "list.json")

    def refuse(word):
        raise AssertionError(word)

    json.loads((tmp_path / "list.json").read_bytes(), parse_constant=refuse)
    loaded = Cleaning.load(tmp_path / "list.json")
    np.testing.assert_array_equal(loaded.values["error"], cleaning.values["error"])
    assert loaded.values["error"].dtype == np.float64
