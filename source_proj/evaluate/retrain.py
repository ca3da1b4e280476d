"""Train many copies of a small model at once: the retraining oracle's engine.

A counterfactual ("what if these examples had been left out?") is answered by retraining, hundreds of
times. Small networks leave a machine idle when trained one by one, so the copies are stacked along a
leading axis and advance in lock-step, one tensor program for all of them.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from tqdm import tqdm

__all__ = ["half_subsets", "retrain", "stacked_outputs"]

StackedState = dict[str, Tensor]
"""Parameters (and buffers) of M models: every tensor has a leading axis of length M."""


def half_subsets(n: int, count: int, *, fraction: float = 0.5, seed: int = 0) -> np.ndarray:
    """Draw random subsets of ``range(n)``, all of the same size.

    Args:
        n: number of training examples.
        count: number of subsets.
        fraction: share of the examples in each subset, in (0, 1).
        seed: seed of the draw.

    Returns:
        Boolean array ``(count, n)``; True marks an example that is kept.

    Example:
        >>> half_subsets(10, 3).sum(axis=1)
        array([5, 5, 5])
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie strictly between 0 and 1, got {fraction}")
    size = round(n * fraction)
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, n), dtype=bool)
    for row in masks:
        row[rng.permutation(n)[:size]] = True
    return masks


def retrain(
    make_model: Callable[[], nn.Module],
    inputs: Tensor,
    targets: Tensor,
    subsets: Sequence[np.ndarray],
    seeds: Sequence[int],
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    group: int = 8,
    evaluate: Callable[[StackedState], Tensor],
    progress: bool = True,
) -> Tensor:
    """Train one model per (subset, seed) pair with SGD and evaluate each.

    Every model sees only its own subset, in its own shuffled order, from its own initialisation; the
    loss is the mean over a batch of its subset. The last, short batch of an epoch is used.

    Args:
        make_model: builds a freshly initialised model; called under ``torch.manual_seed(seed)``.
        inputs: training inputs, shape ``(N, ...)``.
        targets: training targets, shape ``(N, ...)``.
        subsets: M index arrays of equal length, the examples each model is trained on.
        seeds: M seeds, one a model, for initialisation and batch order.
        epochs: passes over the subset.
        batch_size: examples in a batch.
        lr: constant learning rate.
        momentum: heavy-ball momentum, as in :class:`torch.optim.SGD`.
        weight_decay: coupled L2 coefficient, as in :class:`torch.optim.SGD`.
        loss: mean loss of ``(outputs, targets)``.
        group: models trained at once; a group's weights should fit the processor's cache.
        evaluate: maps the stacked state of a group to a tensor ``(models in group, ...)``.
        progress: show a progress bar after two seconds.

    Returns:
        The evaluations of all models, stacked: shape ``(M, ...)``.

    Raises:
        ValueError: if the subsets differ in length or do not match the seeds in number.
    """
    sizes = {len(subset) for subset in subsets}
    if len(sizes) != 1:
        raise ValueError(f"all subsets must have one length to train in lock-step, got lengths {sorted(sizes)}")
    if len(subsets) != len(seeds):
        raise ValueError(f"got {len(subsets)} subsets but {len(seeds)} seeds; give one seed a subset")
    results = []
    starts = range(0, len(subsets), group)
    for start in tqdm(starts, "retrain", unit="group", delay=2, disable=not progress):
        chosen = slice(start, start + group)
        state = _train_group(
            make_model, inputs, targets, subsets[chosen], seeds[chosen],
            epochs, batch_size, lr, momentum, weight_decay, loss,
        )  # fmt: skip
        results.append(evaluate(state))
    return torch.cat(results)


def stacked_outputs(make_model: Callable[[], nn.Module], inputs: Tensor) -> Callable[[StackedState], Tensor]:
    """Build an ``evaluate`` for :func:`retrain`: the outputs ``(models, N, ...)`` of every model on ``inputs``."""
    skeleton = make_model().eval()

    def evaluate(state: StackedState) -> Tensor:
        with torch.no_grad():
            return vmap(lambda one: functional_call(skeleton, one, (inputs,)))(state)

    return evaluate


def _train_group(
    make_model: Callable[[], nn.Module],
    inputs: Tensor,
    targets: Tensor,
    subsets: Sequence[np.ndarray],
    seeds: Sequence[int],
    epochs: int,
    batch_size: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> StackedState:
    models, generators = [], []
    for seed in seeds:
        torch.manual_seed(seed)
        models.append(make_model().to(inputs.device).train())
        generators.append(torch.Generator().manual_seed(seed))
    parameters, buffers = stack_module_state(models)
    velocity = {name: torch.zeros_like(value) for name, value in parameters.items()}
    skeleton, indices = models[0], torch.from_numpy(np.stack(subsets))

    def model_loss(one: StackedState, static: StackedState, x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(skeleton, {**one, **static}, (x,)), y)

    def step(batch: Tensor) -> None:  # batch: (m, b) indices of examples
        total = vmap(model_loss)(parameters, buffers, inputs[batch], targets[batch]).sum()
        gradients = torch.autograd.grad(total, list(parameters.values()))
        with torch.no_grad():
            for (name, value), gradient in zip(parameters.items(), gradients, strict=True):
                velocity[name].mul_(momentum).add_(gradient).add_(value, alpha=weight_decay)
                value.sub_(velocity[name], alpha=lr)

    for _ in range(epochs):
        order = torch.stack([torch.randperm(indices.shape[1], generator=g) for g in generators])
        shuffled = torch.gather(indices, 1, order)
        for first in range(0, shuffled.shape[1], batch_size):
            step(shuffled[:, first : first + batch_size])
    return {name: value.detach() for name, value in {**parameters, **buffers}.items()}
