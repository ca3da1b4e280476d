"""Attention and recurrent layers of torch's, in the ways that models call them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

STEPS, WIDTH = 5, 6


class Attending(nn.Module):
    """A layer before, attention, a layer behind; the attention's weights count, too, where they are asked for."""

    def __init__(self, call: Callable[..., Any], **options: Any) -> None:
        super().__init__()
        self.before, self.behind = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.layer = nn.MultiheadAttention(WIDTH, 2, **options)
        self.call = call

    def forward(self, x: Tensor, other: Tensor, lengths: Tensor) -> Tensor:
        flipped = not self.layer.batch_first
        x, other = self.before(x), other.clone()
        padded = torch.arange(other.shape[1]) >= lengths[:, None]
        given = (x.transpose(0, 1), other.transpose(0, 1)) if flipped else (x, other)
        output, weights = self.call(self.layer, *given, padded)
        output = self.behind(output.transpose(0, 1) if flipped else output)
        return output if weights is None else output + weights.square().flatten(2).sum(-1).view(len(x), -1, 1)


CAUSAL = torch.full((STEPS, STEPS), float("-inf")).triu(1)
BLOCKED = torch.rand(STEPS, STEPS + 2, generator=torch.Generator().manual_seed(0)) > 0.6
HEADS = torch.randn(2, STEPS, STEPS, generator=torch.Generator().manual_seed(1))
CALLS: dict[str, Callable[..., Any]] = {
    "self": lambda layer, x, _, __: layer(x, x, x, need_weights=False),
    "self, with weights": lambda layer, x, _, __: layer(x, x, x),
    "weights of heads": lambda layer, x, _, __: (layer(x, x, x, average_attn_weights=False)[0], None),
    "causal by hint": lambda layer, x, _, __: layer(x, x, x, attn_mask=CAUSAL, is_causal=True, need_weights=False),
    "causal by mask": lambda layer, x, _, __: layer(x, x, x, attn_mask=CAUSAL, need_weights=False),
    "causal hint with weights": lambda layer, x, _, __: layer(x, x, x, attn_mask=CAUSAL, is_causal=True),
    "across": lambda layer, x, other, _: layer(x, other, other, need_weights=False),
    "across, keys apart": lambda layer, x, other, _: layer(x, other, other + 1, need_weights=False),
    "values like queries": lambda layer, x, _, __: layer(x, x + 1, x, need_weights=False),
    "padded": lambda layer, x, other, padded: layer(x, other, other, key_padding_mask=padded, need_weights=False),
    "padded, with weights": lambda layer, x, other, padded: layer(x, other, other, padded),
    "mask of bools": lambda layer, x, other, _: layer(x, other, other, attn_mask=BLOCKED & ~BLOCKED[:, :1]),
    "mask of each head": lambda layer, x, _, __: layer(x, x, x, attn_mask=HEADS.repeat(_size(layer, x), 1, 1)),
}


def _size(layer: nn.MultiheadAttention, x: Tensor) -> int:
    return x.shape[0] if layer.batch_first else x.shape[1]


class Recurring(nn.Module):
    """A recurrent layer whose outputs and last states all count."""

    def __init__(self, kind: type[nn.RNNBase], packed: bool, started: bool, **options: Any) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, 3)
        self.layer = kind(3, 4, **options)
        ways = options["num_layers"] * (1 + options["bidirectional"])
        self.start = nn.Linear(WIDTH, 4 * ways) if started else None
        self.packed, self.ways = packed, ways

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        first = self.layer.batch_first
        given: Any = self.before(x) if first else self.before(x).transpose(0, 1)
        if self.packed:
            given = pack_padded_sequence(given, lengths, batch_first=first, enforce_sorted=False)
        hx: Any = None
        if self.start is not None:
            hx = self.start(x[:, 0]).view(len(x), self.ways, 4).transpose(0, 1).contiguous()
            hx = (hx, hx.tanh()) if isinstance(self.layer, nn.LSTM) else hx
        output, ends = self.layer(given, hx)
        if isinstance(output, PackedSequence):
            output = pad_packed_sequence(output, batch_first=first, total_length=STEPS)[0]
        output = output if first else output.transpose(0, 1)
        ends = ends if isinstance(ends, tuple) else (ends,)
        return torch.cat([output.flatten(1), *(end.transpose(0, 1).flatten(1) for end in ends)], dim=1)
