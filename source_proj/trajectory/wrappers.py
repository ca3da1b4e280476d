"""What wrappers put before every name of a model's state: DistributedDataParallel, torch.compile, Lightning."""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["WRAPPER_PREFIXES", "unwrapped_name"]

WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.")


def unwrapped_name(name: str, own: Collection[str]) -> str:
    """A name without a wrapper's prefix, where only that makes it one of a model's own.

    Example:
        >>> unwrapped_name("module.weight", {"weight"}), unwrapped_name("module.weight", {"module.weight"})
        ('weight', 'module.weight')
    """
    for prefix in WRAPPER_PREFIXES:
        if name not in own and name.removeprefix(prefix) in own:
            return name.removeprefix(prefix)
    return name
