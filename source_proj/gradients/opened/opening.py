"""What a tapped forward pass is given, and the taps that it sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from source_proj.gradients.sink import GradientSink

__all__ = ["Forward", "Listener", "Opening", "Part"]

Forward = Callable[..., Any]
Listener = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Part:
    """Some rows of a parameter.

    Attributes:
        name: local name of the parameter.
        start: the first of the rows.
        height: rows of the whole parameter.
    """

    name: str
    start: int
    height: int

    def whole(self, g: Tensor) -> Tensor:
        """The rows' gradient (..., rows), with zeros for those of the others."""
        return g if g.shape[-1] == self.height else F.pad(g, (self.start, self.height - self.start - g.shape[-1]))


@dataclass(frozen=True)
class Opening:
    """One call of an opened module.

    Attributes:
        names: local names of the attributed parameters, with their full ones.
        size: number of examples B; what the module sees holds r rows for each, (B r, ...).
        anchor: starts a graph where there is none yet.
        taker: gives the sink of the backward pass under way.
        tap: (output, x, listener) gives the output with a tap, which hands (x, g) to the listener.
        note: (output, inputs) notes a node that is a tap itself, and what its inputs are; gives the output.
        met: gives a state of each example, with a tap where parameters of no layer made it.
        live: whether the parameters get a gradient of their own, too, as in training.
    """

    names: Mapping[str, str]
    size: int
    anchor: Tensor
    taker: Callable[[], GradientSink]
    tap: Callable[[Tensor, Tensor, Listener], Tensor]
    note: Callable[[Tensor, Sequence[Tensor]], Tensor]
    met: Callable[[Tensor], Tensor]
    live: bool = False

    def value(self, parameter: Tensor) -> Tensor:
        """A parameter as the module uses it."""
        return parameter if self.live else parameter.detach()

    def laid_out(self, output: Tensor) -> Tensor:
        """An output (B, T, n) with steps outermost in memory, as torch's are: dropout draws in that order."""
        return output.transpose(0, 1).contiguous().transpose(0, 1) if self.live else output

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, parts: tuple[Part, Part]) -> Tensor:
        """The product x W' + b with a tap, for x (B r, T, i) and the rows W, b that are parts of parameters."""
        output = F.linear(x, self.value(weight), None if bias is None else self.value(bias))

        def listener(x: Tensor, g: Tensor) -> None:
            self.product(g, x, parts[0])
            if bias is not None:
                self.sum(g, parts[1])

        return self.tap(output, x, listener)

    def product(self, g: Tensor, x: Tensor, part: Part) -> None:
        """Hand over sum_t g_t (x) x_t, for g (B r, T, o) and x (B r, T, i)."""
        name, sink = self.names.get(part.name), self.taker()
        if name is None:
            return
        g, x = self._of_examples(part.whole(g)), self._of_examples(x.to(g.device, g.dtype))
        sink.outer(name, *((g, x) if sink.accepts_half else (g.float(), x.float())))

    def sum(self, g: Tensor, part: Part) -> None:
        """Hand over sum_t g_t, for g (B r, T, o)."""
        name = self.names.get(part.name)
        if name is not None:
            self.taker().add(name, part.whole(self._of_examples(g).float().sum(1)))

    def _of_examples(self, tensor: Tensor) -> Tensor:
        """(B r, ..., n) as (B, T, n)."""
        return tensor.reshape(self.size, -1, tensor.shape[-1])
