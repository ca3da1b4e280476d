"""kronfluence's EK-FAC influence functions against dense matrices, plain autograd and retraining."""

import importlib.util
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from ekfac_problems import dense, gradients, loss_gradients, mlp_run, orthogonal_regression
from torch import nn
from torch.utils.data import Subset, TensorDataset

import source_proj as sp

PAPER = Path(__file__).parents[2] / "examples" / "paper"
needs_kronfluence = pytest.mark.skipif(
    importlib.util.find_spec("kronfluence") is None, reason='needs the extra: pip install "source-proj[kronecker]"'
)


@pytest.fixture(autouse=True)
def _examples_importable(monkeypatch):
    for folder in (PAPER.parent, PAPER):
        monkeypatch.syspath_prepend(str(folder))


def dense_influence(model, task, checkpoint, train, queries, inverse):
    g = loss_gradients(model, task, checkpoint, train)
    return -(gradients(model, checkpoint, task.measurement, queries) @ inverse @ g.T / len(train)).numpy()


def layer_gradients(model, function, batches):
    """Per-example gradients of every layer that EK-FAC covers, by one backward pass an example: {name: (B, d)}."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    rows = {name: [] for name in layers}
    for batch in batches:
        model.zero_grad()
        function(model, batch).sum().backward()
        for name, layer in layers.items():
            rows[name].append(torch.cat([p.grad.flatten() for p in layer.parameters()]).double())
    return {name: torch.stack(own) for name, own in rows.items()}


def subject(kind):
    """A model, its task, examples and queries, one a batch."""
    torch.manual_seed(3)
    if kind == "decoder":
        from wikitext2 import Decoder

        tokens = torch.randint(7, (9, 5))
        rows = [{"input_ids": stretch, "labels": stretch} for stretch in tokens]
        batches = [{name: value[None] for name, value in row.items()} for row in rows]
        return Decoder(vocabulary=7, tokens=5, width=16, layers=1, heads=1), sp.CausalLM(), rows, batches
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 16, 3))
    rows = TensorDataset(torch.randn(9, 1, 4, 4), torch.arange(9) % 3)
    return model, sp.Classification(), rows, [[x[None], y[None]] for x, y in rows]


@needs_kronfluence
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("kind", ["decoder", "convolution"])
def test_much_damping_leaves_inner_products_over_each_layers_mean_eigenvalue(kind, relative):
    """Λ's mean is the Fisher's trace over the layer's size; sequences count their tokens as the loss does."""
    from _kronfluence import Damping, ekfac_influence

    model, task, rows, batches = subject(kind)
    train, queries = Subset(rows, range(6)), Subset(rows, range(6, 9))
    large = 1e7
    (scores,) = ekfac_influence(
        model, task, [sp.Checkpoint(model.state_dict(), 1)], train, queries, dampings=[Damping(large, relative)],
        fisher="empirical", batch_size=4,
    )  # fmt: skip

    def loss(model, batch):
        output = task.output(model, batch)
        return task.loss_derivatives(output.detach(), batch)[0] * output

    asked = layer_gradients(model, task.measurement, batches[6:])
    trained = layer_gradients(model, loss, batches[:6])
    weights = [task.fisher_weight(batch) for batch in batches[:6]]
    weight = torch.ones(6, 1) if weights[0] is None else torch.stack(weights)
    expected = torch.zeros(3, 6, dtype=torch.float64)
    for name, g in trained.items():
        mean = (weight * g).square().mean() if relative else 1.0
        expected -= asked[name] @ g.T / (6 * large * mean)
    np.testing.assert_allclose(scores.final, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@needs_kronfluence
def test_scores_predict_what_leaving_an_example_out_does():
    """Least squares at its optimum: a positive score is a measurement that the example raised."""
    from _kronfluence import Damping, ekfac_influence

    torch.manual_seed(0)
    x, noise = torch.randn(60, 3, dtype=torch.float64), torch.randn(60, 1, dtype=torch.float64)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64) + noise
    x_queries, y_queries = torch.randn(8, 3, dtype=torch.float64), 3 * torch.randn(8, 1, dtype=torch.float64)

    def solved(keep):
        return torch.linalg.lstsq(x[keep], y[keep]).solution

    def errors(weight):
        return (x_queries @ weight - y_queries).abs().squeeze(1)

    everything = torch.ones(60, dtype=torch.bool)
    optimum = solved(everything)
    raised = []
    for left_out in range(60):
        keep = everything.clone()
        keep[left_out] = False
        raised.append(errors(optimum) - errors(solved(keep)))
    checkpoint = sp.Checkpoint({"weight": optimum.T.float()}, 1)
    data, queries = TensorDataset(x.float(), y.float()), TensorDataset(x_queries.float(), y_queries.float())
    (scores,) = ekfac_influence(
        nn.Linear(3, 1, bias=False), sp.Regression("absolute"), [checkpoint, checkpoint], data, queries,
        dampings=[Damping(1e-3)],
    )  # fmt: skip
    correlation = np.corrcoef(scores.averaged.ravel(), torch.stack(raised, 1).numpy().ravel())[0, 1]
    assert correlation > 0.95
    assert sp.Task.higher_is_better  # and so for margins and likelihoods, positive is helpful


