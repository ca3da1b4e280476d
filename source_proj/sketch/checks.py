"""What the sketch asks of its operands, and what it says where they do not fit."""

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "check_index",
    "check_out",
    "check_range",
    "check_types",
    "check_windows",
    "checked_scale",
    "floating_tensor",
    "integer",
]


def integer(name: str, value: Any) -> int:
    """An integer of any type that is one; TypeError for all else, and for what is true or false."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; give an integer") from None


def check_types(out: Tensor, rows: Tensor, axes: int, name: str) -> None:
    """Refuse operands of the wrong type, number of axes or device."""
    if out.dtype != torch.float32:
        raise TypeError(f"out is {out.dtype}; sums are kept in torch.float32")
    if not rows.is_floating_point():
        raise TypeError(f"{name} is {rows.dtype}; give floating point numbers")
    if rows.ndim != axes:
        raise ValueError(f"{name} is {tuple(rows.shape)}; give {axes} axes")
    if out.device != rows.device:
        raise ValueError(f"out is on {out.device} and {name} is on {rows.device}; move them to one device")


def check_out(out: Tensor, dim: int) -> None:
    """Refuse a place to add to that is not (B, dim), or whose rows are not contiguous or overlap."""
    if out.ndim != 2 or out.shape[1] != dim:
        raise ValueError(f"out is {tuple(out.shape)}; give (B, {dim})")
    if out.numel() and ((out.stride(1) != 1 and dim > 1) or (out.stride(0) < dim and out.shape[0] > 1)):
        raise ValueError(f"out has strides {out.stride()}; give rows that are contiguous and do not overlap")


def check_index(values: Tensor, indices: Mapping[str, tuple[Tensor, int]]) -> None:
    """Refuse an index (M,) into so many rows that is not int64, has not an entry per value (M, n), or is outside."""
    for name, (index, _) in indices.items():
        if index.dtype != torch.int64:
            raise TypeError(f"{name} is {index.dtype}; give torch.int64")
        if index.shape != values.shape[:1] or index.device != values.device:
            raise ValueError(
                f"{name} is {tuple(index.shape)} on {index.device} for values {tuple(values.shape)} on "
                f"{values.device}; give one entry per row"
            )
    ends = torch.stack([end for index, _ in indices.values() for end in index.aminmax()]).tolist()  # waits once
    for number, (name, (_, count)) in enumerate(indices.items()):
        first, last = ends[2 * number : 2 * number + 2]
        if first < 0 or last >= count:
            raise ValueError(f"{name} runs from {first} to {last}; there are {count} rows")


def checked_scale(scale: Tensor | None, count: int, out: Tensor) -> Tensor | None:
    """A metric's diagonal of the right length, contiguous; None stays None."""
    if scale is None:
        return None
    if scale.dtype != torch.float32:
        raise TypeError(f"scale is {scale.dtype}; give torch.float32")
    if tuple(scale.shape) != (count,) or scale.device != out.device:
        raise ValueError(f"scale is {tuple(scale.shape)} on {scale.device}; give ({count},) on {out.device}")
    return scale.contiguous()


def check_windows(left: Tensor, right: Tensor, taps: Tensor, windows: Tensor) -> None:
    """Refuse windows that are no offsets into a channel."""
    for name, index in (("taps", taps), ("windows", windows)):
        if index.is_floating_point() or index.ndim != 1:
            raise TypeError(f"{name} is {tuple(index.shape)} of {index.dtype}; give a vector of integers")
    if len(windows) != left.shape[2]:
        raise ValueError(f"left {tuple(left.shape)} has {left.shape[2]} windows, but {len(windows)} offsets were given")
    if len(taps) and len(windows):
        first, last = int(taps.min() + windows.min()), int(taps.max() + windows.max())
        if first < 0 or last >= right.shape[2]:
            raise ValueError(f"windows reach from {first} to {last}; a channel of right has {right.shape[2]} entries")


def check_range(offset: int, count: int) -> None:
    """Refuse coordinates that are no integers, or that 63 bits cannot count."""
    offset = integer("offset", offset)
    if offset < 0 or offset + count >= 1 << 63:
        raise ValueError(f"coordinates {offset} to {offset + count} are outside of 0 to 2^63 - 1")


def floating_tensor(x: Tensor | NDArray[Any]) -> Tensor:
    """A tensor without a graph; arrays become float32."""
    if isinstance(x, Tensor):
        return x.detach()
    array = np.asarray(x)
    if array.dtype.kind != "f":
        raise TypeError(f"x is an array of {array.dtype}; give floating point numbers")
    return torch.from_numpy(np.require(array, np.float32, ["C", "W"]))
