"""What stacked models are held to: one module stands for all, and one optimizer does to each what its own would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from source_proj.evaluate._stepper import COUNTERS, made
from source_proj.gradients.replaced import call_with

__all__ = ["MakeOptimizer", "lockstep_optimizer", "named_tensors", "require_one_function"]

MakeOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
"""Makes the optimizer of one model's parameters."""

_SIZES = (*(1.0, 1e-2) * 5, 1e4, 1e-2)
"""Of the gradients that an optimizer is tried on: one that clips does so at one of them, some after a warm-up, and
averages of weights are taken at every fifth or tenth step. The largest comes late: it would hide what came before."""

_COMPARED = (9, 11)  # steps after which weights are

_RATE = 0.1  # a rate of 0, with which a schedule may begin, would hide what a step does

_TOLERANCE = 1e-3  # of what a step changes; other mathematics changes another part of order 1

_REMEDY = (
    "stacked models would be trained otherwise than one by one; give an optimizer that acts on each number alone, such "
    "as SGD, Adam, AdamW or RMSprop without clipping, or train one by one (GroundTruth.fill)"
)


def lockstep_optimizer(
    make: MakeOptimizer, model: Sequence[Tensor], stacked: Sequence[Tensor]
) -> torch.optim.Optimizer:
    """The optimizer of M stacked models, as the M optimizers of each of them would be.

    It is made of one model's parameters: those who sort them by shape, such as biases that do not decay, see what they
    see in a loop of their own. Its groups and states are then those of the stacked ones.

    Args:
        make: makes an optimizer of a list of parameters.
        model: one model's parameters.
        stacked: the same of all models, ``(M, *shape)`` each.

    Raises:
        TypeError: what is given makes no optimizer.
        ValueError: the optimizer has other parameters, learning rates of its own for some groups, or does not act on
            each number alone.
    """
    _require_each_number_alone(make, model)
    return _of_stacks(make, model, stacked)


def require_one_function(
    models: Sequence[nn.Module], seeds: Sequence[int], x: Tensor, result: Callable[[Any], Tensor]
) -> None:
    """Try models with the weights of the first, at some inputs: stacked, they are one module with weights of each.

    Args:
        models: they may be left in another state.
        seeds: that they were made under.
        x: inputs.
        result: what is compared of their outputs.

    Raises:
        ValueError: they differ in more than their weights and buffers.
    """
    state = {name: value.detach().clone() for name, value in named_tensors(models[0])}
    results = []
    for model in models:
        torch.manual_seed(0)  # for dropout
        with torch.no_grad():
            results.append(result(call_with(model, {name: value.clone() for name, value in state.items()}, (x,))))
    for seed, own in zip(seeds, results, strict=True):
        if not torch.allclose(own, results[0], rtol=1e-4, atol=1e-6, equal_nan=True):
            raise ValueError(
                f"the models of the seeds {seeds[0]} and {seed} differ with the same weights, and stacked ones are one "
                "module with weights of each: what make_model draws must be parameters and buffers (register_buffer), "
                "or train one by one (GroundTruth.fill)"
            )


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers, by name."""
    return [*model.named_parameters(), *model.named_buffers()]


def _of_stacks(make: MakeOptimizer, model: Sequence[Tensor], stacked: Sequence[Tensor]) -> torch.optim.Optimizer:
    """The optimizer of one of the models, with the stacked parameters, and the states of all models', in the place.

    States that are made with an optimizer, as Adagrad's are, may hold the weights that each begins with.
    """
    every = [_made_for(make, _parameters([own[m] for own in stacked], model)) for m in range(len(stacked[0]))]
    optimizer, templates = every[0]
    place = {id(p): i for i, p in enumerate(templates)}
    for group in optimizer.param_groups:
        group["params"] = [stacked[place[id(p)]] for p in group["params"]]
    for own, *parts in zip(stacked, *(parameters for _, parameters in every), strict=True):
        states = [each.state.pop(part, None) for (each, _), part in zip(every, parts, strict=True)]
        if states[0] is not None:
            optimizer.state[own] = {key: _stacked(key, [state[key] for state in states], own) for key in states[0]}
    return optimizer


def _made_for(make: MakeOptimizer, templates: list[Tensor]) -> tuple[torch.optim.Optimizer, list[Tensor]]:
    """An optimizer of one model's parameters, and these."""
    optimizer = made(make, templates)
    rates = sorted({float(group["lr"]) for group in optimizer.param_groups if "lr" in group})
    if len(rates) > 1:
        raise ValueError(
            f"the groups of the {type(optimizer).__name__} have learning rates {rates}, and lr= sets one for all of "
            "them: give no others"
        )
    return optimizer, templates


def _stacked(key: str, values: Sequence[Any], own: Tensor) -> Any:
    if key in COUNTERS or not isinstance(values[0], Tensor) or values[0].shape != own.shape[1:]:
        return values[0]
    return torch.stack(list(values))


def _require_each_number_alone(make: MakeOptimizer, model: Sequence[Tensor]) -> None:
    """Take some steps with two models, each by itself and stacked, and compare.

    What an optimizer does is tried rather than looked up by its class: clipping may hide in a step of any, and what
    comes at every fifth or tenth step alone, as averages of weights.

    Raises:
        ValueError: the steps differ, or cannot be taken.
    """
    generator = torch.Generator().manual_seed(0)
    starts = [torch.stack([p.detach(), 2 * p.detach() + 0.1 * _drawn(p, generator)]) for p in model]
    each = [_made_for(make, _parameters([start[m] for start in starts], model)) for m in range(2)]
    name = type(each[0][0]).__name__
    try:
        alone = [_stepped(optimizer, own, model, slice(m, m + 1)) for m, (optimizer, own) in enumerate(each)]
        stacks = _parameters(starts, model)
        together = _stepped(_of_stacks(make, model, stacks), stacks, model, slice(0, 2))
    except (TypeError, ValueError, RuntimeError, AssertionError, IndexError) as error:
        raise ValueError(f"{name} cannot take the steps of stacked models ({error}): {_REMEDY}") from error
    for start, end, *ends in zip(starts * len(_COMPARED), together, *alone, strict=True):
        apart = torch.stack(ends)
        if not torch.allclose(end, apart, rtol=1e-5, atol=float(_TOLERANCE * (apart - start).abs().max())):
            raise ValueError(f"{name} does not act on each number alone: {_REMEDY}")


def _stepped(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], model: Sequence[Tensor], models: slice
) -> list[Tensor]:
    """Parameters after some steps, of some of two models."""
    for group in optimizer.param_groups:
        group["lr"] = _RATE
    found: list[Tensor] = []
    for step, size in enumerate(_SIZES):
        generator = torch.Generator().manual_seed(step)
        for p, like in zip(parameters, model, strict=True):
            first, second = _drawn(like, generator), 3 * _drawn(like, generator)
            both = size * torch.stack([first, second])
            p.grad = both[models].view(p.shape).clone() if p.requires_grad else None
        optimizer.step()
        found += [p.detach().clone() for p in parameters] if step in _COMPARED else []
    return found


def _parameters(values: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    return [
        nn.Parameter(value.detach().clone(), requires_grad=p.requires_grad)
        for value, p in zip(values, like, strict=True)
    ]


def _drawn(p: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(p.shape, generator=generator, dtype=torch.float32, device="cpu").to(p)
