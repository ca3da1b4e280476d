"""Products of examples with what is made of parameters of no layer, with taps that take no example's matrix apart."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from source_proj.gradients.bare_taps import BareTaps, Unfollowed

__all__ = ["BareProducts", "Known"]

_WEIGHT_GRADIENTS: dict[int, Callable[..., Tensor]] = {
    1: conv1d_weight,
    2: conv2d_weight,
    3: conv3d_weight,
}  # by the number of dims in space
_Numbers = int | Sequence[int]


class Known(Protocol):
    """What is known of the tensors of a pass."""

    taps: BareTaps

    def follows(self, tensor: Tensor | None) -> bool:
        """Whether parameters that are followed made it."""

    def holds_examples(self, tensor: Tensor) -> bool:
        """Whether it has rows for each example."""

    def made(self, tensor: Tensor) -> Tensor:
        """What parameters made, with a graph to what stands for them."""

    def plain(self, tensor: Tensor) -> Tensor:
        """The same as an operation of examples takes it whose output has a tap."""

    def again(self, func: Callable[..., Tensor], *args: object) -> Tensor:
        """Call a function as the model would."""


class BareProducts:
    """Linear functions in which examples meet what parameters made.

    Args:
        known: of the tensors of the pass.
    """

    def __init__(self, known: Known) -> None:
        self._known = known

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """As `torch.nn.functional.linear`."""
        known, x = self._known, self.of_examples(input, "a linear function")
        if not known.follows(weight):
            made = F.linear(x, weight)
            return made if bias is None else known.again(torch.add, made, bias)
        if bias is None or not known.follows(bias):
            return known.taps.product(x, known.made(weight).T, F.linear(x, known.plain(weight), bias))
        made = F.linear(x, known.plain(weight), known.plain(bias))
        return known.taps.product(x, known.made(weight).T, made, known.made(bias))

    def addmm(self, input: Tensor, mat1: Tensor, mat2: Tensor) -> Tensor:
        """As `torch.addmm`."""
        return self._known.again(torch.add, self._known.again(torch.matmul, mat1, mat2), input)

    def matmul(self, input: Tensor, other: Tensor) -> Tensor:
        """As `torch.matmul`."""
        known = self._known
        if known.follows(input):
            return self._from_the_left(input, self.of_examples(other, "a product"))
        if input.dim() < 2:
            raise Unfollowed("a parameter of no layer takes part in a product with a vector")
        if other.dim() == 1:
            return known.again(torch.matmul, input, known.again(torch.unsqueeze, other, 1)).squeeze(-1)
        if other.dim() == 2:
            return known.taps.product(input, known.made(other), input @ known.plain(other))
        return torch.matmul(input, self._before_each(other, input))

    def _from_the_left(self, matrix: Tensor, x: Tensor) -> Tensor:
        known = self._known
        if x.dim() < 3:
            raise Unfollowed("a parameter of no layer stands before the examples in a product")
        if matrix.dim() == 1:
            return known.again(torch.matmul, x.mT, matrix)
        if matrix.dim() == 2:
            return known.again(torch.matmul, x.mT, known.again(torch.t, matrix)).mT
        return torch.matmul(self._before_each(matrix, x), x)

    def _before_each(self, matrices: Tensor, x: Tensor) -> Tensor:
        """Matrices (..., i, j) as they lie before each of the examples with which they are multiplied."""
        batch = np.broadcast_shapes(matrices.shape[:-2], x.shape[:-2])
        padded = (1,) * (len(batch) + 2 - matrices.dim()) + tuple(matrices.shape)
        if padded[0] != 1 or batch[0] != x.shape[0]:
            raise Unfollowed("a parameter of no layer lies along the examples in a product")
        return self._expanded(matrices, padded, x.shape[0])

    def _expanded(self, tensor: Tensor, padded: Sequence[int], rows: int) -> Tensor:
        value = self._known.plain(tensor).reshape(*padded).expand(rows, *padded[1:])
        return self._known.taps.expanded(self._known.made(tensor), value)

    def einsum(self, equation: str, *operands: Tensor) -> Tensor:
        """As `torch.einsum`, of letters."""
        given = list(operands[0]) if len(operands) == 1 and not isinstance(operands[0], Tensor) else list(operands)
        letters, output, known = *_written_out(equation, [x.dim() for x in given]), self._known
        bare = [place for place, each in enumerate(given) if known.follows(each)]
        firsts = {letters[place][:1] for place, x in enumerate(given) if place not in bare and known.holds_examples(x)}
        (along,) = firsts if len(firsts) == 1 else ("",)
        if not along or along not in output or any(along in letters[place] for place in bare):
            raise Unfollowed(f"a parameter of no layer takes part in einsum {equation!r}, in which examples come first "
                             "in no output")  # fmt: skip
        if len(given) == 2 and len(bare) == 1:
            (place,) = bare
            found = self._contracted(given[1 - place], letters[1 - place], given[place], letters[place], output)
            if found is not None:
                return found
        size = next(x.shape[0] for place, x in enumerate(given) if letters[place][:1] == along)
        for place in bare:
            given[place] = self._expanded(given[place], (1, *given[place].shape), size)
            letters[place] = along + letters[place]
        return torch.einsum(f"{','.join(letters)}->{output}", *given)

    def _contracted(self, x: Tensor, of_x: str, bare: Tensor, of_bare: str, output: str) -> Tensor | None:
        """A product of matrices, where each letter is summed over, or one operand's alone; None where it is none."""
        summed = [letter for letter in of_x if letter in of_bare]
        kept, new = ([letter for letter in one if letter not in other] for one, other in
                     ((of_x, of_bare), (of_bare, of_x)))  # fmt: skip
        alone = len({*of_x}) == len(of_x) and len({*of_bare}) == len(of_bare)
        if not alone or any(letter in output for letter in summed) or sorted(output) != sorted([*kept, *new]):
            return None
        if not summed or not new:
            return None
        sizes = dict(zip(of_x + of_bare, (*x.shape, *bare.shape), strict=True))
        if any(sizes[letter] != length for letter, length in zip(of_x, x.shape, strict=True)):
            return None  # of one length that is repeated
        left = x.permute(*(of_x.index(letter) for letter in [*kept, *summed])).flatten(len(kept))
        matrix = self._matrix(bare, [of_bare.index(letter) for letter in [*summed, *new]], len(summed))
        product = self._known.again(torch.matmul, left, matrix)
        apart: Tensor = product.unflatten(-1, [sizes[letter] for letter in new])
        return apart.permute(*([*kept, *new].index(letter) for letter in output))

    def _matrix(self, bare: Tensor, order: list[int], rows: int) -> Tensor:
        """A tensor's dims in another order, of which the first are a matrix's rows."""
        if bare.dim() == 2:
            return bare if order == [0, 1] else self._known.again(torch.t, bare)
        turned = self._known.again(torch.permute, bare, order)
        height = int(np.prod([bare.shape[place] for place in order[:rows]], dtype=np.int64))
        return self._known.again(torch.reshape, turned, (height, -1))

    def convolution(
        self,
        convolve: Callable[..., Tensor],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: _Numbers = 1,
        padding: _Numbers | str = 0,
        dilation: _Numbers = 1,
        groups: int = 1,
    ) -> Tensor:
        """As `torch.nn.functional.conv1d`, `conv2d`, and `conv3d`."""
        known, x = self._known, self.of_examples(input, "a convolution")
        padding, dims = 0 if padding == "valid" else padding, weight.dim() - 2
        if x.dim() != weight.dim() or isinstance(padding, str):
            raise Unfollowed(f"a parameter of no layer takes part in a convolution of {tuple(x.shape)} ({padding=})")
        kernel = known.plain(weight) if known.follows(weight) else weight
        made = convolve(x, kernel, None, stride, padding, dilation, groups)
        if known.follows(weight):

            def gradient(x: Tensor, g: Tensor) -> Tensor:
                return _WEIGHT_GRADIENTS[dims](x[None], weight.shape, g[None], stride, padding, dilation, groups)

            made = known.taps.linear_in(x, known.made(weight), made, gradient)
        if bias is None:
            return made
        return known.again(torch.add, made, known.again(torch.reshape, bias, (-1,) + (1,) * dims))

    def bags(
        self,
        input: Tensor,
        weight: Tensor,
        offsets: Tensor | None = None,
        mode: str = "mean",
        per_sample_weights: Tensor | None = None,
        padding_idx: int | None = None,
        **other: Any,
    ) -> Tensor:
        """As `torch.nn.functional.embedding_bag`, of bags of one length, an example's own."""
        known, scaled = self._known, other.get("max_norm") is not None or other.get("scale_grad_by_freq")
        if offsets is not None or input.dim() != 2 or mode == "max" or scaled or known.follows(per_sample_weights):
            raise Unfollowed(f"a parameter of no layer takes part in embedding_bag of {tuple(input.shape)} ({mode=})")
        rows = known.again(F.embedding, input, weight)  # (B, L, n)
        counted = torch.ones_like(input, dtype=rows.dtype)
        if padding_idx is not None:
            counted = (input != padding_idx % len(weight)).to(rows)
        factors = counted if per_sample_weights is None else counted * per_sample_weights
        sums = (rows * factors.unsqueeze(2)).sum(1)
        return sums / counted.sum(1, keepdim=True).clamp(min=1) if mode == "mean" else sums

    def of_examples(self, x: Tensor, where: str) -> Tensor:
        """What must be the examples'.

        Raises:
            Unfollowed: parameters alone made it.
        """
        if self._known.follows(x):
            raise Unfollowed(f"a parameter of no layer stands in the examples' place in {where}")
        return x


def _written_out(equation: str, dims: Sequence[int]) -> tuple[list[str], str]:
    """Letters of each operand, and of the output, with those for which dots stand, or which are left out."""
    before, arrow, after = equation.replace(" ", "").partition("->")
    letters = before.split(",")
    spare = [letter for letter in string.ascii_letters if letter not in equation]
    most = max((count - len(one) + 3 for one, count in zip(letters, dims, strict=True) if "..." in one), default=0)
    dots = "".join(spare[:most])
    if not arrow:
        once = sorted(letter for letter in {*before} - {*".,"} if before.count(letter) == 1)
        after = "..." * ("..." in before) + "".join(once)
    counts = [count - len(one) + 3 for one, count in zip(letters, dims, strict=True)]
    wide = [one.replace("...", dots[most - count :]) for one, count in zip(letters, counts, strict=True)]
    return wide, after.replace("...", dots)
