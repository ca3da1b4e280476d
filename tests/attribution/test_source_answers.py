"""Source and its results as notebooks use them: own answers, shared features, parts, progress, and what is shown."""

import copy
import operator
import pickle

import numpy as np
import pytest
import torch
from problems import classification, source
from torch.utils.data import TensorDataset

import source_proj as sp
from source_proj.attribution.self_influence import SelfInfluence


def predicted(problem, bank):
    model = copy.deepcopy(problem.model)
    bank.final_checkpoint().load_into(model)
    inputs = problem.queries.tensors[0]
    return inputs, model(inputs).argmax(1)


def test_inputs_alone_are_asked_about_the_models_own_answer(blobs):
    problem, bank = blobs
    method = source(problem, bank, query_gradient="mean")
    inputs, answers = predicted(problem, bank)
    expected = method.score(TensorDataset(inputs, answers))
    for given in (inputs, TensorDataset(inputs), list(inputs)):
        found = method.score(given)
        np.testing.assert_array_equal(found, expected)
        assert [found.shown.answers[i].value for i in range(len(inputs))] == answers.tolist()
    told = method.replace(task=sp.Classification(target="predicted"))
    np.testing.assert_array_equal(told.score(problem.queries), expected)
    hits = told.helpful(problem.queries, 3)
    assert hits.ids == expected.helpful(3).ids
    assert "probability" in str(hits)
    assert method.score(problem.queries).shown.answers is None


def test_the_runs_of_an_ensemble_are_asked_the_same(tmp_path):
    problems = [classification(seed=0), classification(seed=1)]
    problems[1].train = problems[0].train
    banks = [problem.build(tmp_path / str(i), sp.Sketch(dim=16, seed=i)) for i, problem in enumerate(problems)]
    inputs, answers = predicted(problems[0], banks[0])
    both = source(problems[0], banks)
    np.testing.assert_array_equal(both.score(inputs), both.score(TensorDataset(inputs, answers)))


def test_helpful_and_harmful_of_every_method(blobs):
    problem, bank = blobs
    for made in (sp.Source, sp.TracIn, sp.Trak, sp.InfluenceFunction, sp.DataInf, sp.GradDot, sp.GradCos, sp.Hydra):
        method = made(bank, model=problem.model, progress=False)
        scores = method.score(problem.queries)
        assert method.helpful(problem.queries, 3).ids == scores.helpful(3).ids
        assert method.harmful(problem.queries, 3).ids == scores.harmful(3).ids


def test_replace_is_a_new_source_that_shares_what_it_can(blobs):
    problem, bank = blobs
    method = source(problem, bank)
    features = method.sketch(problem.queries)
    other = method.replace(damping=0.3, segments=1)
    assert other.banks == method.banks
    np.testing.assert_array_equal(other.score(features), source(problem, bank, damping=0.3, segments=1).score(features))
    np.testing.assert_array_equal(method.score(features), source(problem, bank).score(features))
    with pytest.raises(TypeError, match="dampening"):
        method.replace(dampening=1.0)
    with pytest.raises(TypeError, match=r"replace\(\) keeps the banks"):
        method.replace(bank=bank)


def test_self_influence_prints_the_highest(blobs):
    problem, bank = blobs
    influence = source(problem, bank).self_influence()
    title, *lines = str(influence).splitlines()
    assert title == f"{influence!r}. The highest:"
    assert [int(line.split()[2]) for line in lines] == [hit.id for hit in influence.top_k(5)]
    assert [float(line.split()[1]) for line in lines] == pytest.approx([hit.score for hit in influence.top_k(5)], 1e-2)


def test_self_influence_counts_as_its_array(blobs):
    problem, bank = blobs
    influence = source(problem, bank).self_influence()
    values = np.asarray(influence)
    assert (values.shape, values.dtype) == ((40,), np.float32)
    assert influence.train_ids == bank.ids
    np.testing.assert_array_equal(np.argsort(influence), np.argsort(values))
    np.testing.assert_array_equal(influence[3:5], values[3:5])
    np.testing.assert_array_equal(-influence + 1, -values + 1)
    np.testing.assert_array_equal(influence > values.mean(), values > values.mean())
    assert influence.sum() == values.sum()
    assert [hit.id for hit in influence.top_k(3)] == np.argsort(-values, kind="stable")[:3].tolist()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(influence)), values)
    frame = influence.to_pandas()
    assert list(frame.columns) == ["train_id", "self_influence"]
    assert "SelfInfluence(40" in influence._repr_html_()


