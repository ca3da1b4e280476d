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

_SIZES = (1.0, 1e4, 1e-2)
"""Of the gradients that an optimizer is tried on: one that clips does so at one of them."""

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
    optimizer, templates = _made_for(make, model)
    return _moved(optimizer, templates, stacked)


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


def _made_for(make: MakeOptimizer, model: Sequence[Tensor]) -> tuple[torch.optim.Optimizer, list[Tensor]]:
    """An optimizer, and the copies of one model's parameters that it was made of."""
    templates = _parameters(model, model)
    optimizer = made(make, templates)
    rates = sorted({float(group["lr"]) for group in optimizer.param_groups if "lr" in group})
    if len(rates) > 1:
        raise ValueError(
            f"the groups of the {type(optimizer).__name__} have learning rates {rates}, and lr= sets one for all of "
            "them: give no others"
        )
    return optimizer, templates


def _moved(
    optimizer: torch.optim.Optimizer, templates: Sequence[Tensor], stacked: Sequence[Tensor]
) -> torch.optim.Optimizer:
    """Give an optimizer the stacked parameters in the place of one model's, and their states too."""
    place = {id(p): i for i, p in enumerate(templates)}
    for group in optimizer.param_groups:
        group["params"] = [stacked[place[id(p)]] for p in group["params"]]
    for template, own in zip(templates, stacked, strict=True):
        state = optimizer.state.pop(template, None)
        if state is not None:  # made with the optimizer, as Adagrad's is
            optimizer.state[own] = {key: _stack(key, value, template, len(own)) for key, value in state.items()}
    return optimizer


def _stack(key: str, value: Any, template: Tensor, count: int) -> Any:
    if key in COUNTERS or not isinstance(value, Tensor) or value.shape != template.shape:
        return value
    return value.expand(count, *value.shape).clone()


def _require_each_number_alone(make: MakeOptimizer, model: Sequence[Tensor]) -> None:
    """Take some steps with two models, each by itself and stacked, and compare.

    What an optimizer does is tried rather than looked up by its class: clipping may hide in a step of any.

    Raises:
        ValueError: the steps differ, or cannot be taken.
    """
    generator = torch.Generator().manual_seed(0)
    optimizer, templates = _made_for(make, model)
    name = type(optimizer).__name__
    starts = [torch.stack([p.detach(), 2 * p.detach() + 0.1 * _drawn(p, generator)]) for p in model]
    gradients = [
        [size * torch.stack([_drawn(p, generator), 3 * _drawn(p, generator)]) for p in model] for size in _SIZES
    ]
    try:
        alone = []
        for m in range(2):
            own, parameters = _made_for(make, _parameters([start[m] for start in starts], model))
            alone.append(_stepped(own, parameters, [[g[m] for g in step] for step in gradients]))
        stacks = _parameters(starts, model)
        together = _stepped(_moved(optimizer, templates, stacks), stacks, gradients)
    except (TypeError, ValueError, RuntimeError, AssertionError, IndexError) as error:
        raise ValueError(f"{name} cannot take the steps of stacked models ({error}): {_REMEDY}") from error
    for start, end, *ends in zip(starts, together, *alone, strict=True):
        apart = torch.stack(ends)
        if not torch.allclose(end, apart, rtol=1e-5, atol=float(_TOLERANCE * (apart - start).abs().max())):
            raise ValueError(f"{name} does not act on each number alone: {_REMEDY}")


def _stepped(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Sequence[Tensor]]
) -> list[Tensor]:
    for group in optimizer.param_groups:
        group["lr"] = _RATE
    for step in gradients:
        for p, gradient in zip(parameters, step, strict=True):
            p.grad = gradient.clone() if p.requires_grad else None
        optimizer.step()
    return [p.detach() for p in parameters]


def _parameters(values: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    return [
        nn.Parameter(value.detach().clone(), requires_grad=p.requires_grad)
        for value, p in zip(values, like, strict=True)
    ]


def _drawn(p: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(p.shape, generator=generator, dtype=torch.float32, device="cpu").to(p)
