"""The paper's tasks that AdamW trained: what is recorded of them, and what each method knows of the optimizer."""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.utils.data import TensorDataset

import source_proj as sp

EXAMPLES = Path(__file__).parents[2] / "examples"
ADAMW = partial(torch.optim.AdamW, weight_decay=0.1, fused=True)


@pytest.fixture(autouse=True)
def _examples_importable(monkeypatch):
    for folder in (EXAMPLES, EXAMPLES / "paper"):
        monkeypatch.syspath_prepend(str(folder))


def stacked_run(optimizer):
    from _stacked import StackedRun, StageSetting, margin, mlp

    torch.manual_seed(0)
    train = TensorDataset(torch.randn(30, 5), torch.randint(3, (30,)))
    queries = TensorDataset(torch.randn(4, 5), torch.randint(3, (4,)))
    stage = StageSetting(train, epochs=3, batch=8, lr=0.02, checkpoints=3)
    return StackedRun(mlp(5, 7, 3), {"train": stage}, queries, margin, optimizer)


def problem_of(run):
    from _problem import Problem, Sizes

    return Problem(
        name="tiny", title="Tiny", task=sp.Classification(), make_model=run.make_model,
        train_sets={"train": run.stages["train"].data}, queries=run.queries, record=run.record, retrain=run.retrain,
        group=2, settings=run.settings(), sizes=Sizes(runs=1, dim=1000, smaller=()),
    )  # fmt: skip


@pytest.mark.parametrize("optimizer", [ADAMW, partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1)])
def test_a_recorded_run_is_what_retraining_on_everything_gives(tmp_path, optimizer):
    run = stacked_run(optimizer)
    model = run.make_model()
    model.load_state_dict(run.record(3, tmp_path).final.load())
    measured = sp.Classification().measurement(model, run.queries.tensors).detach().numpy()
    again = run.retrain([np.arange(30), np.arange(0, 30, 2)], [3, 3])
    np.testing.assert_allclose(again[0], measured, rtol=1e-4, atol=1e-5)
    assert not np.allclose(again[1], measured, atol=1e-2)


@pytest.mark.parametrize("optimizer", [ADAMW, partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1)])
def test_a_captured_run_is_the_recorded_one(tmp_path, optimizer):
    """Study (p) compares rows of one run: capturing changes no weight."""
    run = stacked_run(optimizer)
    bank = run.captured(sp.Classification(), 3, tmp_path / "captured", sp.Sketch(16))
    recorded = run.record(3, tmp_path / "recorded")
    assert (bank.stages[0].n, bank.stages[0].n_checkpoints, len(bank.query_points())) == (30, 1, 3)
    weights = bank.final_checkpoint().load()
    assert all(torch.equal(weights[name], value) for name, value in recorded.final.load().items())


def test_optimizers_have_caches_of_their_own():
    adamw, sgd = (stacked_run(one).settings() for one in (ADAMW, torch_sgd()))
    assert adamw != sgd
    assert adamw["optimizer"] == {"name": "AdamW", "weight_decay": 0.1, "fused": True}


def torch_sgd():
    return partial(torch.optim.SGD, weight_decay=0.1)


def test_rivals_have_plain_gradients_and_source_adams_metric(tmp_path):
    from _methods import candidates
    from _pipeline import banks

    problem = problem_of(stacked_run(ADAMW))
    runs = banks(problem, argparse.Namespace(cache=tmp_path, device="cpu"))
    scores = {one.method: one.scores()[0] for one in candidates(problem, runs, None, tmp_path)}
    (stage,) = runs[0].trajectory.stages
    expected = traced(problem, stage)
    assert np.linalg.norm(scores["TracIn"] - expected) < 0.01 * np.linalg.norm(expected)  # the bank is of int8
    # A number in place of the metric is a longer time, and each of the three has another order of examples.
    names = ["SOURCE", "SOURCE, ignoring Adam", "SOURCE, Adam's metric"]
    correlations = np.corrcoef([scores[name].ravel() for name in names])[np.triu_indices(3, 1)]
    assert correlations.max() < 0.9999
    assert "Influence functions, averaged, Adam's metric" in scores


def test_tasks_of_sgd_have_one_bank(tmp_path):
    from _methods import candidates
    from _pipeline import banks

    problem = problem_of(stacked_run(torch_sgd()))
    runs = banks(problem, argparse.Namespace(cache=tmp_path, device="cpu"))
    assert runs[0].plain is runs[0].bank
    assert not [one for one in candidates(problem, runs, None, tmp_path) if "Adam" in one.method]


def traced(problem, stage):
    """TracIn by definition: Σ_c s_c ∇m(q)ᵀ(-∇ℓ(z))/N, with s_c the learning rates that led to checkpoint c."""
    model, train, queries = problem.make_model(), problem.train_sets["train"].tensors, problem.queries.tensors

    def loss(state, x, y):
        return torch.nn.functional.cross_entropy(functional_call(model, state, (x[None],)), y[None])

    def margin(state, x, y):
        return torch.special.logit(torch.exp(-loss(state, x, y)))

    total, before = 0.0, 0.0
    for checkpoint, integral in zip(stage.checkpoints, stage.lr_integrals, strict=True):
        state = checkpoint.load()
        rows = [
            torch.cat([g.flatten(1) for g in vmap(grad(f), (None, 0, 0))(state, *data).values()], 1)
            for f, data in ((margin, queries), (loss, train))
        ]
        total = total - (integral - before) * rows[0] @ rows[1].T / problem.n
        before = integral
    return total.numpy()


def test_the_laboratory_agrees_with_the_library(tmp_path):
    from _bench import Bench
    from _studies import REFERENCE, adam_metric

    problem = problem_of(stacked_run(ADAMW))
    bench = Bench(replace(problem, name="bench"), None, tmp_path, runs=1, dim=32)
    found = {name: scores for name, (scores,), *_ in adam_metric(bench)}
    assert len(found) == 18
    np.testing.assert_allclose(bench.scores(REFERENCE)[0], found["scalar, 1 segments, time x 1"], rtol=1e-4, atol=1e-7)
