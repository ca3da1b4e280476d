"""What the first batch, which is audited, does not show: weights that have no share in it, examples that mix later."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import source_proj as sp
from source_proj._errors import GradientError
from source_proj.gradients import ParameterSpace, gradient_engine
from source_proj.gradients.layout import Call, walk, where_examples_are_lost
from source_proj.sketch import Sketch

WIDTH = 6


class _Rounded(torch.autograd.Function):
    """A straight-through quantiser, which functions of torch's are not told of."""

    @staticmethod
    def forward(_ctx: Any, weight: Tensor) -> Tensor:
        return (weight * 16).round() / 16

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _Joined(torch.autograd.Function):
    """The product of two weights, as adapters make one."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return left @ right

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        left, right = ctx.saved_tensors
        return gradients[0] @ right.T, left.T @ gradients[0]


def _rounded(head: Head, h: Tensor) -> Tensor:
    return h @ _Rounded.apply(head.weight)


def _rounded_layer(head: Head, h: Tensor) -> Tensor:
    return F.linear(head.layer(h), _Rounded.apply(head.layer.weight))


def _joined(head: Head, h: Tensor) -> Tensor:
    return h @ (head.weight + _Joined.apply(head.layer.weight.T, head.weight))


def _over_rows(head: Head, h: Tensor) -> Tensor:
    return h @ torch.vmap(lambda row: row * row)(head.weight)


def _derived(head: Head, h: Tensor) -> Tensor:
    return h @ torch.func.grad(lambda weight: (weight**3).sum())(head.weight)


def _written(head: Head, h: Tensor) -> Tensor:
    matrix = torch.zeros(WIDTH, WIDTH)
    matrix.view(-1).add_(head.weight.flatten())
    return h @ matrix


def _flat(head: Head, h: Tensor) -> Tensor:
    start = h.new_zeros(1, len(h), WIDTH)
    flat = head.lstm._flat_weights
    return torch._VF.lstm(h[:, None], (start, start), flat, True, 1, 0.0, False, False, True)[0][:, -1]


def _listed(head: Head, h: Tensor) -> Tensor:
    return h @ head.listed[0]


USES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a function of a weight": _rounded,
    "a layer, and a function of its weight": _rounded_layer,
    "a function of two weights": _joined,
    "vmap over a weight": _over_rows,
    "grad by a weight": _derived,
    "written through a view": _written,
    "flat weights of a recurrent module": _flat,
    "a plain list of weights": _listed,
}


class Head(nn.Module):
    """Uses its weights in one of these ways."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use = USES[use]
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 2)
        self.listed = [self.weight]
        self.layer, self.lstm = nn.Linear(WIDTH, WIDTH), nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        return self.use(self, h)


class TwoTasks(nn.Module):
    """The second head has no part in examples of the first task."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.body, self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), Head(use)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        h = self.body(x).tanh()
        return torch.where(task[:, None] == 0, self.first(h), self.second(h))


def summed(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return model(*batch).square().sum(1)


@pytest.mark.parametrize("method", ["auto", "general"])
@pytest.mark.parametrize("use", USES)
def test_a_weight_without_a_share_in_the_first_batch_is_not_lost(use: str, method: str) -> None:
    torch.manual_seed(0)
    model = TwoTasks(use)
    space = ParameterSpace.from_model(model)
    engine = gradient_engine(model, space, Sketch(space.size, "identity"), method)
    for tasks in ([0, 0, 0, 0], [1, 0, 1, 1], [1, 1, 1]):
        batch = torch.randn(len(tasks), WIDTH), torch.tensor(tasks)
        _, rows = engine.sketch(summed, batch)
        expected = []
        for b in range(len(tasks)):
            (value,) = summed(model, (batch[0][b : b + 1], batch[1][b : b + 1]))
            parameters = list(space.parameters(model).values())
            gradients = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
            expected.append(torch.cat([gradient.flatten() for gradient in gradients]))
        torch.testing.assert_close(rows, torch.stack(expected), rtol=1e-4, atol=1e-5)


class Cut(nn.Module):
    """The mean over as many positions as the longest example of a batch has."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        longest = int((ids > 0).sum(1).max())
        return self.out(self.table(ids[:, :longest]).mean(1))


