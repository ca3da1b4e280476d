"""One bank of a regression answers about errors, their squares, and the prediction itself."""

import numpy as np
import pytest
import torch
from problems import Problem, regression, source
from torch.utils.data import TensorDataset

import source_proj as sp
from source_proj.cli.asking import _task

ASKED = ("absolute", "squared", "prediction")


@pytest.fixture(scope="module", params=range(3))
def asked(request, tmp_path_factory) -> tuple[Problem, dict[str, sp.Source]]:
    """A bank that was built with one of the measurements, and methods that ask it for all of them."""
    problem = regression(seed=request.param)
    problem.task = sp.Regression(ASKED[request.param])
    bank = problem.build(tmp_path_factory.mktemp("bank") / "bank")
    return problem, {name: source(problem, bank, task=sp.Regression(name), query_gradient="final") for name in ASKED}


def test_errors_change_as_predictions_do_by_the_chain_rule(asked):
    problem, methods = asked
    inputs, targets = problem.queries.tensors
    methods["absolute"].banks[0].final_checkpoint().load_into(problem.model)
    with torch.no_grad():
        errors = (problem.model(inputs) - targets).numpy()
    scores = {name: method.score(problem.queries).values for name, method in methods.items()}
    scale = np.abs(scores["prediction"]).max()
    np.testing.assert_allclose(scores["absolute"], np.sign(errors) * scores["prediction"], atol=1e-5 * scale)
    np.testing.assert_allclose(scores["squared"], 2 * errors * scores["prediction"], atol=1e-5 * scale)
    known = {name: method.score(problem.queries).shown.measurements.numpy() for name, method in methods.items()}
    np.testing.assert_allclose(known["squared"], known["absolute"] ** 2, rtol=1e-4)
    np.testing.assert_allclose(known["prediction"], (errors + targets.numpy())[:, 0], rtol=1e-4)


def test_a_prediction_needs_no_target(asked):
    problem, methods = asked
    inputs, _ = problem.queries.tensors
    expected = methods["prediction"].score(problem.queries)
    for given in (inputs, TensorDataset(inputs), list(inputs)):
        np.testing.assert_array_equal(methods["prediction"].score(given), expected)
    with pytest.raises(ValueError, match="labels are missing"):
        methods["absolute"].score(inputs)


def test_helpful_examples_lower_errors_and_raise_predictions(asked):
    problem, methods = asked
    for name, method in methods.items():
        hits = method.helpful(problem.queries, 1)
        assert hits.unit == method.unit == (name if name == "prediction" else f"{name} error")
        scores = method.score(problem.queries).values
        best = scores.max(1) if name == "prediction" else scores.min(1)
        np.testing.assert_allclose(hits.scores[:, 0], best)


def test_features_are_of_one_measurement_and_losses_of_one_bank(asked):
    problem, methods = asked
    with pytest.raises(sp.MismatchError, match="measurement"):
        methods["squared"].score(methods["prediction"].sketch(problem.queries))
    bank = methods["squared"].banks[0]
    with pytest.raises(sp.MismatchError, match="half_mse"):
        source(problem, bank, task=sp.Regression(loss="half_mse")).score(problem.queries)


def test_the_command_line_asks_for_it(asked):
    bank = asked[1]["squared"].banks[0]
    told = _task(bank, None, "predicted")
    assert isinstance(told, sp.Regression)
    assert told.measured == "prediction"
    assert told.trains_as(bank.task_spec)
    with pytest.raises(ValueError, match="predictions of a regression"):
        _task(bank, None, 3)
