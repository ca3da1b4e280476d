"""Frames and data sets with named columns give the examples that tensors of the same numbers give."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import source_proj as sp
from source_proj.bank.build.columns import examples_of, query_split
from source_proj.bank.build.data import BatchSource

pandas = pytest.importorskip("pandas")
VALUES = np.random.default_rng(0).normal(size=(9, 3))
LABELS = np.arange(9) % 2


def frame(name="label", labels=LABELS):
    return pandas.DataFrame({"a": VALUES[:, 0], name: labels, "b": VALUES[:, 1], "c": VALUES[:, 2]}, index=range(9, 18))


def hugging_face():
    return pytest.importorskip("datasets", reason="needs datasets: install source-proj[datasets]")


def table_of(kind, **options):
    return (
        frame(**options)
        if kind == "pandas"
        else hugging_face().Dataset.from_pandas(frame(**options), preserve_index=False)
    )


KINDS = pytest.mark.parametrize("kind", ["pandas", "datasets"])


@KINDS
@pytest.mark.parametrize("name", ["label", "labels", "target"])
def test_a_table_is_its_numbers_and_its_label(kind, name):
    examples = examples_of(table_of(kind, name=name))
    inputs, targets = examples.tensors
    assert torch.equal(inputs, torch.from_numpy(VALUES.astype(np.float32)))
    assert torch.equal(targets, torch.from_numpy(LABELS))
    ((start, stop, batch),) = BatchSource(table_of(kind, name=name), 9).load([(0, 9)])
    assert (start, stop) == (0, 9)
    assert torch.equal(batch[0], inputs)


@KINDS
@pytest.mark.parametrize(("labels", "kind_of_label"), [(LABELS * 0.5, torch.float32), (LABELS > 0, torch.int64)])
def test_labels_of_numbers_stay_numbers(kind, labels, kind_of_label):
    _, targets = examples_of(table_of(kind, labels=labels)).tensors
    assert targets.dtype == kind_of_label
    assert targets.tolist() == labels.astype(float).tolist()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    trajectory = sp.Trajectory([sp.Checkpoint(model.state_dict(), step=10, lr=0.1)])
    tensors = TensorDataset(torch.from_numpy(VALUES).float(), torch.from_numpy(LABELS))
    path = tmp_path_factory.mktemp("banks")

    def scores(train_set, queries, name):
        bank = sp.build(model, sp.Classification(), trajectory, train_set, path / name, sketch=sp.Sketch(16))
        return sp.Source(bank, model=model).score(queries).values

    return scores, scores(tensors, tensors, "tensors")


@KINDS
def test_banks_and_queries_take_tables_as_they_are(run, kind):
    scores, expected = run
    table = table_of(kind)
    assert np.array_equal(scores(table, table, kind), expected)


def test_banks_and_queries_take_the_splits_of_their_names(run):
    scores, expected = run
    data = table_of("datasets")
    splits = hugging_face().DatasetDict({"train": data, "test": data})
    assert np.array_equal(scores(splits, splits, "splits"), expected)
    three = hugging_face().DatasetDict({"train": data, "test": data, "dev": data})
    with pytest.raises(ValueError, match=r"splits \['train', 'test', 'dev'\]: say which are the queries"):
        query_split(three)
    with pytest.raises(TypeError, match=r"splits \['train', 'test', 'dev'\]: give one of them"):
        examples_of(three)
    assert query_split({"test": 1}) == {"test": 1}


@pytest.mark.parametrize(
    "given",
    [
        lambda: frame(),
        lambda: DataLoader(frame(), batch_size=4),
        lambda: {"train": frame()},
        lambda: table_of("datasets"),
        lambda: hugging_face().DatasetDict({"train": table_of("datasets"), "test": table_of("datasets")}),
    ],
    ids=["frame", "loader", "by stage", "datasets", "splits"],
)
def test_a_plan_takes_what_a_build_takes(given):
    model = nn.Linear(3, 2)
    trajectory = sp.Trajectory([sp.Checkpoint(model.state_dict(), step=10, lr=0.1)])
    names = [f"row {i}" for i in range(9)]
    planned = sp.plan(model, sp.Classification(), trajectory, given(), batch_size=4, ids=names, progress=False)
    assert (planned.examples, planned.batches) == (9, 3)
    with pytest.raises(sp.MismatchError, match="9 examples and 2 ids"):
        sp.plan(model, sp.Classification(), trajectory, given(), ids=names[:2], progress=False)


def test_rows_of_tokens_are_dicts_of_tensors_without_their_text():
    data = hugging_face().Dataset.from_dict(
        {"text": ["x", "y"], "input_ids": [[1, 2], [3, 4]], "attention_mask": [[1, 1], [1, 0]], "label": [0, 1]}
    )
    ((_, _, batch),) = BatchSource(data, 2).load([(0, 2)])
    assert {name: column.tolist() for name, column in batch.items()} == {
        "input_ids": [[1, 2], [3, 4]], "attention_mask": [[1, 1], [1, 0]], "labels": [0, 1]
    }  # fmt: skip
    formatted = data.with_format("torch")
    assert examples_of(formatted) is formatted


def test_a_collator_may_make_the_labels_of_token_sequences():
    """A tokenised set without a column of labels was refused, though its loader's collator makes them of the tokens."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdef"]
    tokenizer = BertTokenizerFast(vocab={word: place for place, word in enumerate(words)})
    rows = [[4 + (i + j) % 6 for j in range(3 + i % 2)] for i in range(7)]
    data = hugging_face().Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    source = BatchSource(torch.utils.data.DataLoader(data, batch_size=3, collate_fn=collate))
    for start, stop, batch in source.load([(0, 7)]):
        for row, ids, labels in zip(rows[start:stop], batch["input_ids"], batch["labels"], strict=True):
            assert ids[: len(row)].tolist() == labels[: len(row)].tolist() == row
            assert set(labels[len(row) :].tolist()) <= {-100}
    assert "labels" not in examples_of(data)[0]


def test_what_no_model_takes_is_named():
    texts = hugging_face().Dataset.from_dict({"text": ["x"], "label": [0]})
    with pytest.raises(ValueError, match=r"columns \['text'\] are text, which no model takes"):
        examples_of(texts)
    with pytest.raises(ValueError, match=r"column 'word' holds (object|str) and no numbers: turn it"):
        examples_of(frame().assign(word="x"))
    with pytest.raises(
        ValueError, match=r"column 'label' holds (object|str) and no numbers: give the numbers of classes"
    ):
        examples_of(frame(labels=["x"] * 9))
    with pytest.raises(
        ValueError, match=r"2 of 9 labels are missing \(NaN in the column 'label', .* rows \[1, 3\]\): drop"
    ):
        examples_of(frame(labels=np.where(np.isin(np.arange(9), [1, 3]), np.nan, LABELS)))
    with pytest.raises(ValueError, match="of which none may be the label"):
        examples_of(frame(name="y"))
    with pytest.raises(ValueError, match=r"of which \['label', 'target'\] may be the label"):
        examples_of(frame().assign(target=1))
    with pytest.raises(ValueError, match="there is nothing to learn from"):
        examples_of(frame()[["label"]])
    with pytest.raises(ValueError, match=r"the column '2' is there twice \(names are compared as text\)"):
        examples_of(frame().assign(**{"2": 1.0}).rename(columns=dict.fromkeys(frame().columns[:1], 2)))
