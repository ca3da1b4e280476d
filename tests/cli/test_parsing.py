import sys

import pytest
import torch
from torch import nn

from source_proj.cli.parsing import (
    load_model,
    load_object,
    make_task,
    make_trajectory,
    parse_damping,
    parse_options,
    parse_segments,
)
from source_proj.task import CausalLM, Classification, Regression
from source_proj.trajectory import SGD

MODULE = """
import functools
import torch
from torch import nn
import source_proj.task as task

class Net(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)

def make(bias=True):
    return nn.Linear(3, 2, bias=bias)

ready = nn.Linear(4, 2)
partial = functools.partial(make, bias=False)
pairs = [(1, 2)]

class Shelf:
    model = ready

def weighted():
    return task.Classification(sample_weight="weight")
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "shop.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("import absent_dependency\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("shop", "broken"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(("name", "width"), [("Net", 2), ("make", 3), ("ready", 4), ("partial", 3), ("Shelf.model", 4)])
@pytest.mark.usefixtures("here")
def test_models_are_made_by_functions_and_classes_or_used_as_they_are(name, width):
    model = load_model(f"shop:{name}")
    assert isinstance(model, nn.Linear)
    assert model.in_features == width


@pytest.mark.usefixtures("here")
def test_lists_are_used_as_they_are():
    assert load_object("shop:pairs", "--data") == [(1, 2)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shop", "module:function, got 'shop'"),
        (":make", "module:function"),
        ("shop:", "module:function"),
        ("nowhere:make", "no module 'nowhere'"),
        ("shop.inner:make", "no module"),
        ("shop:absent", "shop has no 'absent'"),
    ],
)
@pytest.mark.usefixtures("here")
def test_wrong_names_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        load_object(name, "--data")


@pytest.mark.usefixtures("here")
def test_a_missing_import_of_the_module_is_not_blamed_on_the_option():
    with pytest.raises(ModuleNotFoundError, match="absent_dependency"):
        load_object("broken:make", "--data")


@pytest.mark.usefixtures("here")
def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"must give a torch\.nn\.Module, got list"):
        load_model("shop:pairs")


def test_tasks_by_name_and_options():
    task = make_task("classification", ["label_smoothing=0.1"])
    assert isinstance(task, Classification)
    assert task.spec() == Classification(label_smoothing=0.1).spec()
    assert make_task("regression", ["measurement=squared"]).spec() == Regression("squared").spec()
    assert make_task("causal-lm", ["shift=false", "ignore-index=-1"]).spec() == CausalLM(False, ignore_index=-1).spec()


@pytest.mark.usefixtures("here")
def test_tasks_of_one_s_own():
    assert make_task("shop:weighted").spec() == Classification(sample_weight="weight").spec()
    with pytest.raises(ValueError, match=r"label_smoothing.*has no meaning"):
        make_task("shop:weighted", ["label_smoothing=0.1"])
    with pytest.raises(TypeError, match=r"must give a source_proj\.Task"):
        make_task("shop:pairs")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ranking", [], "unknown task 'ranking'; choose one of classification, regression, causal-lm"),
        ("regression", ["los=mse"], r"no option \['los'\]; its options are .*loss"),
        ("regression", ["loss"], "key=value, got 'loss'"),
        ("regression", ["loss=huber"], "huber"),
    ],
)
def test_wrong_tasks_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_task(name, options)


def test_options_keep_words_that_are_no_json():
    assert parse_options(["a=1", "b=x=y", "c=null", "d="], "--o") == {"a": 1, "b": "x=y", "c": None, "d": ""}


def trajectory(**changes):
    options = {"lr": None, "momentum": 0.0, "weight_decay": 0.0, "segments": None} | changes
    return make_trajectory(options.pop("recorder", None), options.pop("named", None), options.pop("at", ()), **options)


def test_checkpoints_are_sorted_and_carry_the_optimizer(tmp_path):
    for step in (5, 10):
        torch.save(nn.Linear(2, 2).state_dict(), tmp_path / f"{step}.pt")
    points = [f"10={tmp_path / '10.pt'}", f"5={tmp_path / '5.pt'}"]
    (stage,) = trajectory(at=points, lr=0.1, momentum=0.9, weight_decay=1e-3, segments=2).stages
    assert [point.step for point in stage.checkpoints] == [5, 10]
    assert stage.optimizer == SGD(momentum=0.9, weight_decay=1e-3)
    assert stage.segment_indices == [[0], [1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "got none"),
        ({"recorder": "run", "named": "m:f"}, "got --recorder and --trajectory"),
        ({"recorder": "run", "lr": 0.1}, "belong to --checkpoint; --recorder brings its own"),
        ({"named": "m:f", "segments": 2}, "--segments belongs to"),
        ({"at": ["5=w.pt"]}, "needs --lr"),
        ({"at": ["w.pt"], "lr": 0.1}, "STEP=PATH"),
        ({"at": ["x=w.pt"], "lr": 0.1}, "STEP=PATH"),
    ],
)
def test_ambiguous_trajectories_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        trajectory(**options)


@pytest.mark.parametrize("text", ["true", "x", "1.5", '"a"'])
def test_wrong_segments_are_refused(text):
    with pytest.raises(ValueError, match="--segments"):
        parse_segments(text)


def test_absent_options_stay_absent():
    assert parse_segments(None) is None


def test_wrong_damping_is_refused():
    with pytest.raises(ValueError, match="noise, off or a number"):
        parse_damping("some")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"learning_rate": 0.1},
            "--learning-rate belongs to --hf-run; the constant learning rate of --checkpoint is --lr",
        ),
        (
            {"warmup_steps": 2, "steps": (1,)},
            "--warmup-steps and --steps belong to --hf-run; --checkpoint brings its own",
        ),
    ],
)
def test_options_of_a_trainers_run_are_named_as_they_are_typed(options, words):
    rest = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "segments": 1, "hf_options": options}
    with pytest.raises(ValueError, match=f"^{words}$"):
        make_trajectory(None, None, ["1=a.pt"], **rest)