@needs_kronfluence
@pytest.mark.parametrize(("value", "relative"), [(0.1, True), (0.3, False)])
@pytest.mark.parametrize("bias", [False, True])
def test_ekfac_influence_is_the_dense_inverse_on_our_factors(value, relative, bias):
    from _kronecker import Factors, rows_of
    from _kronfluence import Damping, ekfac_influence

    model, run, train, queries = mlp_run(bias=bias)
    task, data = sp.Classification(), train["first"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    points, expected = run.stages[0].checkpoints[:2], []
    for point in points:
        factors = [Factors.of(rows) for rows in rows_of(model, task, [point], data, training=True).values()]
        damped = [
            Factors(f.outputs, f.inputs, 1 / (f.values + value * (float(f.values.mean()) if relative else 1)))
            for f in factors
        ]
        expected.append(dense_influence(model, task, point, data, queries, dense(damped)))
    other, scores = ekfac_influence(
        model, task, points, data, queries, dampings=[Damping(0.7), Damping(value, relative)], fisher="empirical",
        batch_size=4,
    )  # fmt: skip
    assert not np.allclose(other.final, scores.final, rtol=1e-2, atol=0)
    size = np.abs(expected).max()
    np.testing.assert_allclose(scores.final, expected[-1], rtol=1e-3, atol=1e-4 * size)
    np.testing.assert_allclose(scores.averaged, np.mean(expected, 0), rtol=1e-3, atol=1e-4 * size)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]