@pytest.mark.parametrize("name", ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow"])
def test_operators_do_to_self_influence_what_they_do_to_its_array(name):
    """What is written into itself, as by `influence /= influence.max()`, called itself without end."""
    drawn = np.random.default_rng(0).uniform(0.5, 2, (2, 9)).astype(np.float32)
    for operand in ("number", "array", "itself"):
        for kind in (name, f"i{name}"):
            values, influence = drawn[0].copy(), SelfInfluence(drawn[0].copy(), list(range(9)))
            others = {"number": (2, 2), "array": (drawn[1], drawn[1]), "itself": (values, influence)}[operand]
            apply = getattr(operator, kind)
            np.testing.assert_array_equal(apply(influence, others[1]), apply(values, others[0]))
            np.testing.assert_array_equal(influence, values)  # changed, or left as it was


def test_parts_know_whose_they_are(staged):
    problem, bank = staged
    parts = source(problem, bank).by_segment(problem.queries)
    frame = parts.to_pandas()
    assert len(frame) == len(problem.queries) * parts.present.sum()
    np.testing.assert_array_equal(parts.present[0], np.arange(45) < 30)
    total = parts.total()
    summed = frame.groupby(["query_id", "train_id"], sort=False)["score"].sum()
    np.testing.assert_allclose(summed.to_numpy(), np.asarray(total).ravel(), rtol=1e-4, atol=1e-6)
    assert total.train_ids == bank.ids
    assert parts.names[0] in parts._repr_html_()


def test_stages_go_by_name_or_number(staged):
    _, bank = staged
    assert bank.checkpoint("pretrain", 0).hash() == bank.checkpoint(0, 0).hash()
    assert bank.stage_index("finetune") == bank.stage_index(1) == 1
    for wrong in ("later", 2, True, 0.0):
        with pytest.raises(ValueError, match=r"one of the bank's stages \['pretrain', 'finetune'\]"):
            bank.stage_index(wrong)


def test_progress_tells_a_function(blobs, tmp_path):
    problem, _ = blobs
    steps = []
    run = (problem.model, problem.task, problem.trajectory, problem.train)
    bank = sp.build(*run, tmp_path / "bank", sketch=sp.Sketch(dim=8), progress=lambda *step: steps.append(step))
    method = sp.Source(bank, model=problem.model, progress=lambda *step: steps.append(step), query_gradient="mean")
    method.top_k(problem.queries, 1)
    count = bank.stages[0].n_checkpoints
    said = [description for description, _, _ in steps]
    assert f"queries, checkpoint {count} of {count}" in said
    assert said.index("fit") < len(said)
    assert all(0 < done <= total for _, done, total in steps)
    for description in ("fit", f"queries, checkpoint 1 of {count}"):
        assert [step for step in steps if step[0] == description][-1][1:] in {(step[2], step[2]) for step in steps}


def test_everything_has_a_short_view(blobs):
    problem, bank = blobs
    method = source(problem, bank)
    scores = method.score(problem.queries)
    bank.examples = sp.Examples(problem.train, picture=(1, 5))
    shown = [method.top_k(problem.queries, 2), scores, method.by_segment(problem.queries), bank, method]
    shown += [problem.trajectory, scores.predict_removal([1]), scores.group([1, 2]), method.self_influence()]
    for thing in shown:
        text = thing._repr_html_()
        assert type(thing).__name__ in text or "Without 1" in text
        assert len(text) < 60_000
    assert "<img" in shown[0]._repr_html_()


def test_columns_of_a_tokenizer_are_queries(blobs):
    problem, bank = blobs
    inputs, answers = predicted(problem, bank)

    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, child in problem.model.named_children():
                self.add_module(name, child)

        def forward(self, x):
            for child in self.children():
                x = child(x)
            return x

    method = sp.Source(bank, model=Named(), progress=False)
    expected = method.score(TensorDataset(inputs, answers))
    np.testing.assert_array_equal(method.score({"x": inputs}), expected)
    with pytest.raises(sp.MismatchError, match="different lengths"):
        method.score({"x": inputs, "labels": answers[:1]})


@pytest.mark.parametrize("scale", [1e-15, 1e12, 1e19])
@pytest.mark.parametrize("cache", [True, False])
def test_scores_have_the_size_of_gradients_up_to_where_products_overflow(tmp_path, scale, cache):
    """Beyond, scores were NaN without a word, or an error of LAPACK's."""
    torch.manual_seed(0)
    inputs, targets, start = torch.randn(30, 4), torch.randn(30), torch.randn(1, 4)
    task = sp.Task(lambda model, batch: model(batch[0])[:, 0], lambda o, batch: (2 * (o - batch[1]), None), name="own")

    def scores(scale):
        model, data = torch.nn.Linear(4, 1, bias=False), TensorDataset(inputs * scale, targets)
        model.weight.data = start / scale
        run = sp.Trajectory([sp.Checkpoint(model.state_dict(), step=10, lr=0.1 / scale**2)])
        path = tmp_path / f"{scale}"
        sketch = sp.Sketch(4, kind="identity")
        bank = sp.build(model, task, run, data, path, sketch=sketch, storage="float32", progress=False)
        method = sp.Source(bank, model=model, task=task, damping=0.0, cache=cache, progress=False)
        return method.score(TensorDataset(inputs[:3] * scale, targets[:3])).values

    if scale > 1e18:
        with pytest.raises(sp.GradientError, match=r"spectrum of stage 'train' at steps \[10\] is not finite.*without"):
            scores(scale)
    else:
        np.testing.assert_allclose(scores(scale), scores(1.0), rtol=1e-4, atol=1e-6)
