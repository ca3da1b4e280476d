"""The banks of an ensemble are of one training set, whenever they are asked."""

import numpy as np
import pytest
from problems import classification
from torch.utils.data import TensorDataset

import source_proj as sp


@pytest.fixture
def ensemble(tmp_path):
    problem = classification(20)
    banks = [problem.build(tmp_path / f"bank{seed}", sketch=sp.Sketch(16, seed=seed)) for seed in range(2)]
    return problem, banks


def append(problem, bank, count=2):
    some = TensorDataset(*(tensor[:count] for tensor in problem.train.tensors))
    bank.append(problem.model, problem.task, some, ids=[f"more {i}" for i in range(count)], progress=False)


VERBS = {
    "score": lambda method, queries, _: method.score(queries),
    "score to a file": lambda method, queries, folder: method.score(queries, out=folder / "s.zarr"),
    "score_rows": lambda method, queries, _: method.score_rows(queries, [0, 3]),
    "top_k": lambda method, queries, _: method.top_k(queries, 2),
    "harmful to a file": lambda method, queries, folder: method.harmful(queries, 2, out=folder / "h.zarr"),
    "sketch": lambda method, queries, _: method.sketch(queries),
    "rerank": lambda method, queries, _: method.top_k(queries, 2, rerank=4, train=queries),
    "by_segment": lambda method, queries, _: method.by_segment(queries),
    "self_influence": lambda method, *_: method.self_influence(),
    "fidelity": lambda method, *_: method.fidelity(),
    "fit": lambda method, *_: method.fit(),
    "predict_removal": lambda method, queries, _: method.predict_removal(queries, [0]),
}


@pytest.mark.parametrize("which", [0, 1])
def test_no_verb_averages_over_banks_of_which_one_grew(ensemble, tmp_path, which):
    """It was compared at construction alone: scores of the rows that one bank had more were halved, without a word."""
    problem, banks = ensemble
    method = sp.Source(banks, model=problem.model, progress=False)
    features = method.sketch(problem.queries)
    method.score(features)
    append(problem, banks[which])
    for verb in VERBS.values():
        for queries in (problem.queries, features):
            with pytest.raises(sp.MismatchError, match=r"different training ids \((20 and 22|22 and 20) examples\)"):
                verb(method, queries, tmp_path)
    with pytest.raises(sp.MismatchError, match="different training ids"):
        sp.curate.aggregate(method, problem.queries)


def test_banks_that_grew_alike_are_averaged_again(ensemble):
    problem, banks = ensemble
    methods = [sp.Source(banks, model=problem.model, progress=False), *(method_of(problem, bank) for bank in banks)]
    methods[0].score(problem.queries)
    for bank in banks:
        append(problem, bank)
    both, *alone = (method.score(problem.queries).values for method in methods)
    assert both.shape == (7, 22)
    np.testing.assert_allclose(both, np.mean(alone, axis=0), rtol=1e-5, atol=1e-7)


def method_of(problem, bank):
    return sp.Source(bank, model=problem.model, progress=False)


def test_representations_are_of_as_many_examples_as_the_bank_has(ensemble):
    problem, banks = ensemble
    method = sp.RepSim(banks[0], model=problem.model, train_set=problem.train, progress=False)
    append(problem, banks[0])
    with pytest.raises(sp.MismatchError, match=r"train_set has 20 examples .* has 22"):
        method.score(problem.queries)


@pytest.mark.parametrize("method", [sp.Source, sp.TracIn, sp.Trak])
@pytest.mark.parametrize("moved", [[0, 1], [0, 19], [18, 19]])
def test_other_examples_under_the_same_ids_are_warned_of(tmp_path, method, moved):
    """Two that changed places, anywhere; ids are numbers of places by default."""
    problem = classification(20)
    order = np.arange(20)
    order[moved] = order[moved[::-1]]
    first, again = (problem.build(tmp_path / f"bank{seed}", sketch=sp.Sketch(16, seed=seed)) for seed in range(2))
    method([first, again], model=problem.model)
    other_set = TensorDataset(*(tensor[order] for tensor in problem.train.tensors))
    other = sp.build(
        problem.model, problem.task, problem.trajectory, other_set, tmp_path / "other", sketch=sp.Sketch(16, seed=3),
        progress=False, batch_size=first.stages[0].first_batches()[0],
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"other data under the same ids, first in the batch of \d+.*give ids="):
        method([first, other], model=problem.model)
    whole = sp.build(
        problem.model, problem.task, problem.trajectory, other_set, tmp_path / "whole", sketch=sp.Sketch(16, seed=3),
        progress=False, batch_size=20,
    )  # fmt: skip
    method([first, whole], model=problem.model)  # batches of other examples cannot be compared
