"""Taps where parameters of no layer meet the examples: the gradient arrives there example by example."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from source_proj.gradients.opened import Listener
from source_proj.gradients.products import batched_products
from source_proj.gradients.sink import GradientSink
from source_proj.gradients.suited import Unsuited

__all__ = ["BareTaps", "Unfollowed"]

_MATRICES_BYTES = 64 * 2**20  # of examples' gradients of what is made of parameters, at one time


class Unfollowed(Unsuited):
    """A use of a bare parameter that is none of those known."""


class BareTaps:
    """The taps of one forward pass.

    What is made of parameters stands here for itself without the model's own graph: it leads to `leaves` alone, so that
    nobody's hooks are called when gradients are taken through it.

    Args:
        leaves: name → what stands for the parameter.
        size: number of examples B.
        taker: gives the sink of the backward pass under way.
        tap: (output, listener, x) gives the output (B r, ...) with a tap, which hands (x, g) to the listener.
    """

    def __init__(
        self,
        leaves: Mapping[str, Tensor],
        size: int,
        taker: Callable[[], GradientSink],
        tap: Callable[[Tensor, Listener, Tensor], Tensor],
    ) -> None:
        self.leaves, self._size, self._taker, self._tap = leaves, size, taker, tap
        self._names = {id(leaf): name for name, leaf in leaves.items()}

    def name_of(self, made: Tensor) -> str | None:
        """The parameter that a tensor stands for; None for what is made of some."""
        return self._names.get(id(made))

    def product(self, x: Tensor, matrix: Tensor, output: Tensor, bias: Tensor | None = None) -> Tensor:
        """The output x M + b with a tap, for x (B r, ..., i) and M (i, o)."""
        if matrix.dim() != 2 or x.shape[0] % self._size:
            raise Unfollowed(f"a parameter of no layer takes part in a product of {tuple(matrix.shape)}")

        def listener(x: Tensor, g: Tensor) -> None:
            left, right = (tensor.reshape(self._size, -1, tensor.shape[-1]) for tensor in (x.to(g.dtype), g))
            sink = self._taker()
            if not sink.accepts_half:
                left, right = left.float(), right.float()
            name, turned = self.name_of(matrix), self._transposed(matrix)
            if name is not None:
                sink.outer(name, left, right)
            elif turned is not None:
                sink.outer(turned, right, left)
            else:
                for some in self._few(matrix):
                    self._receive(matrix, left[some].float().transpose(1, 2) @ right[some].float(), some.start)
            if bias is not None:
                self._receive(bias, g.reshape(self._size, -1, g.shape[-1]).float().sum(1))

        return self._tap(output, listener, x)

    def linear_in(
        self, x: Tensor, made: Tensor, output: Tensor, gradient: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """The output (B r, ...), linear in what parameters made, with a tap.

        Args:
            x: the other factor, (B r, ...).
            made: of parameters.
            output: their product.
            gradient: (x, g) of one row gives that by what was made.
        """

        def listener(x: Tensor, g: Tensor) -> None:
            left, right = (tensor.float().reshape(self._size, -1, *tensor.shape[1:]) for tensor in (x, g))
            for some in self._few(made):
                rows = torch.func.vmap(gradient)(left[some].flatten(0, 1), right[some].flatten(0, 1))
                self._receive(made, rows.reshape(-1, left.shape[1], *made.shape).sum(1), some.start)

        return self._tap(output, listener, x)

    def table(self, index: Tensor, made: Tensor, output: Tensor, padding: int | None = None) -> Tensor:
        """Rows (B r, ..., *row) of a table (V, *row) with a tap, by index (B r, ...)."""

        def listener(index: Tensor, g: Tensor) -> None:
            index = index.reshape(self._size, -1).long()
            g = g.reshape(*index.shape, -1)
            kept = g if padding is None else g.masked_fill((index == padding).unsqueeze(-1), 0.0)
            name = self.name_of(made)
            if name is not None and made.dim() == 2:
                self._taker().scatter(name, index, kept)
                return
            for some in self._few(made):
                few = kept[some].float()
                rows = few.new_zeros(len(few), len(made), few.shape[-1])
                rows.scatter_add_(1, index[some].unsqueeze(-1).expand_as(few), few)
                self._receive(made, rows.reshape(len(few), *made.shape), some.start)

        return self._tap(output, listener, index)

    def expanded(self, made: Tensor, value: Tensor) -> Tensor:
        """What is the same for all examples, as it lies before each of them, (B r, ...), with a tap.

        Args:
            made: of parameters.
            value: the same, expanded.
        """

        def listener(_: Tensor, g: Tensor) -> None:
            of_examples = g.reshape(self._size, -1, *g.shape[1:]).sum(1)
            padded = (1,) * (g.dim() - made.dim()) + tuple(made.shape)
            self._receive(made, of_examples.sum_to_size(self._size, *padded[1:]).reshape(self._size, *made.shape))

        # Expanded to one row, it would be the parameter itself, and an operation in place would change that.
        itself = len(value) == 1 or value.is_contiguous()
        return self._tap(_copied(value) if itself else value, listener, value.new_empty(0))

    def along(self, made: Tensor, value: Tensor) -> Tensor:
        """What has rows of its own for each example, (B r, ...), with a tap.

        Args:
            made: of parameters, (B r, ...).
            value: the same.
        """

        def listener(_: Tensor, g: Tensor) -> None:
            rows = g.reshape(self._size, -1, *g.shape[1:]).float()
            for some in self._few(made):
                few = rows[some]
                apart = g.new_zeros(len(few), *rows.shape, dtype=torch.float32)
                places = torch.arange(len(few), device=g.device)
                apart[places, some.start + places] = few
                self._receive(made, apart.reshape(len(few), *made.shape), some.start)

        return self._tap(_copied(value), listener, value.new_empty(0))

    def _few(self, made: Tensor) -> list[slice]:
        step = max(1, _MATRICES_BYTES // (4 * max(1, made.numel())))
        return [slice(start, start + step) for start in range(0, self._size, step)]

    def _transposed(self, matrix: Tensor) -> str | None:
        """Name of the parameter of which a matrix is the transposed one."""
        node = matrix.grad_fn
        if node is None or not node.name().startswith(("TBackward", "TransposeBackward", "PermuteBackward")):
            return None
        leaf = getattr(node.next_functions[0][0], "variable", None)
        if leaf is None or leaf.data_ptr() != matrix.data_ptr() or leaf.stride() != matrix.stride()[::-1]:
            return None
        return self.name_of(leaf) if leaf.shape == matrix.shape[::-1] else None

    def _receive(self, made: Tensor, g: Tensor, start: int = 0) -> None:
        """Hand gradients (n, ...) for some examples to the parameters of which something was made."""
        names, leaves = list(self.leaves), list(self.leaves.values())
        gradients: Sequence[Tensor | None] = [g if leaf is made else None for leaf in leaves]
        if made.grad_fn is not None:
            gradients = batched_products([made], leaves, [g.to(made.dtype)])
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                self._taker().add(name, gradient.reshape(len(g), -1).float(), start)


def _copied(value: Tensor) -> Tensor:
    """A copy whose gradient is one, too: else several parameters' `.grad` may be one tensor, which a sum adds to twice.

    What autograd hands to a parameter as a view of a gradient that others get as well becomes `.grad` as it is.
    """
    return value * 1
