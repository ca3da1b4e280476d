"""torch's `MultiheadAttention`, whose projections are no modules."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from source_proj.gradients.opened.opening import Opening, Part
from source_proj.gradients.suited import Unsuited

__all__ = ["forward", "serves"]


def serves(module: nn.Module) -> bool:
    """Whether this is torch's own attention, without what few use: learned keys, and a key of zeros."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and type(module).forward is nn.MultiheadAttention.forward
        and module.bias_k is None
        and module.bias_v is None
        and not module.add_zero_attn
        and type(module.out_proj).forward is nn.Linear.forward
        and not any(hasattr(each, "parametrizations") for each in (module, module.out_proj))
    )


def forward(
    module: nn.MultiheadAttention,
    opening: Opening,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As `MultiheadAttention.forward`, for batches."""
    if query.dim() != 3 or query.is_nested:
        raise Unsuited(f"attention of an input of {query.dim()} dims, which has no batch")
    q, k, v = (
        part.unflatten(-1, (module.num_heads, module.head_dim)).transpose(1, 2)
        for part in _projected(module, opening, query, key, value)
    )
    # torch's own order: the hint replaces the mask where nothing else masks.
    causal = is_causal and key_padding_mask is None and not need_weights
    mask = None if causal else _merged(attn_mask, key_padding_mask, q)
    weights, dropout = None, module.dropout if module.training else 0.0
    if need_weights:
        scores = q * module.head_dim**-0.5 @ k.transpose(-2, -1)
        attention = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
        mixed, weights = attention @ v, attention.mean(1) if average_attn_weights else attention
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
    last, width = module.out_proj, module.embed_dim
    parts = Part("out_proj.weight", 0, width), Part("out_proj.bias", 0, width)
    output = opening.laid_out(opening.linear(mixed.transpose(1, 2).flatten(2), last.weight, last.bias, parts))
    return output if module.batch_first else output.transpose(0, 1), weights


def _projected(
    module: nn.MultiheadAttention, opening: Opening, query: Tensor, key: Tensor, value: Tensor
) -> Iterator[Tensor]:
    """Queries, keys and values (B, T, E), examples in front; what has the same input is one product."""
    width, bias, packed = module.embed_dim, module.in_proj_bias, module._qkv_same_embed_dim
    inputs = [query, key, value]
    starts = [part for part in range(3) if part == 0 or not packed or inputs[part] is not inputs[part - 1]]
    for first, end in pairwise([*starts, 3]):
        rows = slice(first * width, end * width)
        x = inputs[first] if module.batch_first else inputs[first].transpose(0, 1)
        name = "in_proj_weight" if packed else f"{'qkv'[first]}_proj_weight"
        weight = getattr(module, name)
        of_weight = Part(name, rows.start, 3 * width) if packed else Part(name, 0, width)
        made = opening.linear(
            x, weight[rows] if packed else weight, None if bias is None else bias[rows],
            (of_weight, Part("in_proj_bias", rows.start, 3 * width)),
        )  # fmt: skip
        yield from made.split(width, -1)


def _merged(attn_mask: Tensor | None, key_padding_mask: Tensor | None, like: Tensor) -> Tensor | None:
    """What is added to the scores (B, H, T, S)."""
    masks = []
    if attn_mask is not None:
        added = _additive(attn_mask, like)
        masks.append(added.unflatten(0, (-1, like.shape[1])) if added.dim() == 3 else added)
    if key_padding_mask is not None:
        masks.append(_additive(key_padding_mask, like)[:, None, None, :])
    return sum(masks[1:], masks[0]) if masks else None


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
