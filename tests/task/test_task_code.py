"""Tasks of one's own are known by names and by code: wherever they are imported, and whatever is measured."""

import os
import subprocess
import sys
import textwrap
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import source_proj as sp
from source_proj.task.code import code_digest

MODULE = """
    import sys
    import torch
    import source_proj as sp
    from torch import nn
    from torch.utils.data import TensorDataset

    SMOOTHING = 0.1
    X, Y = torch.arange(40.0).reshape(20, 2) / 40, torch.arange(20) % 3
    torch.manual_seed(0)
    net, data = nn.Linear(2, 3), TensorDataset(X, Y)

    def output(model, batch):
        return -nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none", label_smoothing=SMOOTHING)

    def derivatives(output, batch):
        return -torch.ones_like(output), None

    def probability(model, batch):
        return model(batch[0]).softmax(-1)[torch.arange(len(batch[1])), batch[1]]

    task = sp.Task(output, derivatives, name="smooth")
    if __name__ == "__main__":
        run = sp.Trajectory([sp.Checkpoint(net.state_dict(), step=10, lr=0.1)])
        sp.build(net, task, run, data, "bank", sketch=sp.Sketch(8), progress=False)
"""
ASKS = """
    import numpy as np
    from losses import *
    bank = sp.open("bank")
    same = sp.Source(bank, model=net, task=task, progress=False)
    asked = sp.Task(output, derivatives, probability, name="smooth", unit="probability")
    other = sp.Source(bank, model=net, task=asked, progress=False)
    print(same.score(data).unit, other.score(data).unit)
    print(np.corrcoef(same.score(data).values.ravel(), other.score(data).values.ravel())[0, 1] < 0.999)
    try:
        sp.Source(bank, model=net, task=sp.Task(probability, derivatives, name="smooth"))
    except sp.MismatchError as error:
        print(error)
"""


def python(folder, *arguments):
    command = [sys.executable, "-W", "error", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "builds",
    [("losses.py",), ("-m", "losses"), ("-c", "import runpy; runpy.run_path('losses.py', run_name='__main__')")],
)
def test_a_bank_that_a_script_built_is_asked_from_another(tmp_path, builds):
    (tmp_path / "losses.py").write_text(textwrap.dedent(MODULE))
    (tmp_path / "asks.py").write_text(textwrap.dedent(ASKS))
    python(tmp_path, *builds)
    first, differ, error = python(tmp_path, "asks.py").splitlines()
    assert (first, differ) == ("output probability", "True")
    assert "give the task that it was built with (its measurement may be another)" in error
    assert "leave task= out" not in error


