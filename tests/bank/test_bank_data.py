from collections import namedtuple

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from source_proj._errors import MismatchError
from source_proj.bank import batches, dataset_size
from source_proj.bank.build.batch_hash import batch_hash
from source_proj.bank.build.data import BatchSource, checked_ids, to_device

X, Y = torch.arange(14.0).reshape(7, 2), torch.arange(7)


class Plain(Dataset):
    def __len__(self):
        return 7

    def __getitem__(self, index):
        return X[index], int(Y[index])


class Endless(IterableDataset):
    def __iter__(self):
        return iter([1])


class Doubling(DataLoader):
    """Changes what its data set gives."""

    def __iter__(self):
        return (2 * batch for batch in super().__iter__())


def by_two(sampler=None, *, drop_last=False):
    return BatchSampler(SequentialSampler(range(7)) if sampler is None else sampler, 2, drop_last)


def flat(found):
    return [(start, [part.tolist() for part in batch]) for start, batch in found]


@pytest.mark.parametrize("size", [1, 3, 7, 20])
def test_tensors_are_cut_just_as_a_loader_collates(size):
    fast = list(batches(TensorDataset(X, Y), size))
    plain = list(DataLoader(TensorDataset(X, Y), batch_size=size))
    assert len(fast) == len(plain)
    for (_, one), other in zip(fast, plain, strict=True):
        assert type(one) is type(other)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


def test_changing_a_batch_leaves_the_data_alone():
    data = TensorDataset(X.clone(), Y.clone())
    for _, batch in batches(data, 3):
        batch[0].zero_()
    assert torch.equal(data.tensors[0], X)


@pytest.mark.parametrize(
    "data",
    [Plain(), [(X[i], int(Y[i])) for i in range(7)], DataLoader(Plain(), batch_size=3)],
    ids=["dataset", "list", "loader"],
)
def test_all_kinds_of_data_give_the_same_batches(data):
    assert flat(batches(data, 3)) == flat(batches(TensorDataset(X, Y), 3))
    assert dataset_size(data) == 7


def test_start_and_stop():
    found = flat(batches(TensorDataset(Y), 3, 2, 6))
    assert found == [(2, [[2, 3, 4]]), (5, [[5]])]
    with pytest.raises(ValueError, match=r"start 5 and stop 9 .* 7 examples"):
        list(batches(TensorDataset(Y), 3, 5, 9))


def test_a_loader_brings_batch_size_collate_and_workers():
    def doubled(samples):
        x, y = default_collate(samples)
        return {"x": 2 * x, "labels": y}

    loader = DataLoader(Plain(), batch_size=4, collate_fn=doubled)
    found = list(batches(loader, batch_size=2))
    assert [start for start, _ in found] == [0, 4]
    assert torch.equal(found[1][1]["x"], 2 * X[4:])


def test_spans_are_batches_of_their_own():
    source = BatchSource(TensorDataset(Y), 3)
    assert [(a, b) for a, b, _ in source.load([(0, 4), (6, 7)])] == [(0, 3), (3, 4), (6, 7)]


def test_reading_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(batches(Plain(), 3))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("make", "kind", "named"),
    [
        (lambda: DataLoader(Plain(), 2, shuffle=True), ValueError, "RandomSampler"),
        (lambda: DataLoader(Plain(), 2, sampler=RandomSampler(range(7))), ValueError, "RandomSampler"),
        (lambda: Doubling(Plain(), 2), ValueError, r"a Doubling, whose own __iter__.*collate_fn"),
        (lambda: DataLoader(Plain(), 2, drop_last=True), ValueError, "drop_last"),
        (lambda: DataLoader(Plain(), batch_size=None), ValueError, "batch_size=None"),
        (lambda: DataLoader(Plain(), batch_sampler=by_two(RandomSampler(range(7)))), ValueError, "RandomSampler"),
        (lambda: DataLoader(Plain(), batch_sampler=by_two(range(7), drop_last=True)), ValueError, "a range"),
        (lambda: DataLoader(Plain(), batch_sampler=by_two(drop_last=True)), ValueError, "drop_last"),
        (lambda: DataLoader(Plain(), 2, sampler=SequentialSampler(range(5))), ValueError, "of 5 examples.* has 7"),
        (
            lambda: DataLoader(
                Plain(), batch_sampler=type("Mine", (BatchSampler,), {})(SequentialSampler(range(7)), 2, False)
            ),
            ValueError,
            "Mine",
        ),
        (lambda: DataLoader(Endless()), TypeError, "IterableDataset"),
        (Endless, TypeError, "IterableDataset"),
        (Endless, TypeError, r"list\(data\)"),
        (lambda: iter([1, 2]), TypeError, r"a list_iterator gives its examples once.*list\("),
        (lambda: {"train": Plain()}, TypeError, "dict"),
        (lambda: (X, Y), TypeError, r"TensorDataset\(\*tensors\)"),
        (list, ValueError, "list is empty"),
        (lambda: TensorDataset(X[:0]), ValueError, "TensorDataset is empty"),
    ],
)
def test_what_would_lose_ids_is_refused_by_name(make, kind, named):
    with pytest.raises(kind, match=named):
        dataset_size(make())


