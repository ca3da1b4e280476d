"""Rows of a model that runs on several devices: each device sums what its own layers give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from source_proj.gradients.sink import GradientSink

__all__ = ["DeviceSink", "SpreadSink"]


class DeviceSink(NamedTuple):
    """The sink of one device, and all tensors that it adds to."""

    sink: GradientSink
    sums: Sequence[Tensor]


class SpreadSink(GradientSink):
    """Hands pieces to the sink of the device where they are; so (B, k) sums travel, and no activations.

    Args:
        by_device: the sinks; the first one's sums receive those of the others by `gather`, in this order.
    """

    def __init__(self, by_device: Mapping[torch.device, DeviceSink]) -> None:
        self._by_device = by_device

    @property
    def fuses_windows(self) -> bool:
        """As all of the sinks."""
        return all(part.sink.fuses_windows for part in self._by_device.values())

    @property
    def accepts_half(self) -> bool:
        """As all of the sinks."""
        return all(part.sink.accepts_half for part in self._by_device.values())

    def hold(self) -> None:
        """As `GradientSink.hold`, on each device."""
        for part in self._by_device.values():
            part.sink.hold()

    def release(self, *, add: bool = True) -> None:
        """As `GradientSink.release`, on each device."""
        for part in self._by_device.values():
            part.sink.release(add=add)

    def gather(self) -> None:
        """Add the sums of all devices to the first one's."""
        first, *others = self._by_device.values()
        for other in others:
            for total, part in zip(first.sums, other.sums, strict=True):
                total.add_(part.to(total.device))
                part.zero_()

    def add(self, name: str, rows: Tensor, start: int = 0) -> None:
        """As `GradientSink.add`."""
        self._at(rows).add(name, rows, start)

    def outer(self, name: str, left: Tensor, right: Tensor, start: int = 0) -> None:
        """As `GradientSink.outer`."""
        self._at(left).outer(name, left, right, start)

    def windows(self, name: str, left: Tensor, right: Tensor, taps: Tensor, windows: Tensor) -> None:
        """As `GradientSink.windows`."""
        self._at(left).windows(name, left, right, taps, windows)

    def scatter(self, name: str, index: Tensor, values: Tensor) -> None:
        """As `GradientSink.scatter`."""
        self._at(values).scatter(name, index, values)

    def _at(self, piece: Tensor) -> GradientSink:
        return self._by_device[piece.device].sink
