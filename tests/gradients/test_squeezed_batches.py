"""Models that say ``squeeze()`` lose the dimension of a batch of one: they give the rows of those that do not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d

import source_proj as sp
from source_proj._errors import GradientError
from source_proj.gradients import ParameterSpace, gradient_engine


class Pooled(nn.Module):
    """A small convolutional network whose pooled features are squeezed, or flattened."""

    def __init__(self, outputs, *, squeezes):
        super().__init__()
        self.convolution, self.head, self.squeezes = nn.Conv2d(2, 5, 3), nn.Linear(5, outputs), squeezes

    def forward(self, x):
        pooled = adaptive_avg_pool2d(self.convolution(x).relu(), 1)
        made = self.head(pooled.squeeze() if self.squeezes else pooled.flatten(1))
        return made.squeeze() if self.squeezes else made


def rows_of(task, outputs, batches, method, *, squeezes):
    torch.manual_seed(outputs)
    model = Pooled(outputs, squeezes=squeezes)
    space = ParameterSpace.from_model(model)
    engine = gradient_engine(model, space, sp.Sketch(space.size, "identity"), method)
    return torch.cat([torch.column_stack(engine.sketch(task.output, batch)) for batch in batches]), engine


@pytest.mark.parametrize("method", ["auto", "general"])
@pytest.mark.parametrize("task", [sp.Classification(), sp.Regression()], ids=["classes", "numbers"])
@settings(deadline=None, max_examples=12)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_rows_are_those_of_a_model_that_flattens(method, task, sizes, seed):
    outputs = 3 if task.name == "classification" else 1
    torch.manual_seed(seed)
    batches = [
        (torch.randn(size, 2, 4, 4), torch.randint(0, 3, (size,)) if outputs > 1 else torch.randn(size))
        for size in sizes
    ]
    (rows, _), (expected, _) = (rows_of(task, outputs, batches, method, squeezes=way) for way in (True, False))
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-6)


def test_they_go_by_layers():
    batch = torch.randn(4, 2, 4, 4), torch.arange(4) % 3
    _, engine = rows_of(sp.Classification(), 3, [batch], "auto", squeezes=True)
    assert engine.method == "hooks", engine.reason


def test_what_a_task_of_ones_own_makes_of_them_is_named(tmp_path):
    def negative_error(model, batch):
        return -model(batch[0]).squeeze().abs()

    task = sp.Task(negative_error, lambda output, batch: (-torch.ones_like(output), None))
    model = nn.Linear(3, 1)
    run = sp.Trajectory([sp.Checkpoint(model.state_dict(), step=1, lr=0.1)])
    data = torch.utils.data.TensorDataset(torch.randn(6, 3), torch.randn(6))
    with pytest.raises((GradientError, ValueError), match=r"squeeze\(-1\)"):
        sp.build(model, task, run, data, tmp_path / "bank", sketch=sp.Sketch(8), progress=False)


class Standardised(nn.Module):
    """Features are standardised over the batch, so that one example alone has none."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head((x - x.mean(0)) / x.std(0))


@pytest.mark.filterwarnings("ignore:std.*degrees of freedom:UserWarning")
@pytest.mark.parametrize("method", ["auto", "general"])
def test_examples_that_are_not_finite_alone_depend_on_the_others(method):
    model = Standardised()
    engine = gradient_engine(model, ParameterSpace.from_model(model), sp.Sketch(8), method)
    with pytest.raises(GradientError, match="must not depend on the other examples of its batch, and its value does"):
        engine.sketch(sp.Classification().output, (torch.randn(4, 3), torch.tensor([0, 1, 1, 0])))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_queries_without_labels_are_answered_one_by_one(count, tmp_path):
    models = [Pooled(3, squeezes=way) for way in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    run = sp.Trajectory([sp.Checkpoint(models[0].state_dict(), step=1, lr=0.1)])
    images = torch.randn(7, 2, 4, 4)
    data, scores = torch.utils.data.TensorDataset(images, torch.arange(7) % 3), []
    for number, model in enumerate(models):
        bank = sp.build(
            model, sp.Classification(), run, data, tmp_path / str(number), sketch=sp.Sketch(64), progress=False
        )
        ask = sp.TracIn(bank, model=model, batch_size=2, progress=False)
        scores.append(torch.as_tensor(ask.score(images[:count]).values))
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-6)
