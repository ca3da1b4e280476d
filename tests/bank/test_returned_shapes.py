"""What a task returns is one number an example, whoever wrote it: all else is refused, and never broadcast."""

import pytest
import torch
from bank_runs import BATCH, make_run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import source_proj as sp
from source_proj.task import Task
from source_proj.task.base import derivatives_of, fisher_weight_of, per_example

# What stands in place of (B,) numbers; those of one axis broadcast, or fill a part alone, without an error of torch's.
WRONG = {
    "one for all": lambda size: torch.ones(1),
    "one less": lambda size: torch.ones(size - 1),
    "a column": lambda size: torch.ones(size, 1),
    "no axis": lambda size: torch.ones(()),
    "a number": lambda size: 1.0,
    "an array": lambda size: torch.ones(size).numpy(),
}


class Returning(Task):
    """A subclass, whose own methods no function of the base sees."""

    name = "returning"

    def __init__(self, first=torch.ones, second=torch.ones, fisher=torch.ones, share=None):
        super().__init__()
        self.first, self.second, self.fisher, self.shares = first, second, fisher, share

    def output(self, model, batch):
        return model(batch[0])[:, 0]

    def loss_derivatives(self, output, batch):
        return self.first(len(output)), self.second(len(output))

    def fisher_weight(self, batch):
        return self.fisher(len(batch[1]))

    @property
    def needs_normalizer(self):
        return self.shares is not None and self.normalizer is None

    def share(self, batch):
        return self.shares(len(batch[1]))


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(
    ("which", "named"), [("first", "ℓ'"), ("second", "ℓ''"), ("fisher", "fisher_weight"), ("share", "share")]
)
def test_a_build_refuses_what_is_not_one_number_an_example(tmp_path, wrong, which, named):
    with pytest.raises(ValueError, match=rf"^{named} must be one number per example, shape \({BATCH},\), got "):
        make_run(1).build(tmp_path / "bank", task=Returning(**{which: WRONG[wrong]}))


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 6), shape=st.lists(st.integers(0, 6), max_size=3))
def test_any_other_shape_is_refused(size, shape):
    def made(_):
        return torch.ones(shape)

    calls = [
        lambda: derivatives_of(Returning(first=made), torch.zeros(size), None),
        lambda: derivatives_of(Returning(second=made), torch.zeros(size), None),
        lambda: fisher_weight_of(Returning(fisher=made), (None, torch.zeros(size)), size),
        lambda: per_example(made(size), "share", size),
    ]
    for call in calls:
        if shape == [size]:
            call()
        else:
            with pytest.raises(ValueError, match="must be one number per example"):
                call()


@pytest.mark.parametrize("gradients", ["auto", "general"])
def test_complex_outputs_are_refused(tmp_path, gradients):
    def turned(model, batch):
        return model(batch[0])[:, 0] * 1j

    task = Task(turned, lambda output, batch: (-torch.ones_like(output), None))
    with pytest.raises(TypeError, match=r"one scalar per example.*got torch.complex64: return its .real or .abs"):
        make_run(1).build(tmp_path / "bank", task=task, gradients=gradients)


@pytest.mark.parametrize(
    "measurement",
    [
        lambda model, batch: model(batch[0])[:, 0].detach(),
        lambda model, batch: (model(batch[0]).argmax(1) == batch[1]).float(),
        lambda model, batch: torch.zeros(len(batch[1])),
    ],
    ids=["detached", "accuracy", "constant"],
)
@pytest.mark.parametrize("method", [sp.Source, sp.GradDot])
def test_measurements_without_a_graph_are_refused(tmp_path, measurement, method):
    run = make_run(1, n=20)
    task = Task(lambda m, b: m(b[0])[:, 0], lambda o, b: (-torch.ones_like(o), None), measurement, name="mine")
    bank = run.build(tmp_path / "bank", task=task)
    ask = method(bank, model=run.model, task=task, progress=False)
    with pytest.raises(sp.GradientError, match=r"no query up to 2 has .* the measurement of task 'mine' is detached"):
        ask.score(torch.utils.data.Subset(run.data, range(3)))


def test_measurements_of_zeros_with_a_graph_are_answered(tmp_path):
    run = make_run(1, n=20)
    task = Task(lambda m, b: m(b[0])[:, 0], lambda o, b: (-torch.ones_like(o), None), lambda m, b: 0 * m(b[0])[:, 0])
    bank = run.build(tmp_path / "bank", task=task)
    scores = sp.GradDot(bank, model=run.model, task=task, progress=False).score(torch.utils.data.Subset(run.data, [0]))
    assert not scores.values.any()


def test_models_whose_shapes_are_not_known_yet_are_refused(tmp_path):
    def lazy():
        return nn.Sequential(nn.LazyLinear(10), nn.ReLU(), nn.LazyLinear(3))

    run = make_run(1)
    bank = run.build(tmp_path / "bank")
    calls = [
        lambda: run.build(tmp_path / "other", model=lazy()),
        lambda: sp.plan(lazy(), run.task, run.trajectory, run.data),
        lambda: sp.Source(bank, model=lazy()).score(run.data),
        lambda: sp.Recorder(lazy(), torch.optim.SGD(lazy().parameters(), lr=0.1), tmp_path / "run", every=1),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"'0.bias', '2.weight', .* have no shape yet.* call the model on a batch"):
            call()
    assert not (tmp_path / "other").exists()