@needs_kronfluence
def test_ekfac_influence_is_exact_where_the_eigenbasis_is():
    from _kronfluence import Damping, ekfac_influence

    model, data, queries, _ = orthogonal_regression()
    task, checkpoint = sp.Regression("absolute"), sp.Checkpoint(model.state_dict(), 1)
    g = loss_gradients(model, task, checkpoint, data)
    inverse = torch.linalg.inv(g.T @ g / len(data) + 0.3 * torch.eye(3))
    expected = dense_influence(model, task, checkpoint, data, queries, inverse)
    (scores,) = ekfac_influence(
        model, task, [checkpoint], data, queries, dampings=[Damping(0.3, relative=False)], fisher="empirical"
    )
    np.testing.assert_allclose(scores.final, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


@needs_kronfluence
def test_labels_are_sampled_by_the_seed():
    from _kronfluence import Damping, ekfac_influence

    model, run, train, queries = mlp_run()
    given = (model, sp.Classification(), [run.final], train["first"], queries)
    first, again, other, own = (
        ekfac_influence(*given, dampings=[Damping(0.1)], **choice)[0].final
        for choice in ({}, {}, {"seed": 1}, {"fisher": "empirical"})
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, own)


@needs_kronfluence
def test_peers_are_two_methods_at_their_best_and_the_better_at_the_librarys_own_dampings(monkeypatch):
    """Factors are fitted once a run, whatever is asked of them; the library's own dampings compete too."""
    import _kronfluence

    model, run, train, queries = mlp_run()
    course = sp.Trajectory.from_stages(run.stages[:1])
    calls, compute = [], _kronfluence.ekfac_influence
    monkeypatch.setattr(
        _kronfluence, "ekfac_influence", lambda *given, **choices: calls.append(given) or compute(*given, **choices)
    )
    dampings = _kronfluence.DAMPINGS[:2]
    own = _kronfluence.peers(lambda: model, sp.Classification(), [course, course], train["first"], queries, dampings)
    scores = {(peer.method, peer.setting): peer.scores() for peer in own}
    assert len(calls) == 2
    assert all(len(runs) == 2 and runs[0].shape == (5, 11) for runs in scores.values())
    averaged = "EK-FAC influence functions, averaged"
    for name, damping in zip(("default", "heuristic"), dampings, strict=True):
        own = scores[f"{averaged}, {name} damping", str(damping)]
        np.testing.assert_array_equal(own, scores[averaged, str(damping)])
        assert not np.allclose(own, scores["EK-FAC influence functions", str(damping)])
    assert not np.allclose(*(scores[averaged, str(damping)] for damping in dampings))


def test_tasks_go_on_without_the_library(monkeypatch, capsys):
    import _kronfluence
    import _methods

    monkeypatch.setattr(_kronfluence, "find_spec", lambda _: None)
    assert _methods._peers(None, [], Path()) == []
    assert 'pip install "source-proj[kronecker]"' in capsys.readouterr().out


def test_what_ekfac_does_not_cover_is_refused(monkeypatch):
    from _kronfluence import Damping, ekfac_influence

    model, run, train, queries = mlp_run()
    rest = (sp.Classification(), [run.final], train["first"], queries)
    with pytest.raises(ValueError, match="EmbeddingBag has neither"):
        ekfac_influence(nn.EmbeddingBag(3, 3), *rest)
    with pytest.raises(ValueError, match="at least one checkpoint"):
        ekfac_influence(model, sp.Classification(), [], train["first"], queries)
    with pytest.raises(ValueError, match="fisher must be one of"):
        ekfac_influence(model, *rest, fisher="true")
    with pytest.raises(ValueError, match=r"dampings must be .*value=-1"):
        ekfac_influence(model, *rest, dampings=[Damping(-1.0)])
    monkeypatch.setitem(sys.modules, "kronfluence.analyzer", None)
    with pytest.raises(ImportError, match=r"source-proj\[kronecker\]"):
        ekfac_influence(model, *rest)


def test_what_a_killed_run_had_finished_is_kept(tmp_path, monkeypatch):
    import _kronfluence
    from _kronfluence import DEFAULT, HEURISTIC, ekfac_influence

    model, task, rows, _ = subject("convolution")
    points = [sp.Checkpoint({name: value + i for name, value in model.state_dict().items()}, i + 1) for i in range(3)]
    asked = []

    def scores(model, task, state, *rest):
        asked.append(float(state["3.bias"][0]))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return [np.full((3, 9), asked[-1] * number, dtype=np.float32) for number in (1, 2)]

    monkeypatch.setattr(_kronfluence, "_at_checkpoint", scores)
    take = partial(ekfac_influence, model, task, points, rows, rows, dampings=[DEFAULT, HEURISTIC], folder=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        take()
    found = take()
    assert asked == sorted(set(asked[:3])) + asked[2:3]  # the third is taken again, the first two are not
    for number, influence in enumerate(found, start=1):
        np.testing.assert_allclose(influence.averaged, number * np.mean(asked[:3]), rtol=1e-6)
        np.testing.assert_array_equal(influence.final, np.float32(number * asked[2]))
    assert take()[1].final.tolist() == found[1].final.tolist()
    assert len(asked) == 4
    assert len(take(seed=1)) == 2  # other draws of labels are other scores
    assert len(asked) == 7
