"""Whether an optimizer's state that names no parameters is in the model's order, where shapes alone don't tell."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from itertools import combinations

import torch
from torch import Tensor, nn

from source_proj._errors import MismatchError
from source_proj.task import Batch, Task
from source_proj.task.base import derivatives_of
from source_proj.trajectory.checkpoint import Checkpoint
from source_proj.trajectory.optimizers import PreconditionedOptimizer, moments, names_parameters
from source_proj.trajectory.stages import Stage

__all__ = ["check_state_order", "unnamed_alike"]

_SAMPLED = 4096  # coordinates of a parameter that are looked at
_FLOOR = 1e-6  # of the mean: squares below are as good as zero, and their logarithm would count for too much
_FEWEST = 8  # coordinates to judge by
_ERRORS = 3  # standard errors; in 80 random models the right order was off by 1.4 at most
_SWAPPED = (
    -0.3
)  # largest slope of a swapped pair, -1 in the ideal: coordinates of one layer are not independent, so that
# errors are larger than they seem, and of many pairs some fall below 0 in the right order too
_SAME = math.log(1.1)  # second moments that differ by less give the same steps, whichever is whose


def unnamed_alike(stage: Stage, model: nn.Module) -> tuple[Checkpoint, list[dict[str, Tensor]]] | None:
    """Second moments that are told apart by the order of the state alone: of parameters of one shape, without names.

    Args:
        stage: the last checkpoint that has a state counts.
        model: the model that was trained.

    Returns:
        The checkpoint, and v̂ by parameter name for each shape that several have; None where there is nothing to ask.
    """
    optimizer = stage.optimizer
    with_state = [checkpoint for checkpoint in stage.checkpoints if checkpoint.optimizer_state is not None]
    if not isinstance(optimizer, PreconditionedOptimizer) or stage.preconditioner == "none" or not with_state:
        return None
    if names_parameters(with_state[-1]):
        return None
    alike: defaultdict[tuple[int, ...], dict[str, Tensor]] = defaultdict(dict)
    for name, own in moments(with_state[-1], optimizer, model):
        alike[tuple(own.second.shape)][name] = own.second.flatten()
    several = [members for members in alike.values() if len(members) > 1]
    return (with_state[-1], several) if several else None


def check_state_order(
    checkpoint: Checkpoint, alike: Iterable[dict[str, Tensor]], model: nn.Module, task: Task, batches: Iterable[Batch]
) -> None:
    r"""Compare second moments with squared gradients, between parameters of one shape.

    With :math:`d = \log v_a - \log v_b` as the state has them, and x the same of the squared gradients of some batches,
    the regression :math:`\sum d x / \sum d^2` is about 1 in the right order, and about -1 where a and b are swapped.
    All parameters of two modules are taken together.

    Args:
        checkpoint: whose state it is.
        alike: v̂ by parameter name, of each shape; see :func:`unnamed_alike`.
        model: the model, with this checkpoint's weights.
        task: what it was trained on.
        batches: some small batches of the training set.

    Raises:
        MismatchError: the other order fits clearly better; names two modules and the remedy.
    """
    squares = _squared_gradients(model, task, batches)
    pairs: defaultdict[tuple[str, str], list[Tensor]] = defaultdict(list)
    for members in alike:
        for first, other in combinations(members, 2):
            second = _logarithms([members[first], members[other]])
            seen = _logarithms([squares[first], squares[other]])
            pairs[_modules(first, other)].append(torch.stack([second[0] - second[1], seen[0] - seen[1]]))
    for (first, other), differences in pairs.items():
        slope, error = _regression(*torch.cat(differences, dim=1))
        if slope < min(_SWAPPED, -_ERRORS * error):
            raise MismatchError(
                f"{checkpoint!r}: the second moments of {first!r} and {other!r}, which have the same shapes, fit the "
                f"gradients of the training set the other way round (agreement {slope:.2g}, where 1 is right and -1 "
                "swapped): the optimizer holds its parameters in another order than the model. Save the state of an "
                "optimizer made from model.named_parameters(), which names them, or record the run by a Recorder; or "
                "give the task and the training set that it was trained on, if these are others"
            )


def _modules(first: str, other: str) -> tuple[str, str]:
    """The modules of two parameters that have one name in both; else the parameters themselves."""
    (owner, _, leaf), (other_owner, _, other_leaf) = first.rpartition("."), other.rpartition(".")
    return (owner, other_owner) if leaf == other_leaf else (first, other)


def _regression(d: Tensor, x: Tensor) -> tuple[float, float]:
    """Slope of x by d, and its standard error; slope 0 where there is too little to tell, or nothing to be told."""
    scale, count = float(d.square().sum()), len(d)
    if count < _FEWEST or scale <= _SAME**2 * count:
        return 0.0, 0.0
    slope = float(d @ x) / scale
    return slope, math.sqrt(float((x - slope * d).square().sum()) / (count - 1) / scale)


def _squared_gradients(model: nn.Module, task: Task, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Mean over batches of the squared gradient of the loss, by parameter name, (n,) each."""
    parameters = dict(model.named_parameters())
    flags = {name: p.requires_grad for name, p in parameters.items()}
    total = {name: torch.zeros(p.numel(), dtype=torch.float64, device="cpu") for name, p in parameters.items()}
    model.requires_grad_(True)
    for batch in batches:
        with torch.enable_grad():
            output = task.output(model, batch)
            slope, _ = derivatives_of(task, output.detach(), batch)
            gradients = torch.autograd.grad((slope * output).sum(), list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient.detach().flatten().double().cpu().square()
    for name, parameter in parameters.items():
        parameter.requires_grad_(flags[name])
    return total


def _logarithms(squares: list[Tensor]) -> Tensor:
    """Logarithms of some coordinates of parameters of one shape, (k, n)."""
    stride = -(-squares[0].numel() // _SAMPLED)
    sampled = torch.stack([square[::stride] for square in squares])
    return sampled.clamp(min=max(_FLOOR * float(sampled.mean()), torch.finfo(torch.float64).tiny)).log()