def test_an_edited_constant_is_noticed_where_the_names_are_the_same(tmp_path):
    (tmp_path / "losses.py").write_text(textwrap.dedent(MODULE))
    python(tmp_path, "losses.py")
    (tmp_path / "losses.py").write_text(textwrap.dedent(MODULE.replace("SMOOTHING = 0.1", "SMOOTHING = 0.5")))
    ask = "import warnings; warnings.simplefilter('default'); from losses import *\n"
    ask += "sp.Source(sp.open('bank'), model=net, task=task)"
    done = subprocess.run([sys.executable, "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "the code of the task's output, or a value that it uses, was another when the bank was built" in done.stderr


def smoothed(by):
    def output(model, batch):
        return -nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none", label_smoothing=by)

    return output


def falling(output, batch):
    return -torch.ones_like(output), None


class Weighted:
    def __init__(self, weights):
        self.weights, self.seen = weights, []

    def __call__(self, model, batch):
        self.seen.append(len(batch[1]))
        return smoothed(0.0)(model, batch) * self.weights[batch[1]]


KINDS = {
    "closure": smoothed,
    "partial": lambda by: partial(_with_option, by=by),
    "object": lambda by: Weighted(torch.tensor([1.0, 2.0, 1 + by])),
    "method": lambda by: Weighted(torch.tensor([1.0, 2.0, 1 + by])).__call__,
    "lambda": lambda by: lambda model, batch: smoothed(by)(model, batch),
}


def _with_option(model, batch, by):
    return smoothed(by)(model, batch)


@pytest.mark.parametrize("kind", KINDS)
def test_another_loss_under_the_same_name_is_warned_of(tmp_path, kind):
    torch.manual_seed(0)
    net, data = nn.Linear(4, 3), TensorDataset(torch.randn(20, 4), torch.arange(20) % 3)
    run = sp.Trajectory([sp.Checkpoint(net.state_dict(), step=100, lr=0.1)])
    task, other = (sp.Task(KINDS[kind](by), falling) for by in (0.0, 0.5))
    build = partial(
        sp.build, net, trajectory=run, train_set=data, path=tmp_path / "bank", sketch=sp.Sketch(15), progress=False
    )
    bank = build(task=task)
    build(task=task)  # says nothing, and neither does who asks
    method = sp.GradDot(bank, model=net, task=sp.Task(KINDS[kind](0.0), falling), progress=False)
    assert np.isfinite(method.score(data)).all()
    for again in (lambda: build(task=other), lambda: sp.GradDot(bank, model=net, task=other)):
        with pytest.warns(UserWarning, match="the code of the task's output, or a value that it uses"):
            again()
    with pytest.warns(UserWarning, match="the code of the task's output"):
        bank.append(
            net, other, TensorDataset(torch.randn(5, 4), torch.arange(5) % 3), ids=range(90, 95), progress=False
        )


def test_a_subclass_is_known_by_the_code_of_its_methods():
    def task(by):
        class Mine(sp.Task):
            def output(self, model, batch):
                return smoothed(by)(model, batch)

        return Mine()

    assert task(0.1).code() == task(0.1).code() != task(0.2).code()
    assert set(task(0.1).code()) == {"python", "class"}
    assert sp.Classification().code() == {}


def test_what_a_function_keeps_is_no_part_of_its_code():
    calls, seen = 0, []

    def counting(model, batch):
        """Counts."""
        nonlocal calls
        calls += 1
        seen.append(batch)
        return model(batch)

    before = code_digest(counting)
    counting(lambda batch: batch, 1)
    assert code_digest(counting) == before


def test_weights_that_a_function_sees_may_move():
    weight, constant = nn.Parameter(torch.ones(3)), torch.ones(3)

    def output(model, batch):
        return model(batch) + weight.square().sum() + constant.sum()

    before = code_digest(output)
    weight.data += 1
    assert code_digest(output) == before
    constant += 1
    assert code_digest(output) != before


def test_words_are_no_part_of_code_and_constants_are():
    def made(words, key):
        scope = {}
        exec(f"def f(batch):\n    {words}\n    return [row[{key!r}] for row in batch]", scope)
        return code_digest(scope["f"])

    assert made('"""One."""', "a") == made('"""Two."""', "a") == made("# none", "a") != made("", "b")
    assert code_digest(lambda: "a") != code_digest(lambda: "b")


def test_hashes_are_the_same_in_every_process(tmp_path):
    (tmp_path / "losses.py").write_text(textwrap.dedent(MODULE))
    ask = "from losses import *; print(sorted(task.code().items()))"
    told = {
        subprocess.run(
            [sys.executable, "-c", ask], cwd=tmp_path, env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(told) == 1


def test_a_task_by_its_loss_is_the_task_by_minus_its_loss(tmp_path):
    torch.manual_seed(0)
    net, data = nn.Linear(4, 3), TensorDataset(torch.randn(20, 4), torch.arange(20) % 3)
    run = sp.Trajectory([sp.Checkpoint(net.state_dict(), step=100, lr=0.1)])
    scores = []
    for name, task in (
        ("by loss", sp.Task(loss=_loss)),
        ("by output", sp.Task(smoothed(0.2), falling, unit="minus loss")),
    ):
        bank = sp.build(net, task, run, data, tmp_path / name, sketch=sp.Sketch(15, "identity"), progress=False)
        scores.append(sp.Source(bank, model=net, task=task, progress=False).score(data))
    np.testing.assert_array_equal(*scores)
    assert scores[0].unit == scores[1].unit == "minus loss"
    losses = cross_entropy_rows(net, data)
    exact = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(each, [*net.parameters()], retain_graph=True)])
            for each in losses
        ]
    )
    tracin = sp.TracIn(sp.open(tmp_path / "by loss"), model=net, task=sp.Task(loss=_loss), progress=False).score(data)
    np.testing.assert_allclose(tracin.values, (exact @ exact.T * 10 / 20).numpy(), rtol=0.03, atol=0.02)
    assert set(sp.Task(loss=_loss).code()) == {"python", "loss"}
    with pytest.raises(TypeError, match="loss= stands for output= and loss_derivatives="):
        sp.Task(smoothed(0.2), loss=_loss)
    with pytest.raises(TypeError, match="a custom task needs output="):
        sp.Task(measurement=_loss)


def _loss(model, batch):
    return -smoothed(0.2)(model, batch)


def cross_entropy_rows(net, data):
    return _loss(net, data.tensors)
