"""Names of parameters without what wrappers (DistributedDataParallel, torch.compile, Lightning) put before them."""

from __future__ import annotations

from torch import nn

__all__ = ["WRAPPER_PREFIXES", "unwrapped_name"]

WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.")


def unwrapped_name(name: str, model: nn.Module) -> str:
    """A name as the model has it, wrappers' prefixes cut off; the name itself if the model has no such parameter.

    >>> unwrapped_name("_orig_mod.module.weight", nn.Linear(1, 1))
    'weight'
    """
    own = {own_name for own_name, _ in model.named_parameters()}
    bare = name
    while bare not in own:
        prefix = next((prefix for prefix in WRAPPER_PREFIXES if bare.startswith(prefix)), None)
        if prefix is None:
            return name
        bare = bare.removeprefix(prefix)
    return bare
