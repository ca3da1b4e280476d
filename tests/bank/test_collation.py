"""Whoever collates keeps the order of examples, in which rows have their ids: a law on random ragged examples."""

import random

import numpy
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


def pairs(rows):
    return torch.stack([x for x, _ in rows]), torch.tensor([y for _, y in rows])


def points(count=24, alike=0):
    """Inputs that are told apart by a length, the entries that are not 0, which the first ones have in common."""
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(0))
    for place in range(alike, count):
        x[place, 2 + place % 4 :] = 0
    return [(row, place % 2) for place, row in enumerate(x)]


def length(row):
    return int((row[0] != 0).sum())


def sorting(rows):
    return pairs(sorted(rows, key=length, reverse=True))


def refilling(rows):
    whole = [row for row in rows if length(row) > 2]
    return pairs((whole * len(rows))[: len(rows)])


def reversing(rows):
    return pairs(rows[::-1])


def reversing_beside_places(rows):
    return *pairs(rows[::-1]), torch.arange(len(rows))


def moving_on(rows):
    return pairs([*rows[1:], rows[0]])


def moving_inputs(rows):
    x, y = pairs(rows)
    return x.flip(0), y


@pytest.mark.parametrize("collate", [sorting, refilling, reversing, reversing_beside_places, moving_on, moving_inputs])
@pytest.mark.parametrize(("size", "alike"), [(8, 0), (8, 8), (4, 8), (24, 0)])
def test_examples_in_the_place_of_others_are_refused_also_where_the_first_batch_has_none(collate, size, alike):
    with pytest.raises(ValueError, match=f"collate_fn '{collate.__name__}'.*each row would have another example's id"):
        list(batches(DataLoader(points(alike=alike), size, collate_fn=collate)))


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("permutation", [torch.randperm, numpy.random.permutation])
def test_an_order_that_is_drawn_is_refused(size, permutation):
    loader = DataLoader(
        points(), size, collate_fn=lambda rows: pairs([rows[place] for place in permutation(len(rows))])
    )
    with pytest.raises(ValueError, match="in an order that it draws"):
        list(batches(loader))


def mixing(rows):
    x, y = pairs(rows)
    return 0.7 * x + 0.3 * x.flip(0), y


def with_a_negative(rows):
    x, y = pairs(rows)
    return x, y, x.roll(1, 0)


@pytest.mark.parametrize("collate", [mixing, with_a_negative])
def test_examples_that_are_mixed_are_warned_of_once(collate):
    with pytest.warns(UserWarning, match=f"collate_fn '{collate.__name__}' makes other rows") as caught:
        list(batches(DataLoader(points(), 8, collate_fn=collate)))
    assert len(caught) == 1


def noise_by_place(rows):
    x, y = pairs(rows)
    return x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), y


def labels_lost_by_place(rows):
    x, y = pairs(rows)
    return x, y * (torch.rand(y.shape, generator=torch.Generator().manual_seed(0)) < 0.7)


def one_left_out(rows):
    return *pairs(rows), torch.randperm(len(rows)) == 0


def centred(rows):
    x, y = pairs(rows)
    return x - x.mean(0), y


class Counting:
    """Numbers its batches, and holds what cannot be compared."""

    def __init__(self):
        self.count = 0

    def __call__(self, rows):
        self.count += 1
        return {"x": pairs(rows)[0], "number": torch.full((len(rows),), self.count), "others": [Point() for _ in rows]}


class LongestSoFar:
    """Pads to the longest that it has seen."""

    def __init__(self):
        self.width = 0

    def __call__(self, rows):
        self.width = max(self.width, *(length(row) for row in rows))
        return torch.stack(
            [torch.nn.functional.pad(x[: length((x, y))], (0, self.width))[: self.width] for x, y in rows]
        )


@pytest.mark.parametrize(
    "collate", [noise_by_place, labels_lost_by_place, one_left_out, centred, Counting(), LongestSoFar()]
)
@pytest.mark.parametrize("size", [2, 3, 8])
def test_what_is_drawn_counted_or_told_of_the_batch_moves_nothing(collate, size):
    numpys, pythons = numpy.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002 (a function may draw there)
    assert sum(1 for _ in batches(DataLoader(points(), size, collate_fn=collate))) == 24 // size
    assert (numpys, pythons) == (numpy.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002


@pytest.mark.parametrize("seed", range(4))
def test_masks_that_are_drawn_alike_for_each_batch_move_nothing(seed):
    """As masks must be that each checkpoint sees again."""

    def masking(rows):
        batch = padded(rows)
        drawn = torch.rand(batch["ids"].shape, generator=torch.Generator().manual_seed(seed))
        return {**batch, "ids": torch.where(drawn < 0.5, 1, batch["ids"])}

    for size in (2, 5, 12):
        list(batches(DataLoader(examples([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]), size, collate_fn=masking)))


def test_few_batches_are_looked_at():
    counted = Counting()
    list(batches(DataLoader(points(240), 2, collate_fn=lambda rows: counted(rows)["x"])))
    assert 120 < counted.count <= 120 + 8 * (2 + 20 + 2)  # the 1st, 2nd, 3rd, 5th ... 65th
