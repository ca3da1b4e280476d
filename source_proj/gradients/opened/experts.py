"""Experts of transformers: products with the weights (E, o, i) that a router picks for each token.

Its decorator `use_experts_implementation` gives every such module the same attributes, so that one forward pass serves
all, whichever of its implementations the model has been told to take.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from source_proj.gradients.opened.opening import Opening
from source_proj.gradients.suited import Unsuited

__all__ = ["forward", "serves"]

_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_is_expert_parallel")
# Of gradients of whole weights at a time; more would come as untouched pages on a CPU, which cost more than products.
_CHUNK_BYTES, _CHUNK_BYTES_OF_CPU = 256 * 2**20, 8 * 2**20
_IN_FULL = "grouped_mm"  # the implementation whose products autocast does not know


def serves(module: nn.Module) -> bool:
    """Whether this is such a module, all of whose experts are here and whose output goes through no norm."""
    flags = [vars(module).get(name) for name in _FLAGS]
    if not all(isinstance(flag, bool) for flag in flags):
        return False
    gated, biased, normalised, _, elsewhere = flags
    weights = {"gate_up_proj" if gated else "up_proj", "down_proj"}
    known = weights | ({f"{name}_bias" for name in weights} if biased else set())
    found = dict(module.named_parameters())
    return (
        not normalised
        and not elsewhere
        and found.keys() == known
        and all(p.dim() == (3 if name in weights else 2) and len(p) == module.num_experts for name, p in found.items())
    )


def forward(module: Any, opening: Opening, *args: Any, **kwargs: Any) -> Tensor:
    """As the module's forward: tokens (N, d), the experts of each and their weights (N, K) to (N, d)."""
    given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    if len(given) != 4:
        raise Unsuited(f"{type(module).__name__} was given {len(given) - 1} arguments; its experts take three")
    _, tokens, chosen, weights = given.values()
    if tokens.dim() != 2 or len(tokens) % opening.size:
        raise Unsuited(
            f"experts of tokens {tuple(tokens.shape)}, which are not {opening.size} examples of so many each"
        )
    count, several = chosen.shape
    chosen = chosen.reshape(-1)
    # Not sorted by expert, as the implementations have them: examples must stay in front for what follows.
    x = tokens.unsqueeze(1).expand(-1, several, -1).reshape(count * several, -1)
    up = _product(module, opening, x, chosen, "gate_up_proj" if module.has_gate else "up_proj")
    middle = module._apply_gate(up) if module.has_gate else module.act_fn(up)
    down = _product(module, opening, middle, chosen, "down_proj")
    together: Tensor = (down * weights.reshape(-1, 1)).view(count, several, -1).sum(1)
    return together.to(tokens.dtype)


def _product(module: Any, opening: Opening, x: Tensor, chosen: Tensor, name: str) -> Tensor:
    """Each row of x (S, i) times the weight of its expert, with a tap."""
    weight: Tensor = getattr(module, name)
    bias: Tensor | None = getattr(module, f"{name}_bias") if module.has_bias else None
    with _precision(module, x):
        output = _by_expert(
            x.to(weight.dtype), chosen, opening.value(weight), None if bias is None else opening.value(bias),
            transposed=module.is_transposed,
        )  # fmt: skip
    return opening.tap(output, x, partial(_receive, opening, chosen, name, weight, module.is_transposed))


def _precision(module: Any, x: Tensor) -> AbstractContextManager[Any]:
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    return torch.autocast(x.device.type, enabled=False) if implementation == _IN_FULL else nullcontext()


def _by_expert(x: Tensor, chosen: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool) -> Tensor:
    """Rows of numbers past the last expert, which stand for none, give zeros."""
    order = chosen.argsort(stable=True)
    counts = torch.bincount(chosen, minlength=len(weight))[: len(weight)].tolist()
    *parts, rest = x[order].split([*counts, len(x) - sum(counts)])
    matrices, biases = weight.unbind(), [None] * len(weight) if bias is None else bias.unbind()
    made = [
        F.linear(part, matrix.T if transposed else matrix, added)
        for part, matrix, added in zip(parts, matrices, biases, strict=True)
        if len(part)
    ]
    width = weight.shape[2 if transposed else 1]
    made.append((made[0] if made else x).new_zeros(len(rest), width))
    return torch.cat(made)[order.argsort()]


def _receive(
    opening: Opening, chosen: Tensor, name: str, weight: Tensor, transposed: bool, x: Tensor, g: Tensor
) -> None:
    """Hand over a weight's gradient and its bias's, from the inputs (S, i) and the gradients of outputs (S, o)."""
    sink, experts, size = opening.taker(), len(weight), opening.size
    chosen, each = chosen.to(g.device), len(g) // size
    x, g = x.to(g.device).float(), (g * (chosen < experts).unsqueeze(1)).float()
    chosen = chosen.clamp(max=experts - 1)  # rows of none, whose gradient is zero now
    if (full := opening.names.get(f"{name}_bias")) is not None:
        sums = g.new_zeros(size * experts, g.shape[1]).index_add_(0, _groups(chosen, size, experts), g)
        sink.add(full, sums.view(size, -1))
    if (full := opening.names.get(name)) is not None:
        chunk = _CHUNK_BYTES_OF_CPU if g.device.type == "cpu" else _CHUNK_BYTES
        step = max(1, chunk // (4 * weight.numel()))
        for start in range(0, size, step):
            rows, n = slice(start * each, (start + step) * each), min(step, size - start)
            left, right = (x, g) if transposed else (g, x)
            sink.add(full, _weights(left[rows], right[rows], chosen[rows], n, experts), start)


def _groups(chosen: Tensor, size: int, experts: int) -> Tensor:
    """Which example and expert each row belongs to."""
    examples = torch.arange(size, device=chosen.device).repeat_interleave(len(chosen) // size)
    return examples * experts + chosen


def _weights(left: Tensor, right: Tensor, chosen: Tensor, size: int, experts: int) -> Tensor:
    """Sums of left_s (x) right_s over each example's rows of each expert, (size, E o i)."""
    groups = _groups(chosen, size, experts)
    counts, order = torch.bincount(groups, minlength=size * experts), groups.argsort(stable=True)
    within = torch.empty_like(groups)  # the place of each row among those of its group
    within[order] = torch.arange(len(groups), device=groups.device) - (counts.cumsum(0) - counts)[groups[order]]
    lefts, rights = (
        each.new_zeros(size * experts, int(counts.max()), each.shape[1]).index_put_((groups, within), each)
        for each in (left, right)
    )
    return (lefts.transpose(1, 2) @ rights).view(size, -1)
