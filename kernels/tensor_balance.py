"""Two factors of an outer product brought to one size, so that transforms round neither of them away."""

import torch
from torch import Tensor

__all__ = ["balanced"]

_FEW_EXPONENTS = 126  # powers of two that float32 holds with their inverse


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Powers of two (B, T, 1), whose product is one, that bring both factors to one size; zeros where one is zero.

    Without them the smaller one would drown in the other one's rounding. The norm of a vector is at most the root of
    its largest entry times its sum.
    """
    exponents = []
    for x in (left, right):
        size = x.abs()
        most, total = size.amax(2, keepdim=True).float(), size.sum(2, keepdim=True, dtype=torch.float32)
        exponents.append((torch.frexp(most).exponent + torch.frexp(total).exponent, most > 0))
    (of_left, left_there), (of_right, right_there) = exponents
    shift = ((of_right - of_left) // 4).clamp(-_FEW_EXPONENTS, _FEW_EXPONENTS)
    there = left_there & right_there
    return tuple(torch.where(there, _power_of_two(power), 0.0) for power in (shift, -shift))  # type: ignore[return-value]


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float32 from its bits: exact on every device, for int32 from -126 to 127."""
    return ((exponent + 127) << 23).view(torch.float32)
