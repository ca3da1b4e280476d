"""What passes leave in a model beside its weights: it is of the weights, and of the examples, of that pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Leftovers"]

_DEPTH = 3  # of containers in containers
_MOST = 1000  # entries of one that is looked at before each pass
_CONTAINERS = (dict, list, deque)
_FLAGS = (bool, int, float, str, type(None))
_ABSENT = object()
_NOT_LEFT = frozenset(vars(nn.Module())) | {"dropout"}  # torch's own tables, and modes that a pass is made in


class Leftovers:
    """Tensors that a model's modules hold as attributes, buffers or in containers, to be put back as they are now.

    A table that a module makes of its weights while it is evaluated, and keeps, is not there for the next pass then,
    whose weights may be others, and whose graph another. Flags of a module that left a tensor go with it. What numbers
    tensors have is not kept.

    Args:
        model: its modules are looked at, but for torch's own, which keep nothing.

    Example:
        >>> class Keeping(nn.Module):
        ...     kept = None
        >>> model = Keeping()
        >>> left = Leftovers(model)
        >>> model.kept = torch.ones(1)
        >>> left.put_back()
        >>> model.kept is None
        True
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [
            _OfModule(module)
            for module in model.modules()
            if not type(module).__module__.startswith("torch.") and not isinstance(module, torch.jit.ScriptModule)
        ]

    def put_back(self) -> None:
        """Have the model as it was."""
        for each in self._modules:
            each.put_back()


class _OfModule:
    """What one module holds itself."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._size = module, len(vars(module))
        self._own = {name: value for name, value in vars(module).items() if name not in _NOT_LEFT}
        containers = [module._buffers, *(each for value in self._own.values() for each in _containers(value))]
        # Plain copies: a class of the model's own may have no copy(), or one that wants more than what it holds.
        self._contents = [(each, dict(each) if isinstance(each, dict) else list(each)) for each in containers]

    def put_back(self) -> None:
        now, own = vars(self._module), self._own
        changed = [name for name, value in own.items() if now.get(name, _ABSENT) is not value]
        if changed or len(now) != self._size:
            changed += now.keys() - own.keys() - _NOT_LEFT
        left = {name for name in changed if any(_holds_tensors(each.get(name)) for each in (now, own))}
        filled = [(container, content) for container, content in self._contents if _differ(container, content)]
        for container, content in filled:
            container.clear()
            container.update(content) if isinstance(container, dict) else container.extend(content)
        for name in changed:
            flag = bool(left or filled) and all(isinstance(each.get(name), _FLAGS) for each in (now, own))
            if name in left or flag:
                now.pop(name, None)
                now.update({name: own[name]} if name in own else {})


def _holds_tensors(value: Any, depth: int = 0) -> bool:
    if isinstance(value, Tensor):
        return True
    if depth > _DEPTH or not isinstance(value, (*_CONTAINERS, tuple)):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return any(_holds_tensors(each, depth + 1) for each in inner)


def _containers(value: Any, depth: int = 0) -> Iterator[Any]:
    """Containers in which tensors may be left; large ones are vocabularies."""
    if depth > _DEPTH or not isinstance(value, _CONTAINERS) or len(value) > _MOST:
        return
    yield value
    for each in value.values() if isinstance(value, dict) else value:
        yield from _containers(each, depth + 1)


def _differ(container: Any, content: Any) -> bool:
    """Whether a container holds others than the very things that it held."""
    if len(container) != len(content):
        return True
    if isinstance(container, dict):
        return any(container.get(key, _ABSENT) is not value for key, value in content.items())
    return any(a is not b for a, b in zip(container, content, strict=True))
