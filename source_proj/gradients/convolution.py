"""Per-example weight gradients of convolutions, by the cheaper of two ways."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from source_proj.gradients.pieces import Pieces

__all__ = ["apply"]

# Output positions up to which a weight gradient is handed to the sketch as an outer product of im2col columns: few
# positions make a gradient that is long for its work, and the sketch's fused kernel never writes it to memory.
_FEW_POSITIONS = 32


def apply(module: _ConvNd, names: Mapping[str, str], x: Tensor, g: Tensor, pieces: Pieces) -> None:
    """∂/∂W[o, c, k] = Σ_l g[o, l] x[c, l·stride + k·dilation] and ∂/∂b[o] = Σ_l g[o, l]; x (B, C, …), g (B, O, …)."""
    if "bias" in names:
        pieces.add(names["bias"], g.flatten(2).sum(2))
    if "weight" not in names:
        return
    x = _padded(module, x)
    if module.groups == 1 and prod(g.shape[2:]) <= _FEW_POSITIONS:
        pieces.outer(names["weight"], g.flatten(2).transpose(1, 2), _columns(module, x, g))
        return
    for example in range(x.shape[0]):
        pieces.add(
            names["weight"], _weight_gradient(module, x[example : example + 1], g[example : example + 1]), example
        )


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
    """im2col of a padded x: (B, C, …) → (B, L, C · kernel positions)."""
    x = x.contiguous()
    steps = x.stride()[2:]
    sizes = (*x.shape[:2], *module.kernel_size, *g.shape[2:])
    strides = (
        *x.stride()[:2],
        *(step * d for step, d in zip(steps, module.dilation, strict=True)),
        *(step * s for step, s in zip(steps, module.stride, strict=True)),
    )
    windows = x.as_strided(sizes, strides)  # (B, C, kernel…, output…)
    return windows.reshape(x.shape[0], x.shape[1] * prod(module.kernel_size), -1).transpose(1, 2)


def _weight_gradient(module: _ConvNd, x: Tensor, g: Tensor) -> Tensor:
    """The batch weight gradient of a padded x, here of a batch of one: (1, *weight.shape)."""
    dims = len(module.kernel_size)
    gradient: Tensor
    _, gradient, _ = torch.ops.aten.convolution_backward(
        g,
        x,
        module.weight.detach().to(g.dtype),
        None,
        list(module.stride),
        [0] * dims,
        list(module.dilation),
        False,
        [0] * dims,
        module.groups,
        [False, True, False],
    )
    return gradient.unsqueeze(0)
