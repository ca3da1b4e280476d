"""What the model measured of each query stands beside its scores: without it nobody knows whether it was right."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import classification, source
from torch.utils.data import Subset, TensorDataset

import source_proj as sp
from source_proj.attribution.words import measured
from source_proj.cli.answers import Answer
from source_proj.report import make_hits_page, make_page

METHODS = (sp.Source, sp.TracIn, sp.Trak, sp.InfluenceFunction, sp.DataInf, sp.GradDot, sp.Hydra)


def margins(problem, bank):
    """p's log-odds by hand, at the bank's final weights, ``(Q,)`` float64."""
    model = copy.deepcopy(problem.model)
    bank.final_checkpoint().load_into(model)
    inputs, targets = problem.queries.tensors
    with torch.no_grad():
        share = model.double()(inputs.double()).softmax(1)[torch.arange(len(inputs)), targets]
    return torch.log(share / (1 - share)).numpy()


@pytest.fixture(params=METHODS, ids=lambda made: made.__name__)
def method(request, blobs):
    problem, bank = blobs
    return request.param(bank, model=problem.model, progress=False, batch_size=3)


def test_every_method_says_what_the_final_weights_measured(method, blobs):
    problem, bank = blobs
    expected = margins(problem, bank)
    for result in (method.score(problem.queries), method.top_k(problem.queries, 2), method.harmful(problem.queries, 2)):
        np.testing.assert_allclose(result.shown.measurements, expected, rtol=1e-4, atol=1e-5)
    heading, *_ = method.top_k(problem.queries, 2).lines(1)
    assert measured(float(method.sketch(problem.queries).measurements[1]), "logit margin") in heading


def test_parts_of_the_queries_keep_their_own(blobs, tmp_path):
    problem, bank = blobs
    method, expected = source(problem, bank), margins(problem, bank)
    hits, order = method.top_k(problem.queries, 2), torch.randperm(len(expected)).tolist()
    np.testing.assert_allclose(hits[1:4].shown.measurements, expected[1:4], rtol=1e-4, atol=1e-5)
    features = method.sketch(problem.queries)
    features.save(tmp_path / "features.safetensors")
    for given in (features, sp.QueryFeatures.load(tmp_path / "features.safetensors")):
        found = method.top_k(given.only(order), 2).shown.measurements
        np.testing.assert_allclose(found, expected[order], rtol=1e-4, atol=1e-5)
    some = method.score(Subset(problem.queries, order))
    np.testing.assert_allclose(some.shown.measurements, expected[order], rtol=1e-4, atol=1e-5)
    spread = method.by_segment(problem.queries).shown.measurements
    np.testing.assert_allclose(spread, expected, rtol=1e-4, atol=1e-5)


def test_the_runs_of_an_ensemble_have_their_mean(tmp_path):
    problems = [classification(seed=0), classification(seed=1)]
    problems[1].train, problems[1].queries = problems[0].train, problems[0].queries
    banks = [problem.build(tmp_path / str(i), sp.Sketch(dim=16, seed=i)) for i, problem in enumerate(problems)]
    expected = (margins(problems[0], banks[0]) + margins(problems[0], banks[1])) / 2
    found = source(problems[0], banks).score(problems[0].queries).shown.measurements
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_similarities_are_of_no_measurement_and_answers_say_it_themselves(blobs):
    problem, bank = blobs
    alike = sp.GradCos(bank, model=problem.model, progress=False).top_k(problem.queries, 2)
    assert alike.shown.measurements is None
    assert "margin" not in str(alike)
    asked = source(problem, bank).top_k(problem.queries.tensors[0], 2)
    assert "predicted" in asked.query_example(0).verdict
    assert "margin" not in asked.query_example(0).verdict


def test_pages_and_files_say_it(blobs):
    problem, bank = blobs
    method, train = source(problem, bank), sp.Examples(problem.train)
    scores = method.score(problem.queries)
    shown = scores.shown.measurements.tolist()
    page = make_page("Why?", scores, train, problem.queries)
    assert [section.measurement for section in page.sections] == shown
    given = make_page("Why?", scores, train, problem.queries, measurements=[-value for value in shown])
    assert [section.measurement for section in given.sections] == [-value for value in shown]
    lists = {"helpful": method.helpful(problem.queries, 2)}
    assert [section.measurement for section in make_hits_page("Why?", lists).sections] == shown
    told = json.loads(json.dumps(Answer(lists, "SOURCE").as_json()))["queries"]
    assert [query["measurement"] for query in told] == shown


def test_a_page_says_what_the_model_said(blobs):
    problem, bank = blobs
    inputs = problem.queries.tensors[0]
    scores = source(problem, bank).score(inputs)
    page = make_page("Why?", scores, sp.Examples(problem.train), TensorDataset(inputs))
    assert [section.example.prediction for section in page.sections] == [
        str(scores.shown.answers[place].value) for place in range(len(inputs))
    ]


def test_scores_of_numbers_alone_have_none():
    scores = sp.Scores(np.ones((1, 2)), ["q"], ["a", "b"], unit="logit margin")
    assert scores.shown.measurements is None
    assert "margin" not in scores.top_k(1).query_example(0).verdict


def test_weights_where_no_query_is_differentiated_are_not_read(tmp_path):
    """An average that a bank refers to as the final weights may be gone: TracIn asks at the checkpoints alone."""
    problem = classification()
    (stage,) = problem.trajectory.stages
    averaged = stage.checkpoints[-1].load()
    torch.save({name: value / 2 for name, value in averaged.items()}, tmp_path / "averaged.pt")
    final = sp.Checkpoint(tmp_path / "averaged.pt", stage.checkpoints[-1].step)
    problem.trajectory = sp.Trajectory.from_stages([replace(stage, final=final)])
    bank = problem.build(tmp_path / "bank")
    (tmp_path / "averaged.pt").unlink()
    method = sp.TracIn(sp.open(bank.path), model=problem.model, progress=False)
    assert method.score(problem.queries).shown.measurements is None
