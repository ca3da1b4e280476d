"""Modules whose forward pass holds several products, which no hook behind the module can see.

While the hook path runs, such a module has an equal forward pass of this package, in which every product has a tap.
"""

from __future__ import annotations

from torch import nn

from source_proj.gradients.opened import attention, experts, recurrent
from source_proj.gradients.opened.opening import Forward, Listener, Opening

__all__ = ["Forward", "Listener", "Opening", "forward_for"]


def forward_for(module: nn.Module) -> Forward | None:
    """The tapped forward pass of a module: `forward(module, opening, *args, **kwargs)`; None where there is none."""
    if "forward" in vars(module):
        return None
    if attention.serves(module):
        return attention.forward
    if experts.serves(module):
        return experts.forward
    return recurrent.forward_for(module)