class Imputed(nn.Module):
    """What is missing is the mean of the batch's others."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.where(x.isnan(), x.nanmean(0), x))


class Scaled(nn.Module):
    """Numbers over the largest of the batch, which is 1 at first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x / x.detach().abs().max())


def _lengths(*lengths: int) -> Tensor:
    return torch.stack([torch.arange(1, 7) * (torch.arange(6) < length) for length in lengths])


def _missing(*gaps: int) -> Tensor:
    x = torch.randn(len(gaps), WIDTH)
    for row, gap in zip(x, gaps, strict=True):
        row[:gap] = torch.nan
    return x


def _largest(*sizes: float) -> Tensor:
    return torch.stack([torch.linspace(-size, size, WIDTH) for size in sizes])


@pytest.mark.parametrize(
    ("make", "batches"),
    [
        (Cut, [_lengths(5, 5, 5, 5), _lengths(6, 2, 3, 1)]),
        (Imputed, [_missing(0, 0, 0, 0), _missing(0, 2, 0, 1)]),
        (Scaled, [_largest(1, 1, 1, 1), _largest(1, 3, 1, 2)]),
    ],
)
def test_examples_that_depend_on_each_other_after_the_first_batch_are_refused(
    make: type[nn.Module], batches: list[Tensor]
) -> None:
    """Nothing of it is in the graph."""
    torch.manual_seed(0)
    model = make()
    space = ParameterSpace.from_model(model)
    engine = gradient_engine(model, space, Sketch(16))
    engine.sketch(lambda model, x: model(x).square().sum(1), batches[0])
    with pytest.raises(GradientError, match="must not depend on the other examples"):
        engine.sketch(lambda model, x: model(x).square().sum(1), batches[1])


@pytest.mark.parametrize(("pads", "kept"), [((1, 2), True), ((0, 0, 2, -2), False), ((0, 0, 0, 0), True)])
def test_padding_is_followed_where_it_moves_no_examples(pads: tuple[int, ...], kept: bool) -> None:
    layer = nn.Linear(3, 3)
    taps, h = [], layer(torch.randn(4, 3))
    taps.append(Call(h.grad_fn, (), 0))
    value = F.pad(h, pads).square().sum(1)
    order = walk([value.grad_fn], lambda node: [] if node is h.grad_fn else [c for c, _ in node.next_functions if c])
    assert (where_examples_are_lost(order, taps, value.grad_fn, 4) is None) is kept


def test_derivatives_that_depend_on_the_batch_are_refused(tmp_path: Path) -> None:
    """As weights of classes that average to one over the batch are."""
    weight = torch.tensor([1.0, 5.0, 2.0])

    def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"])[:, 0]

    def by_batch(o: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        own = weight[batch["class"]] / weight[batch["class"]].mean()
        return own * 2 * (o - batch["labels"]), own * 2

    def by_example(o: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        own = weight[batch["class"]] / weight.mean()
        return own * 2 * (o - batch["labels"]), own * 2

    torch.manual_seed(0)
    model = nn.Linear(WIDTH, 1)
    data = [{"x": torch.randn(WIDTH), "class": torch.tensor(i % 3), "labels": torch.randn(())} for i in range(10)]
    run = sp.Trajectory([sp.Checkpoint(model.state_dict(), step=1, lr=0.1)])
    options: dict[str, Any] = {"batch_size": 4, "sketch": sp.Sketch(8), "progress": False}
    with pytest.raises(GradientError, match="ℓ' of task 'custom' depends on the other examples"):
        sp.build(model, sp.Task(output, by_batch), run, data, tmp_path / "refused", **options)
    assert sp.build(model, sp.Task(output, by_example), run, data, tmp_path / "bank", **options).n_rows == 10
