"""Whoever collates keeps the order of examples, in which rows have their ids: a law on random ragged examples."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from source_proj.bank import batches

LENGTHS = st.lists(st.integers(1, 9), min_size=2, max_size=12)


def examples(lengths):
    return [{"ids": torch.arange(n) + 10 * place, "label": place % 2} for place, n in enumerate(lengths)]


def padded(rows):
    return {"ids": pad_sequence([row["ids"] for row in rows], True), "labels": torch.tensor([r["label"] for r in rows])}


def by_length(rows):
    return padded(sorted(rows, key=lambda row: -len(row["ids"])))


def by_length_as_tuple(rows):
    rows = sorted(rows, key=lambda row: len(row["ids"]))
    return [row["ids"] for row in rows], torch.tensor([row["label"] for row in rows])


def time_first(rows):
    return {"ids": pad_sequence([row["ids"] for row in rows]), "labels": torch.tensor([row["label"] for row in rows])}


def with_places(rows):
    return {**padded(rows), "place": torch.arange(len(rows))}


def masked(rows):
    batch = padded(rows)
    return {**batch, "mask": torch.rand(batch["ids"].shape) < 0.5, "drawn": random.random()}


def taking_apart(rows):
    """Changes the examples that it is given."""
    return padded([{"ids": row.pop("ids"), "label": row.pop("label")} for row in rows])


def as_texts(rows):
    return {"texts": [str(row["ids"].tolist()) for row in rows], "labels": [row["label"] for row in rows]}


def with_all(rows):
    """Tells each example of the whole batch."""
    batch = padded(rows)
    return {**batch, "among": batch["ids"].float().mean().expand(len(rows))}


def packed(rows):
    return torch.nn.utils.rnn.pack_sequence([row["ids"] for row in rows], enforce_sorted=False)


@pytest.mark.parametrize("collate", [by_length, by_length_as_tuple])
@given(lengths=LENGTHS)
def test_a_function_that_sorts_examples_is_refused_just_where_it_moves_one(collate, lengths):
    loader = DataLoader(examples(lengths), len(lengths), collate_fn=collate)
    wanted = sorted(range(len(lengths)), key=lambda place: lengths[place] * (-1 if collate is by_length else 1))
    if wanted == list(range(len(lengths))) and len(set(lengths)) == len(lengths):
        return  # these were in order already, and what another batch would be is all that can be said
    if len(set(lengths)) == 1:
        assert len(list(batches(loader))) == 1
        return
    with pytest.raises(ValueError, match=rf"collate_fn '{collate.__name__}'.*another order.*enforce_sorted=False"):
        list(batches(loader))


@pytest.mark.parametrize(
    "collate", [padded, time_first, with_places, masked, taking_apart, as_texts, with_all, packed, list]
)
@given(lengths=LENGTHS, size=st.integers(1, 12))
def test_a_function_that_keeps_the_order_is_not(collate, lengths, size):
    state = torch.get_rng_state()
    torch.manual_seed(0)
    given_rows = list(batches(DataLoader(examples(lengths), size, collate_fn=collate)))
    torch.manual_seed(0)
    plain = list(DataLoader(examples(lengths), size, collate_fn=collate, generator=torch.Generator()))
    torch.set_rng_state(state)
    assert len(given_rows) == len(plain)
    if collate is masked:
        for (_, batch), other in zip(given_rows, plain, strict=True):
            assert torch.equal(batch["mask"], other["mask"])  # nothing was drawn beside it


@pytest.mark.parametrize("seed", range(8))
def test_rows_that_are_drawn_may_be_the_same_ones_in_another_order(seed):
    """Nothing moved: the batch that is made beside drew the labels of two examples the other way round, say."""
    draw = random.Random(seed)

    def labelled(rows):
        return {"label": torch.tensor([draw.randint(0, 1) for _ in rows])}

    assert len(list(batches(DataLoader(examples([1, 2]), 2, collate_fn=labelled)))) == 1


def test_workers_look_too():
    loader = DataLoader(examples([1, 5, 3, 7]), 2, collate_fn=by_length, num_workers=2)
    with pytest.raises(ValueError, match="collate_fn 'by_length'"):
        list(batches(loader))


class Point:
    """What a data set may give, and no batch holds."""


@pytest.mark.parametrize("made", [Point, lambda: {"x": Point()}, lambda: (torch.ones(2), Point())])
def test_examples_that_make_no_batch_are_named(made):
    with pytest.raises(TypeError, match=r"the examples of list make no batch \(.*Point.*\): let the data set give"):
        list(batches([(made(), 0)] * 3))


def nested(rows):
    return torch.nested.nested_tensor([row["ids"] for row in rows], layout=torch.jagged)


@pytest.mark.parametrize(
    ("inputs", "kind"), [(nested, "nested"), (lambda rows: torch.eye(len(rows)).to_sparse(), "sparse_coo")]
)
def test_tensors_without_rows_of_their_own_are_refused(inputs, kind):
    loader = DataLoader(examples([3, 1, 2]), 3, collate_fn=lambda rows: {"x": inputs(rows), "labels": torch.arange(3)})
    with pytest.raises(TypeError, match=f"a batch of list holds a {kind} tensor, of which single examples cannot be"):
        list(batches(loader))


def test_what_all_examples_share_may_be_sparse():
    shared = torch.eye(5).to_sparse()
    loader = DataLoader(examples([1, 1, 1]), 3, collate_fn=lambda rows: {**padded(rows), "graph": shared})
    assert next(batches(loader))[1]["graph"] is shared
