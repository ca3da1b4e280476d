"""Gradients of stacked models, held to those of each by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from source_proj.gradients.general import first_line
from source_proj.gradients.replaced import call_with, exchanged
from source_proj.trajectory.checkpoint import set_evaluating

__all__ = ["StackedLoss", "proven_loss", "stacking"]

State = Mapping[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Gradients = dict[str, Tensor | None]

_EXACT = 1e-6  # of a parameter's gradient in double precision
_ROUNDED = 0.05  # in the model's own, where a unit that is 0 but for rounding may fall on either side


class _UnstackedError(ValueError):
    """What torch cannot do to stacked models."""


@contextmanager
def stacking(what: str) -> Iterator[None]:
    """Within, what torch cannot do to stacked models is a ValueError with torch's reason and the remedy."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as problem:  # whatever a layer makes of tensors that are not quite tensors
        reason = first_line(problem).partition(". ")[0].removesuffix(".")
        raise _UnstackedError(
            f"torch cannot {what} stacked models ({reason}): replace that layer or loss, or train one by one "
            "(GroundTruth.fill)"
        ) from problem


class StackedLoss:
    """The mean loss of a batch of each of M models that are one module with weights of each, as a function to train on.

    Args:
        model: the module; a hook is added to it.
        loss: mean loss of ``(outputs, targets)``.
        each_alone: differentiate each model's loss before models are stacked, and not the sum of all.
        unused: names of parameters that take no part in the loss.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, *, each_alone: bool = False, unused: frozenset[str] = frozenset()
    ) -> None:
        self._model, self._loss, self._each_alone, self._unused = model, loss, each_alone, unused
        model.register_forward_hook(_and_buffers)

    def gradients(self, parameters: State, buffers: State, x: Tensor, y: Tensor) -> tuple[Gradients, dict[str, Tensor]]:
        """Gradients of the trained parameters, None for those that take no part, and the buffers after the pass.

        Args:
            parameters: of all models, stacked.
            buffers: likewise.
            x: inputs of a batch of each ``(M, b, ...)``.
            y: targets likewise.
        """
        trained = {name: value for name, value in parameters.items() if value.requires_grad}
        frozen = {name: value for name, value in parameters.items() if name not in trained}
        if self._each_alone:
            plain = {name: value.detach() for name, value in trained.items()}
            each = vmap(grad(self._of_one, has_aux=True), randomness="different")
            found, after = each(plain, frozen, buffers, x, y)
            return {name: None if name in self._unused else found[name] for name in trained}, after
        losses, after = vmap(self._of_one, randomness="different")(trained, frozen, buffers, x, y)
        rows = torch.autograd.grad(losses.sum(), list(trained.values()), allow_unused=True)
        return dict(zip(trained, rows, strict=True)), after

    def differentiate(self, parameters: State, buffers: State, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Give parameters their gradients; those that are frozen or take no part have none, as in a loop of one's own.

        Returns:
            The buffers after the pass.
        """
        gradients, after = self.gradients(parameters, buffers, x, y)
        for name, gradient in gradients.items():
            # Fused optimizers go wrong, silently, where strides differ.
            parameters[name].grad = None if gradient is None else gradient.contiguous()
        return {name: value.detach() for name, value in after.items()}

    def _of_one(
        self, trained: State, frozen: State, static: State, x: Tensor, y: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        outputs, after = call_with(self._model, {**trained, **frozen, **static}, (x,))
        return self._loss(outputs, y), {name: after[name] for name in static if name in after}


def proven_loss(
    make: Callable[[], nn.Module], model: nn.Module, loss: Loss, parameters: State, buffers: State, x: Tensor, y: Tensor
) -> StackedLoss:
    """The loss of stacked models, differentiated in a way that gives the first and the last their own gradients.

    Of a sum of losses torch has not every gradient right: of an embedding whose ``padding_idx`` row stands still, all
    models but the first would train theirs. Each model's loss by itself is differentiated then, which has been slower
    for others.

    Args:
        make: makes a module like the model, to be tried.
        model: the module; it does not notice.
        loss: mean loss of ``(outputs, targets)``.
        parameters: of all models, stacked.
        buffers: likewise.
        x: inputs of a batch of each ``(M, b, ...)``.
        y: targets likewise.

    Raises:
        ValueError: torch cannot run stacked models, or neither way gives the gradients of single ones.
    """
    places = sorted({0, len(x) - 1})
    with torch.random.fork_rng():
        for dtype, tolerance in ((torch.float64, _EXACT), (None, _ROUNDED)):
            own, static = ({n: _as(v[places], dtype) for n, v in state.items()} for state in (parameters, buffers))
            batch = _as(x[places], dtype), _as(y[places], dtype)
            try:
                each_alone, unused = _choice(make, loss, own, static, *batch, tolerance)
                return StackedLoss(model, loss, each_alone=each_alone, unused=unused)
            except (RuntimeError, _UnstackedError):  # the module makes numbers of a precision of its own
                if dtype is None:
                    raise
    raise AssertionError("the loop returns or raises")


def _choice(
    make: Callable[[], nn.Module], loss: Loss, own: State, static: State, x: Tensor, y: Tensor, tolerance: float
) -> tuple[bool, frozenset[str]]:
    """Whether each model's loss is to be differentiated alone, and which parameters take no part."""
    for evaluating in (False, True):
        made = set_evaluating(make()) if evaluating else make()
        plain = _single_gradients(made, loss, own, static, x, y)
        again = _single_gradients(made, loss, own, static, x, y)
        pairs = zip(chain(*plain.values()), chain(*again.values()), strict=True)
        if all(_is_same(first, second) for first, second in pairs):
            break
    else:  # it draws, in evaluation as well: nothing can be compared
        _run(StackedLoss(make(), loss), own, static, x, y)
        return False, frozenset()
    _require_dense(plain)
    if evaluating:
        _run(StackedLoss(make(), loss), own, static, x, y)
    unused = frozenset(name for name, rows in plain.items() if rows[0] is None)
    whole = max((float(row.norm()) for row in chain(*plain.values()) if row is not None), default=0.0)
    for each_alone in (False, True):
        made = set_evaluating(make()) if evaluating else make()
        tried = StackedLoss(made, loss, each_alone=each_alone, unused=unused)
        stacked = _run(tried, own, static, x, y)
        wrong = [name for name, rows in plain.items() if not _alike(stacked[name], rows, tolerance, whole)]
        if not wrong:
            return each_alone, unused
    raise ValueError(
        f"the gradient of {wrong[0]!r} of stacked models is not that of single ones, as torch computes it: train one "
        "by one (GroundTruth.fill)"
    )


def _run(losses: StackedLoss, own: State, static: State, x: Tensor, y: Tensor) -> Gradients:
    with stacking("train"):
        return losses.gradients(own, static, x, y)[0]


def _require_dense(plain: Mapping[str, Sequence[Tensor | None]]) -> None:
    sparse = [
        name for name, rows in plain.items() if any(r is not None and r.layout is not torch.strided for r in rows)
    ]
    if sparse:
        raise ValueError(
            f"the gradients of {sparse[:5]} are sparse, and torch stacks dense ones alone: make the embedding with "
            "sparse=False, or train one by one (GroundTruth.fill)"
        )


def _single_gradients(
    model: nn.Module, loss: Loss, own: State, static: State, x: Tensor, y: Tensor
) -> dict[str, list[Tensor | None]]:
    """Each trained parameter's gradients, of one model after the other, by plain backward passes."""
    rows: dict[str, list[Tensor | None]] = {name: [] for name, value in own.items() if value.requires_grad}
    for m in range(len(x)):
        one = {name: value[m].detach().clone().requires_grad_(value.requires_grad) for name, value in own.items()}
        with exchanged(model, {**one, **{name: value[m].clone() for name, value in static.items()}}):
            found = torch.autograd.grad(loss(model(x[m]), y[m]), [one[name] for name in rows], allow_unused=True)
        for row, gradient in zip(rows.values(), found, strict=True):
            row.append(gradient)
    return rows


def _as(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A copy of a tensor, its numbers in another precision."""
    converted = value.detach().to(dtype if dtype is not None and value.is_floating_point() else value.dtype, copy=True)
    return converted.requires_grad_(value.requires_grad)


def _is_same(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    first, second = first.to_dense(), second.to_dense()
    return torch.allclose(first, second, rtol=1e-5, atol=1e-8, equal_nan=True)


def _alike(stacked: Tensor | None, rows: Sequence[Tensor | None], tolerance: float, whole: float) -> bool:
    """Whether the gradients of stacked models are those of single ones, or not to be compared as they are infinite.

    What is zero but for rounding, as of a bias before a batch normalisation, counts beside the whole gradient.
    """
    if stacked is None or rows[0] is None:
        return stacked is rows[0]
    plain = torch.stack([torch.zeros_like(stacked[0]) if row is None else row for row in rows])
    if not plain.isfinite().all():
        return True
    return float((stacked - plain).norm()) <= tolerance * (float(plain.norm()) + 1e-3 * whole)


def _and_buffers(model: nn.Module, _: Any, outputs: Any) -> tuple[Any, dict[str, Tensor]]:
    """A hook that returns the buffers too: those that a pass puts others in the place of would be lost after it."""
    return outputs, dict(model.named_buffers())
