"""Per-example weight gradients of convolutions, by the cheaper of two ways.

* columns: im2col of some examples, handed to the sketch as an outer product over the L output positions. With the
  sketch's native kernel no gradient is ever written to memory: measured (one Zen 5 core) 0.08 + 0.011 L ns per
  coordinate, plus 1.3 to 4.5 ns for each number of the columns, which are L/O times as many as the coordinates.
* groups: torch's own weight gradient (oneDNN's on a CPU) of one grouped convolution, in which each example is a group
  of its own: 0.65 + 0.01 L ns per coordinate for computing, writing, reordering and reading it back.

So the columns win for few positions, and where they are no more than a transposed input; both rise alike with L, and
for many positions the columns themselves decide. Measured for a ResNet-9, 32 examples, ms by columns and by groups: 512
to 512 channels on 4×4 positions 21, 49; 256 to 512 on 8×8 38, 60; 128 to 256 on 16×16 80, 29; 64 to 128 on 32×32 107,
25.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from source_proj.gradients.pieces import Pieces

__all__ = ["apply"]

_FEW_POSITIONS = 64
_COLUMNS_BYTES = 24 * 2**20  # larger allocations come as untouched pages, which cost more than filling them
_GROUPS_BYTES = (
    12 * 2**20
)  # input, output and weight gradients of one grouped convolution; beyond, they leave the caches
_LANES = 16  # examples that the sketch's native kernel takes at once


def apply(module: _ConvNd, names: Mapping[str, str], x: Tensor, g: Tensor, pieces: Pieces) -> None:
    """∂/∂W[o, c, k] = Σ_l g[o, l] x[c, l·stride + k·dilation] and ∂/∂b[o] = Σ_l g[o, l]; x (B, C, …), g (B, O, …)."""
    if "bias" in names:
        pieces.add(names["bias"], g.flatten(2).sum(2))
    if "weight" not in names:
        return
    if _columns_are_cheaper(module, g):
        _by_columns(module, names["weight"], x, g, pieces)
    else:
        _by_groups(module, names["weight"], x, g, pieces)


def _columns_are_cheaper(module: _ConvNd, g: Tensor) -> bool:
    if module.groups > 1:
        return False
    return g.device.type != "cpu" or prod(module.kernel_size) == 1 or prod(g.shape[2:]) <= _FEW_POSITIONS


def _by_columns(module: _ConvNd, name: str, x: Tensor, g: Tensor, pieces: Pieces) -> None:
    left = g.flatten(2).transpose(1, 2)  # (B, L, O)
    numbers = left.shape[1] * x.shape[1] * prod(module.kernel_size)
    step = max(1, _COLUMNS_BYTES // (4 * numbers * _LANES)) * _LANES
    for start in range(0, len(x), step):
        some = slice(start, start + step)
        pieces.outer(name, left[some], _columns(module, _padded(module, x[some]), g), start)


def _by_groups(module: _ConvNd, name: str, x: Tensor, g: Tensor, pieces: Pieces) -> None:
    amounts = _padding(module)
    if module.padding_mode != "zeros" or amounts[::2] != amounts[1::2]:
        x, amounts = _padded(module, x), [0] * len(amounts)
    sides = amounts[::-2]  # first dimension first
    nothing = [0] * len(sides)
    shape = module.weight.shape
    calls = -(-4 * len(x) * (x[0].numel() + g[0].numel() + module.weight.numel()) // _GROUPS_BYTES)
    step = max(1, -(-len(x) // calls))
    for start in range(0, len(x), step):
        some = slice(start, start + step)
        count = len(g[some])
        weight = g.new_empty(count * shape[0], *shape[1:])  # only its shape is looked at
        _, gradient, _ = torch.ops.aten.convolution_backward(
            *(g[some].reshape(1, -1, *g.shape[2:]), x[some].reshape(1, -1, *x.shape[2:]), weight, None),
            *(list(module.stride), sides, list(module.dilation), False, nothing, count * module.groups),
            [False, True, False],
        )
        pieces.add(name, gradient.view(count, *shape), start)


def _padded(module: _ConvNd, x: Tensor) -> Tensor:
    """Input x with the module's padding written out."""
    amounts = _padding(module)
    if not any(amounts):
        return x
    return F.pad(x, amounts) if module.padding_mode == "zeros" else F.pad(x, amounts, mode=module.padding_mode)


def _padding(module: _ConvNd) -> list[int]:
    """Amounts before and after, last dimension first, as `F.pad` wants them."""
    amounts: list[int] = []
    for dim in reversed(range(len(module.kernel_size))):
        if module.padding == "valid":
            before = after = 0
        elif module.padding == "same":
            total = module.dilation[dim] * (module.kernel_size[dim] - 1)
            before, after = total // 2, total - total // 2
        else:
            before = after = int(module.padding[dim])
        amounts += [before, after]
    return amounts


def _columns(module: _ConvNd, x: Tensor, g: Tensor) -> Tensor:
    """im2col of a padded x: (B, C, …) → (B, L, C · kernel positions), the layout of a flattened weight row."""
    x = x.contiguous()
    batch, channels, *strides = x.stride()
    windows = x.as_strided(
        (*x.shape[:2], *module.kernel_size, *g.shape[2:]),
        (
            *(batch, channels),
            *(stride * d for stride, d in zip(strides, module.dilation, strict=True)),
            *(stride * s for stride, s in zip(strides, module.stride, strict=True)),
        ),
    )  # (B, C, kernel…, output…)
    return windows.reshape(len(x), x.shape[1] * prod(module.kernel_size), -1).transpose(1, 2)
