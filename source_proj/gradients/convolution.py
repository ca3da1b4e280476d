"""Per-example weight gradients of convolutions, by the cheaper of two ways.

* windows: the padded input and the output's gradient go to the sketch as they are. Its native kernel sums over the
  windows in registers and writes neither columns nor gradients to memory; measured (one Zen 5 core, sixteen examples at
  a time) 0.08 + 0.01 L ns per coordinate and example for L output positions. Elsewhere the sketch makes im2col columns:
  1.3 to 4.5 ns for each of their numbers, L/O for each coordinate.
* groups: torch's own weight gradient (oneDNN's on a CPU) of one grouped convolution, in which each example is a group
  of its own: 0.65 + 0.01 L ns per coordinate for computing, writing, reordering and reading it back.

Measured for the layers of a ResNet-9, 32 examples, in ms by windows, columns and groups: 512 to 512 channels on 4×4
positions 17, 21, 49; 256 to 512 on 8×8 22, 38, 60; 128 to 256 on 16×16 23, 80, 29; 64 to 128 on 32×32 24, 107, 25.
So the windows win wherever the native kernel serves; columns only for few positions, or for kernels of one position,
whose columns are the input. Grouped convolutions go by groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from source_proj.gradients.sink import GradientSink

__all__ = ["apply", "apply_transposed", "as_multiplied"]

_FEW_POSITIONS = 64  # up to here columns cost less than groups
_GROUPS_BYTES = (
    12 * 2**20
)  # input, output and weight gradients of one grouped convolution: beyond, they leave the caches


def apply(module: _ConvNd, names: Mapping[str, str], x: Tensor, g: Tensor, sink: GradientSink) -> None:
    """∂/∂W[o, c, k] = Σ_l g[o, l] x[c, l·stride + k·dilation] and ∂/∂b[o] = Σ_l g[o, l]; x (B, C, …), g (B, O, …)."""
    if "bias" in names:
        sink.add(names["bias"], g.flatten(2).sum(2, dtype=torch.float32))
    if "weight" in names:
        _add_weight(module, names["weight"], x, g, sink)


def apply_transposed(module: _ConvNd, names: Mapping[str, str], x: Tensor, g: Tensor, sink: GradientSink) -> None:
    """A convolution from output to input, backwards: for its weight (C, O, …), x and g change places."""
    if "bias" in names:
        sink.add(names["bias"], g.flatten(2).sum(2, dtype=torch.float32))
    if "weight" in names:
        _add_weight(module, names["weight"], g, as_multiplied(x, g), sink)


def _add_weight(module: _ConvNd, name: str, x: Tensor, g: Tensor, sink: GradientSink) -> None:
    if _windows_are_cheaper(module, g, sink):
        _by_windows(module, name, as_multiplied(x, g), g, sink)
    else:
        _by_groups(module, name, x.float(), g.float(), sink)


def as_multiplied(x: Tensor, g: Tensor) -> Tensor:
    """A layer's input in its output's half precision, as autocast rounded it within the layer; else as it is."""
    return x.to(g.dtype) if g.dtype in (torch.float16, torch.bfloat16) else x


def _windows_are_cheaper(module: _ConvNd, g: Tensor, sink: GradientSink) -> bool:
    if module.groups > 1:
        return False
    few = prod(module.kernel_size) == 1 or prod(g.shape[2:]) <= _FEW_POSITIONS
    return sink.fuses_windows or few or g.device.type != "cpu"  # elsewhere grouped convolutions are slow


def _by_windows(module: _ConvNd, name: str, x: Tensor, g: Tensor, sink: GradientSink) -> None:
    x = _padded(module, x)
    sizes = x.shape[2:]
    taps = _offsets(module.kernel_size, module.dilation, sizes)
    windows = _offsets(g.shape[2:], module.stride, sizes)
    sink.windows(name, g.flatten(2), x.flatten(2), taps, windows)


def _offsets(counts: Sequence[int], steps: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Offsets into a flattened grid of these sizes: counts[d] positions, steps[d] apart, along each dimension d.

    In main memory whatever the device: there they are checked without waiting for a GPU.
    """
    offset = torch.zeros(1, dtype=torch.int32, device="cpu")
    along = [torch.arange(n, dtype=torch.int32, device="cpu") * step for n, step in zip(counts, steps, strict=True)]
    return reduce(lambda sofar, d: (sofar.unsqueeze(1) * sizes[d] + along[d]).flatten(), range(len(sizes)), offset)


def _by_groups(module: _ConvNd, name: str, x: Tensor, g: Tensor, sink: GradientSink) -> None:
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
        sink.add(name, gradient.view(count, *shape), start)


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
