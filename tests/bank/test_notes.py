"""A bank knows the columns of its table and the kinds of its model's modules again, and says where they differ."""

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import source_proj as sp
from source_proj.bank.notes import Notes, modules_of

pandas = pytest.importorskip("pandas")
NAMES = ["sweet", "size", "weight", "skin"]


def table(n, seed):
    random = np.random.default_rng(seed)
    values = {name: random.normal(size=n).astype(np.float32) * (i + 1) for i, name in enumerate(NAMES)}
    return pandas.DataFrame({**values, "label": random.integers(0, 2, n)})


def built(path, make):
    torch.manual_seed(0)
    model = make()
    trajectory = sp.Trajectory([sp.Checkpoint(model.state_dict(), 10, lr=0.1)])
    return model, sp.build(model, sp.Classification(), trajectory, table(9, 0), path, sketch=sp.Sketch(32))


def mlp(activation=nn.Tanh, *more):
    return nn.Sequential(nn.Linear(4, 5), activation(), *more, nn.Linear(5, 2))


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    model, bank = built(tmp_path_factory.mktemp("notes") / "bank", mlp)
    return sp.Source(sp.open(bank.path), model=model), bank


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations([*NAMES, "label"]), st.integers(0, 9))
def test_queries_of_a_table_may_have_its_columns_in_any_order(asked, order, seed):
    source, bank = asked
    assert bank.notes.columns == tuple(NAMES)
    queries = table(3, seed)
    expected = source.score(queries).values
    assert np.array_equal(source.score(queries[order]).values, expected)
    assert np.array_equal(source.top_k(queries[order], 2).scores, source.top_k(queries, 2).scores)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda frame: frame.drop(columns="size"), r"examples lack \['size'\]: give those"),
        (lambda frame: frame.assign(more=1.0), r"examples have \['more'\] besides"),
        (lambda frame: frame.rename(columns={"skin": "peel"}), r"lack \['skin'\] and have \['peel'\] besides"),
    ],
)
def test_queries_of_other_columns_are_refused(asked, change, words):
    with pytest.raises(ValueError, match=words):
        asked[0].score(change(table(3, 1)))


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations([*NAMES, "label"]), st.integers(0, 9))
def test_appended_rows_of_a_table_may_have_its_columns_in_any_order(tmp_path_factory, order, seed):
    model, bank = built(tmp_path_factory.mktemp("appended") / "bank", mlp)
    for frame in (table(3, seed), table(3, seed)[order]):
        bank.append(model, sp.Classification(), frame, ids=range(bank.n_rows, bank.n_rows + 3), progress=False)
    first, again = (part.read(0, "rows", 0) for part in bank.parts[1:])
    assert np.array_equal(first, again)


def test_appended_rows_of_other_columns_are_refused(tmp_path):
    model, bank = built(tmp_path / "bank", mlp)
    with pytest.raises(ValueError, match=r"lack \['skin'\] and have \['peel'\] besides: give those"):
        bank.append(model, sp.Classification(), table(3, 1).rename(columns={"skin": "peel"}), progress=False)
    assert bank.n_rows == 9
    assert bank.verify().ok


def test_a_worker_whose_columns_have_another_order_is_refused(tmp_path):
    model = mlp()
    trajectory = sp.Trajectory([sp.Checkpoint(model.state_dict(), 10, lr=0.1)])
    options = {"sketch": sp.Sketch(32), "batch_size": 3, "shard_rows": 3, "progress": False}
    task, path = sp.Classification(), tmp_path / "bank"
    sp.build(model, task, trajectory, table(9, 0), path, shard=(0, 2), **options)
    swapped = table(9, 0)[["size", "sweet", "weight", "skin", "label"]]
    with pytest.raises(sp.MismatchError, match=r"begun with the columns \['sweet', 'size'.*got \['size', 'sweet'"):
        sp.build(model, task, trajectory, swapped, path, shard=(1, 2), **options)


def test_tensors_are_taken_as_they_are(asked):
    frame = table(3, 1)
    tensors = (torch.tensor(frame[names].to_numpy().copy()) for names in (NAMES, "label"))
    expected = asked[0].score(frame).values
    assert np.array_equal(asked[0].score(torch.utils.data.TensorDataset(*tensors)).values, expected)


def test_a_model_of_other_modules_is_told_by_their_kinds(asked):
    _, bank = asked
    with pytest.warns(UserWarning, match="that one has 1 Tanh where this one has 1 ReLU.*another model"):
        sp.Source(bank, model=mlp(nn.ReLU))
    with pytest.warns(UserWarning, match="that one has none where this one has 1 LayerNorm"):
        sp.Source(bank, model=mlp(nn.Tanh, nn.LayerNorm(5, elementwise_affine=False)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sp.Source(bank, model=mlp(nn.Tanh, nn.Dropout(0.5), nn.Identity()))


@pytest.mark.parametrize("verb", ["build", "append"])
def test_rows_of_a_model_of_other_modules_are_warned_of(tmp_path, verb):
    model, other = mlp(), mlp(nn.ReLU)
    trajectory = sp.Trajectory([sp.Checkpoint(model.state_dict(), 10, lr=0.1)])

    def build(network, **options):
        options = {"sketch": sp.Sketch(32), "batch_size": 3, "shard_rows": 3, "progress": False, **options}
        return sp.build(network, sp.Classification(), trajectory, table(9, 0), tmp_path / "bank", **options)

    bank = build(model, shard=(0, 2)) if verb == "build" else build(model)
    append = partial(bank.append, other, sp.Classification(), table(3, 1), progress=False)
    go_on = append if verb == "append" else partial(build, other)
    with pytest.warns(UserWarning, match="has 1 Tanh where this one has 1 ReLU.* rows and scores") as told:
        go_on()
    assert told[0].filename == __file__


def test_a_captured_bank_knows_its_modules(tmp_path):
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = sp.Recorder(model, optimizer, tmp_path, capture=sp.Sketch(16), task=sp.Classification())
    nn.functional.cross_entropy(model(torch.randn(6, 4)), torch.randint(2, (6,))).backward()
    optimizer.step()
    recorder.step(ids=range(6))
    assert recorder.bank().notes.modules == modules_of(mlp()) == {"Linear": 2, "Tanh": 1}


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"parameter_choice": 3}, "parameter_choice is 3"),
        ({"parameter_choice": "all", "modules": [1]}, r"modules is \[1\]"),
        ({"parameter_choice": "all", "modules": {"Linear": True}}, "modules is"),
        ({"parameter_choice": "all", "columns": "abc"}, "columns is 'abc'"),
        ({"parameter_choice": "all", "columns": [1]}, r"columns is \[1\]"),
        ({"parameter_choice": "all", "base": {"weight": [1.0]}}, "base is .*not pairs of numbers by name"),
        ({"parameter_choice": "all", "base": ["weight"]}, "base is"),
    ],
)
def test_damaged_notes_are_refused(attributes, words):
    with pytest.raises(ValueError, match=words):
        Notes.from_json(attributes)


def test_a_bank_without_these_notes_compares_nothing():
    notes = Notes.from_json({"parameter_choice": "all"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notes.warn_of_other_modules(mlp())
    assert Notes.from_json(notes.to_json()) == notes
