"""Forward passes that change what they are given, and batches that hold lists, give the rows of those that do not."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, default_collate

import source_proj as sp
from source_proj._errors import GradientError
from source_proj.gradients import ParameterSpace, gradient_engine
from source_proj.gradients.batches import has_lists, take

N = 10


class Reader(nn.Module):
    """A linear layer over what a function reads of the input."""

    def __init__(self, read):
        super().__init__()
        self.read, self.head = read, nn.Linear(5, 3)

    def forward(self, x):
        return self.read(self.head, x)


def shifted(x):
    return x.add_(1)


def clamped(x):
    x[x < 0] = 0.5
    return x


def popped(x):
    return x.pop("v")


def emptied(x):
    values = x["v"].clone()
    x["v"].zero_()
    x.clear()
    return values


# How an input is kept, how it is changed while it is read, and what that reads without changing anything.
CHANGES = {
    "add_": (lambda x: x, shifted, lambda x: x + 1),
    "written into": (lambda x: x, clamped, lambda x: torch.where(x < 0, 0.5, x)),
    "in place behind": (lambda x: x, lambda x: nn.functional.relu(x - 1, inplace=True), lambda x: (x - 1).relu()),
    "popped from a dict": (lambda x: {"v": x}, popped, lambda x: x["v"]),
    "emptied": (lambda x: {"v": x}, emptied, lambda x: x["v"]),
    "popped from a list": (lambda x: [x, x], list.pop, lambda x: x[-1]),
    "deep within": (lambda x: {"v": [{"v": x}]}, lambda x: popped(x["v"].pop()), lambda x: x["v"][0]["v"]),
}


def made(read):
    torch.manual_seed(0)
    return Reader(read)


def pair(change):
    keep, reads, plain = CHANGES[change]
    return keep, made(lambda head, x: head(reads(x))), made(lambda head, x: head(plain(x)))


def margin(model, batch):
    return sp.Classification().output(model, batch)


def rows(model, batch, method, function=margin):
    space = ParameterSpace.from_model(model)
    engine = gradient_engine(model, space, sp.Sketch(space.size, "identity"), method)
    return engine.sketch(function, batch, N)[1]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", ["hooks", "general"])
def test_rows_of_a_model_that_changes_its_input(change, method):
    keep, changing, plain = pair(change)
    inputs, labels = torch.randn(N, 5), torch.randint(3, (N,))
    batch = [keep(inputs), labels]
    before = copy.deepcopy(batch)
    torch.testing.assert_close(rows(changing, batch, method), rows(plain, batch, method))  # vmap cannot do all of these
    torch.testing.assert_close(batch, before, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["hooks", "general"])
def test_rows_of_a_task_that_takes_its_batch_apart(method):
    def popping(model, batch):
        labels = batch.pop("labels")
        return margin(model, (batch.pop("x").mul_(2), labels))

    model, batch = made(lambda head, x: head(x)), {"x": torch.randn(N, 5), "labels": torch.randint(3, (N,))}
    expected = rows(model, [batch["x"] * 2, batch["labels"]], method)
    torch.testing.assert_close(rows(model, batch, method, popping), expected)


def collated(keep, examples):
    x, y = default_collate(examples)
    return [keep(x), y]


@pytest.mark.parametrize("change", CHANGES)
def test_banks_and_scores_of_a_model_that_changes_its_input(tmp_path, change):
    keep, *models = pair(change)
    examples = [(torch.randn(5), int(torch.randint(3, ()))) for _ in range(N)]
    loader = DataLoader(examples, 4, collate_fn=lambda some: collated(keep, some))
    scores = []
    for number, model in enumerate(models):
        trajectory = sp.Trajectory([sp.Checkpoint(model.state_dict(), 10, lr=0.1)])
        bank = sp.build(
            model, sp.Classification(), trajectory, loader, tmp_path / str(number), sketch=sp.Sketch(16), progress=False
        )  # fmt: skip
        scores.append(sp.Source(bank, model=model, progress=False).score(loader).to_numpy())
    assert (scores[0] == scores[1]).all()


@pytest.mark.parametrize("change", CHANGES)
def test_captured_rows_of_a_model_that_changes_its_input(tmp_path, change):
    keep, *models = pair(change)
    inputs, labels = torch.randn(N, 5), torch.randint(3, (N,))
    banked = []
    for number, model in enumerate(models):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        recorder = sp.Recorder(
            model, optimizer, tmp_path / str(number), every=2, capture=sp.Sketch(18, "identity"),
            task=sp.Classification(),
        )  # fmt: skip
        for index in torch.arange(N).split(5) * 2:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(keep(inputs[index])), labels[index]).backward()
            optimizer.step()
            recorder.step(ids=index)
        banked.append(torch.cat([block.rows for block in recorder.bank(storage="float32").stages[0].iter_rows(0)]))
    assert torch.equal(*banked)


# What a batch may hold of its examples: how to make one, and how a reader sees the batch's.
LISTS = {
    "texts": lambda n: "t" * n,
    "numbers": lambda n: n,
    "tensors of several lengths": lambda n: torch.randn(1 + n % 3, 5),
    "tensors of one length": lambda n: torch.randn(7, 5),
    "dicts": lambda n: {"boxes": torch.randn(n % 4, 2)},
    "lists": lambda n: [n] * (n % 3),
    "objects": lambda n: object(),
}


@settings(max_examples=60)
@given(st.data(), st.integers(3, 6), st.sampled_from(sorted(LISTS)))
def test_examples_are_taken_out_of_lists_as_out_of_tensors(data, size, kind):
    entries = [LISTS[kind](data.draw(st.integers(0, 9))) for _ in range(size)]
    if kind == "tensors of several lengths":
        entries[0] = torch.randn(size + 1, 5)  # or they might be columns
    if kind == "lists":
        entries[0] = [1]
    shared, rows_ = torch.randn(size + 2, 3), torch.randn(size, 2)
    chosen = data.draw(st.lists(st.integers(0, size - 1), max_size=size))
    batch = {"x": entries, "y": rows_, "shape": (2,) * size, "shared": shared}
    part = take(batch, chosen, size)
    assert has_lists(batch, size)
    assert len(part["x"]) == len(chosen)
    assert all(entry is entries[place] for entry, place in zip(part["x"], chosen, strict=True))
    assert torch.equal(part["y"], rows_[chosen])
    assert part["shape"] == batch["shape"]
    assert part["shared"] is shared


@pytest.mark.parametrize("size", [1, 2, 3])
def test_columns_are_no_list_of_examples(size):
    columns = [torch.randn(size, n) for n in range(1, size + 1)]
    (part,) = take((columns,), [0], size)
    assert [tuple(column.shape) for column in part] == [(1, n) for n in range(1, size + 1)]
    assert not has_lists([columns, torch.zeros(size)], size)


def listed(examples):
    return {"x": [e["x"] for e in examples], "labels": torch.stack([e["labels"] for e in examples])}


@pytest.mark.parametrize(
    ("batch_size", "lengths"),
    [(2, (1, 2, 3)), (3, (1, 2, 3)), (4, (1, 2, 3)), (3, (4, 4, 4)), (5, (4, 4, 4)), (4, (2, 5, 7))],
)
def test_rows_of_sequences_in_lists_are_those_of_each_alone(tmp_path, batch_size, lengths):
    def pooled(head, x):
        return torch.stack([head(each).mean(0) for each in x])

    model = made(pooled)
    examples = [{"x": torch.randn(lengths[n % 3], 5), "labels": torch.tensor(n % 3)} for n in range(N)]
    trajectory = sp.Trajectory([sp.Checkpoint(model.state_dict(), 10, lr=0.1)])
    options = {"sketch": sp.Sketch(18, "identity"), "storage": "float32", "progress": False}
    scores = []
    for size in (1, batch_size):
        loader = DataLoader(examples, size, collate_fn=listed)
        bank = sp.build(model, sp.Classification(), trajectory, loader, tmp_path / str(size), **options)
        scores.append(torch.from_numpy(sp.Source(bank, model=model, progress=False).score(loader).to_numpy()))
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-6)


def test_a_list_that_may_be_columns_is_named_where_a_model_takes_it_for_examples():
    model = made(lambda head, x: torch.stack([head(each).mean(0) for each in x]))
    batch = [[torch.randn(N, 5) for _ in range(N)], torch.randint(3, (N,))]
    with pytest.raises(GradientError, match="do not go with logits") as caught:
        rows(model, batch, "auto")
    assert f"a list of {N} tensors of {N} rows, which was taken for columns" in caught.value.__notes__[0]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_texts_beside_tensors_are_read_with_their_examples(tmp_path, batch_size):
    class Texts(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(5, 3)

        def forward(self, x, text):
            return torch.stack([self.head(row) * (1 + len(said)) for row, said in zip(x, text, strict=True)])

    torch.manual_seed(0)
    model = Texts()
    examples = [{"x": torch.randn(5), "text": "t" * (n % 4), "labels": n % 3} for n in range(N)]
    lengths = torch.tensor([1 + len(example["text"]) for example in examples])
    batch = default_collate(examples)
    expected = rows(
        made(lambda head, x: head(x[0]) * x[1][:, None]), [(batch["x"], lengths), batch["labels"]], "general"
    )
    trajectory = sp.Trajectory([sp.Checkpoint(model.state_dict(), 10, lr=0.1)])
    bank = sp.build(
        model, sp.Classification(), trajectory, examples, tmp_path / "bank", sketch=sp.Sketch(18, "identity"),
        storage="float32", batch_size=batch_size, progress=False,
    )  # fmt: skip
    found = torch.cat([block.rows for block in bank.stages[0].iter_rows(0)])
    torch.testing.assert_close(found, expected)