def test_batches_in_order_may_be_spelled_out():
    loader = DataLoader(Plain(), batch_sampler=by_two())
    assert flat(batches(loader)) == flat(batches(DataLoader(Plain(), batch_size=2)))


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_bad_batch_sizes_are_refused(size):
    with pytest.raises(ValueError, match=f"batch_size .* got {size}"):
        BatchSource(Plain(), size)


Pair = namedtuple("Pair", "x y")


def test_batches_move_whole():
    batch = {"a": [X, (Y,)], "b": Pair(X, "text"), "c": None}
    moved = to_device(batch, "meta")
    assert moved["a"][0].device.type == "meta"
    assert moved["a"][1][0].device.type == "meta"
    assert isinstance(moved["b"], Pair)
    assert moved["b"].y == "text"
    assert moved["c"] is None


DIFFERENT = [
    [X, Y],
    [X, Y + 1],
    [X.double(), Y],
    [X.reshape(2, 7), Y],
    [Y, X],
    {"x": X, "y": Y},
    {"y": Y, "x": X},
    [[X], Y],
    [X, Y, None],
    [X, Y, "None"],
    [X, Y, 1],
    [X, Y, 1.0],
    [X, Y, True],
    [X, Y, torch.tensor(True)],
    [X.to(torch.bfloat16), Y],
    [torch.complex(X, X), Y],
    [],
]


def test_hashes_tell_batches_apart():
    assert len({batch_hash(batch) for batch in DIFFERENT}) == len(DIFFERENT)


def test_hashes_are_of_values_alone():
    assert batch_hash([X, Y]) == batch_hash((X.clone(), Y.numpy()))
    assert batch_hash([X.T]) == batch_hash([X.T.contiguous()])
    for view in (torch.complex(X, X + 1).conj(), torch.complex(X, X + 1).conj().imag):  # which torch negates later
        assert batch_hash(view) == batch_hash(view.resolve_conj().resolve_neg().clone())


@pytest.mark.parametrize("entry", [object(), torch.eye(2).to_sparse(), {1, 2}])
def test_what_has_no_hash_is_refused(entry):
    with pytest.raises(TypeError, match="a batch holds a"):
        batch_hash([X, entry])


@pytest.mark.parametrize(
    ("ids", "expected", "dtype"),
    [
        (None, [5, 6, 7], np.int64),
        ([3, np.int32(1), torch.tensor(2)], [3, 1, 2], np.int64),
        (np.array(["a", "é", "c"]), ["a", "é", "c"], object),
    ],
)
def test_ids(ids, expected, dtype):
    found = checked_ids(ids, 5, 3, "train")
    assert found.tolist() == expected
    assert found.dtype == dtype


@pytest.mark.parametrize(
    ("ids", "kind", "named"),
    [
        ([1, 2], MismatchError, "3 examples and 2 ids"),
        ([1, 2, 1], ValueError, "id 1 occurs twice"),
        ([1, "a", 2], TypeError, "got 'a'"),
        ([1, 2, True], TypeError, "got True"),
        ([1, 2, 3.0], TypeError, r"got 3\.0"),
        ([1, 2, 2**63], ValueError, "64 bits"),
    ],
)
def test_bad_ids_are_refused_by_name(ids, kind, named):
    with pytest.raises(kind, match=named):
        checked_ids(ids, 0, 3, "train")


