"""Rows of layers on several devices are the sums of what each device has."""

from itertools import cycle

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from source_proj.gradients.proof import WatchedSink, share_sink
from source_proj.gradients.sink import GradientSink
from source_proj.gradients.space import ParameterSpace
from source_proj.gradients.spread import DeviceSink, SpreadSink
from source_proj.sketch import Sketch

SPACE = ParameterSpace(("a", "b", "table"), ((3, 4), (5,), (6, 2)))
DEVICES = [torch.device("cpu"), torch.device("cpu", 0), torch.device("cpu", 1)]  # told apart by their names alone


class InTurn(SpreadSink):
    """Takes each piece to be on the next device."""

    def __init__(self, by_device):
        super().__init__(by_device)
        self._next = cycle(by_device.values())

    def _at(self, piece):
        return next(self._next).sink


def made(size):
    rows = torch.zeros(size, 32)
    shares = share_sink(size, SPACE, torch.device("cpu"))
    sink = WatchedSink(GradientSink(rows, Sketch(dim=32), SPACE), shares, {"a", "b"})
    return DeviceSink(sink, [rows, shares.sums])


@settings(max_examples=25)
@given(size=st.integers(1, 4), seed=st.integers(0, 2**31), count=st.integers(1, 3), passes=st.integers(1, 2))
def test_sums_are_those_of_one_device(size, seed, count, passes):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(size, *shape, generator=generator)  # noqa: E731
    alone, parts = made(size), {device: made(size) for device in DEVICES[:count]}
    spread = InTurn(parts)
    for _ in range(passes):  # what was gathered must not be gathered again
        left, right, flat, values = draw(2, 3), draw(2, 4), draw(5), draw(3, 2)
        index = torch.randint(0, 6, (size, 3), generator=generator)
        for sink in (alone.sink, spread):
            with sink.holding():
                sink.outer("a", left, right)
                sink.add("b", flat)
                sink.scatter("table", index, values)
            sink.gather()
    for expected, total in zip(alone.sums, parts[DEVICES[0]].sums, strict=True):
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
