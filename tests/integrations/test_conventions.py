"""The conventions of captum and quanda: the same numbers as the library's own verbs, with their signs and shapes."""

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import source_proj as sp
from source_proj.integrations import CaptumInfluence, QuandaExplainer
from source_proj.integrations.captum import as_queries

N, Q, WIDTH = 23, 6, 4
TASKS = {
    "label": (sp.Classification(), 3, lambda n: torch.randint(3, (n,))),
    "error": (sp.Regression(), 1, torch.randn),
}


class Named(nn.Module):
    """A classifier that is called by keyword."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, features):
        return self.head(features)


def made(tmp_path_factory, task, model, train):
    run = sp.Trajectory([sp.Checkpoint(model.state_dict(), step=10, lr=0.3)])
    path = tmp_path_factory.mktemp("bank") / "bank"
    bank = sp.build(model, task, run, train, path, sketch=sp.Sketch(16), progress=False)
    return bank, sp.Source(bank, model=model, progress=False)


@pytest.fixture(scope="module", params=TASKS)
def asked(request, tmp_path_factory):
    torch.manual_seed(0)
    task, outputs, targets = TASKS[request.param]
    model = nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, outputs))
    train, queries = (TensorDataset(torch.randn(n, WIDTH), targets(n)) for n in (N, Q))
    bank, source = made(tmp_path_factory, task, model, train)
    return bank, source, train, queries


def test_positive_influence_improves_the_test_example(asked):
    _, source, _, queries = asked
    scores = source.score(queries)
    influence = CaptumInfluence(source).influence(queries.tensors)
    assert influence.shape == (Q, N)
    np.testing.assert_allclose(influence.numpy(), scores.values if scores.higher_is_better else -scores.values)


@pytest.mark.parametrize("proponents", [True, False])
@pytest.mark.parametrize("k", [1, 5, N])
def test_strongest_are_those_of_the_sorted_influence(asked, proponents, k):
    _, source, _, queries = asked
    influence = CaptumInfluence(source)
    every = influence.influence(queries.tensors)
    indices, values = influence.influence(queries.tensors, k=k, proponents=proponents)
    assert indices.dtype == torch.int64
    torch.testing.assert_close(values, every.sort(dim=1, descending=proponents).values[:, :k])
    torch.testing.assert_close(values, every.gather(1, indices))
    helpful = source.score(queries).helpful(k) if proponents else source.score(queries).harmful(k)
    np.testing.assert_allclose(np.abs(helpful.scores), values.abs().numpy(), rtol=1e-5, atol=1e-7)


def test_a_batch_a_data_set_and_a_loader_are_asked_alike(asked):
    _, source, _, queries = asked
    influence = CaptumInfluence(source)
    expected = influence.influence(queries)
    torch.testing.assert_close(influence.influence(list(queries.tensors)), expected)
    torch.testing.assert_close(influence.influence(DataLoader(queries, batch_size=4)), expected)


def test_self_influence_is_the_methods_own(asked):
    bank, source, train, _ = asked
    own = CaptumInfluence(source).self_influence()
    np.testing.assert_array_equal(own.numpy(), np.asarray(source.self_influence()))
    explainer = QuandaExplainer(model=source.model, train_dataset=train, attributor=source)
    torch.testing.assert_close(explainer.self_influence(batch_size=4), own)
    with pytest.raises(TypeError, match="GradDot has no self-influence"):
        CaptumInfluence(sp.GradDot(bank)).self_influence()


def test_explanations_are_the_influence_on_the_targets(asked):
    _, source, train, queries = asked
    x, targets = queries.tensors
    explainer = QuandaExplainer(model=source.model, train_dataset=train, attributor=source)
    expected = CaptumInfluence(source).influence((x, targets))
    torch.testing.assert_close(explainer.explain(x, targets), expected)
    torch.testing.assert_close(explainer.explain(x, targets.tolist()), expected)
    torch.testing.assert_close(explainer.explain(test_data=x[:2], targets=targets[:2]), expected[:2])


def test_a_dict_of_inputs_is_taken_apart(tmp_path_factory):
    torch.manual_seed(0)
    model, x, y = Named(), torch.randn(N, WIDTH), torch.randint(3, (N,))
    rows = [{"features": features, "labels": label} for features, label in zip(x, y, strict=True)]
    _, source = made(tmp_path_factory, sp.Classification(), model, rows)
    expected = torch.from_numpy(source.score(rows[:Q]).values)
    torch.testing.assert_close(CaptumInfluence(source).influence({"features": x[:Q], "labels": y[:Q]}), expected)
    explainer = QuandaExplainer(model, rows, source, task="text_classification")
    torch.testing.assert_close(explainer.explain({"features": x[:Q]}, y[:Q]), expected)


def test_benchmarks_have_their_explainer_made(asked):
    _, source, train, _ = asked
    given = []

    def make(*arguments):
        given.append(arguments)
        return source

    # the keywords that quanda's benchmarks use
    explainer = QuandaExplainer(
        model=source.model, checkpoints=["last.pt"], train_dataset=train, checkpoints_load_func=None, attributor=make
    )
    assert given == [(source.model, train, ["last.pt"])]
    assert explainer.self_influence().shape == (N,)


def test_faults_are_named(asked):
    _, source, train, queries = asked
    x, targets = queries.tensors
    with pytest.raises(sp.MismatchError, match=f"{N} training examples, and train_dataset {N - 1}"):
        QuandaExplainer(source.model, list(train)[:-1], source)
    with pytest.raises(ValueError, match="got 'causal_lm'"):
        QuandaExplainer(source.model, train, source, task="causal_lm")
    for batch in [(x, targets[:-1]), (x[:0], targets[:0]), (x, torch.tensor(1))]:
        with pytest.raises(ValueError, match="as many targets as inputs"):
            CaptumInfluence(source).influence(batch)


@pytest.mark.parametrize("name", ["MislabelingDetectionMetric", "ShortcutDetectionMetric"])
def test_quandas_own_metrics_take_it(asked, name):
    metrics = pytest.importorskip("quanda.metrics.downstream_eval", reason="quanda is not installed")
    _, source, train, queries = asked
    if not source.task.higher_is_better:
        pytest.skip("quanda's metrics are about classes")
    x, targets = queries.tensors
    if name == "MislabelingDetectionMetric":
        metric = metrics.MislabelingDetectionMetric(
            source.model, train, [0, 3], explainer_cls=QuandaExplainer, expl_kwargs={"attributor": source}
        )
    else:
        chosen = (train.tensors[1] == 0).nonzero().flatten().tolist()
        metric = metrics.ShortcutDetectionMetric(
            source.model, train, chosen, 0, filter_by_non_shortcut=False, filter_by_shortcut_pred=False
        )
        metric.update(QuandaExplainer(source.model, train, source).explain(x, targets), x, targets)
    assert 0 <= metric.compute()["score"] <= 1


@pytest.mark.parametrize("targets", [None, ["cat", "dog"], [[0], [1, 2]]], ids=["none", "words", "ragged"])
def test_what_makes_no_tensor_is_named(targets):
    inputs = torch.zeros(2, 3)
    for batch in ((inputs, targets), [inputs, targets], {"x": inputs, "labels": targets}):
        with pytest.raises(TypeError, match=rf"has {re.escape(repr(targets))} for inputs or targets.* give"):
            as_queries(batch)