def test_rows_of_different_lengths_are_refused_with_what_pads_them():
    rows = [{"input_ids": torch.arange(length), "labels": 0} for length in (3, 5)]
    with pytest.raises(ValueError, match=r"different lengths.*\[3\].*\[5\].*DataLoader\(data.*collate_fn"):
        list(batches(rows, 2))


class Failing(Dataset):
    """Raises an error for one of its examples."""

    def __init__(self, error, at):
        self.error, self.at = error, at

    def __len__(self):
        return 7

    def __getitem__(self, index):
        if index == self.at:
            raise self.error
        return torch.ones(2, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [IndexError("gone"), KeyError("text"), OSError("no such file")], ids=repr)
def test_what_an_example_raises_says_which_batch_it_is_of(error, workers):
    with pytest.raises(type(error)) as caught:
        list(batches(DataLoader(Failing(error, 4), batch_size=3, num_workers=workers), 3))
    assert caught.value.__notes__[-1] == "raised for one of the examples 3 to 5 of Failing, which has 7"


@pytest.mark.parametrize("at", range(7))
def test_an_example_that_raises_stop_iteration_does_not_end_the_data(at):
    first = at // 3 * 3
    with pytest.raises(ValueError, match=f"one of the examples {first} to {min(first + 2, 6)} of Failing"):
        list(batches(Failing(StopIteration(), at), 3))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda row: row.pop("labels"), r"number 2 of this one has \['x'\].*give all of them the same"),
        (lambda row: row.update(mask=1), r"number 2 of this one has \['labels', 'mask', 'x'\]"),
        (lambda row: row.update(labels=None), r"number 2 of this batch of list has None as its entry 'labels'"),
    ],
)
def test_examples_of_different_entries_make_no_batch(change, named, workers):
    rows = [{"x": X[place], "labels": int(Y[place])} for place in range(7)]
    change(rows[5])
    with pytest.raises(ValueError, match=named) as caught:
        list(batches(rows if not workers else DataLoader(rows, 3, num_workers=workers), 3))
    assert caught.value.__notes__[-1] == "raised for one of the examples 3 to 5 of list, which has 7"


def test_streamed_data_sets_are_refused_with_the_remedy():
    datasets = pytest.importorskip("datasets")
    streamed = datasets.Dataset.from_dict({"x": X.tolist(), "labels": Y.tolist()}).to_iterable_dataset()
    for data in (streamed, DataLoader(streamed, 2)):
        with pytest.raises(TypeError, match=r"IterableDataset, whose .*list\(data\).*without streaming=True"):
            dataset_size(data)


def test_a_tuple_of_arrays_is_no_data_set():
    with pytest.raises(TypeError, match=r"TensorDataset\(\*map\(torch.from_numpy"):
        list(batches((np.ones(3), np.ones(3)), 2))


BATCH = next(iter(DataLoader(TensorDataset(X, Y), 7)))  # a list


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            BATCH,
            r"a list of 2 tensors as a data set; give TensorDataset\(\*tensors\), or \[example\] if it is a single",
        ),
        (tuple(BATCH), r"a tuple of 2 tensors as a data set; give TensorDataset\(\*tensors\), or \[example\]"),
        ([X.numpy(), Y.numpy()], r"a list of 2 numpy arrays as a data set; give TensorDataset\(\*map\(torch.from_n"),
        ((X[0], 1), r"a tuple of arrays and numbers as a data set: of one example give \[example\]"),
        ([X[0].numpy(), 1.5], r"a list of arrays and numbers as a data set: of one example give \[example\]"),
        (
            {"input": X, "labels": Y},
            r"a dict of the columns \['input', 'labels'\] as a data set; give a list of its row",
        ),
    ],
)
def test_one_batch_and_one_example_are_no_data_set(data, message):
    with pytest.raises(TypeError, match=f"got {message}"):
        dataset_size(data)


def test_tensors_of_as_many_dims_are_examples():
    rows = [X[0], X[1, :1]]
    assert dataset_size(rows) == 2
    assert dataset_size([tensor.numpy() for tensor in rows]) == 2
    assert dataset_size([(X[0], 1)]) == 1
