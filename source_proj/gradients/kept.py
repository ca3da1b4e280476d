"""What a forward pass may leave in a model, kept, and put back."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["kept_states"]

_DEPTH = 3  # of what modules hold, and what that holds


@contextmanager
def kept_states(model: nn.Module) -> Iterator[None]:
    """Put back what a forward pass may leave: attributes and what they hold, weights, buffers, random states.

    Buffers are exchanged for the time, and not written back: autograd may have saved them for a pass that was made.
    """
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    kept = _Kept()
    for parameter in model.parameters():
        kept.tensor(parameter)
    for _, own in attributes:
        for name, value in own.items():
            if name not in _OF_TORCH:
                kept.whatever(value, 0)
            elif type(value) is dict:
                kept.content(value)
    states, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002 (what models draw from)
    clones: dict[int, Tensor] = {}
    for module, _ in attributes:
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = clones.setdefault(id(buffer), buffer.clone())
    try:
        yield
    finally:
        random.setstate(states)
        np.random.set_state(numpys)  # noqa: NPY002
        for module, own in attributes:
            vars(module).clear()
            vars(module).update(own)
        kept.put_back()


_OF_TORCH = frozenset(vars(nn.Module()))  # its own tables of parameters, buffers, modules and hooks


class _Kept:
    """Contents of what was given, and how to bring them back."""

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._contents: list[tuple[Any, Any]] = []
        self._generators: list[tuple[Any, Any]] = []

    def tensor(self, tensor: Tensor) -> None:
        """Keep a tensor's numbers."""
        if id(tensor) not in self._seen and not tensor.is_inference():
            self._seen[id(tensor)] = tensor
            self._tensors.append((tensor, tensor.detach().clone()))

    def content(self, value: Any) -> None:
        """Keep what a container holds."""
        self._contents.append((value, value.copy()))

    def whatever(self, value: Any, depth: int) -> None:
        """Keep what a value holds, and what that holds, to some depth."""
        if isinstance(value, Tensor):
            self.tensor(value)
        elif depth < _DEPTH and id(value) not in self._seen and _may_change(value):
            self._seen[id(value)] = value
            self._hold(value, depth)

    def _hold(self, value: Any, depth: int) -> None:
        state = _state_of(value)
        if state is not None:
            self._generators.append((value, state))
        elif isinstance(value, np.ndarray):
            if value.flags.writeable:
                self.content(value)
        elif isinstance(value, list | dict | set | deque):
            self.content(value)
            for each in value.values() if isinstance(value, dict) else value:
                self.whatever(each, depth + 1)
        else:
            if hasattr(value, "__dict__"):
                self.content(vars(value))
            for each in _held_by(value):
                self.whatever(each, depth + 1)

    def put_back(self) -> None:
        """Bring everything back."""
        for tensor, numbers in self._tensors:
            if tensor.shape == numbers.shape and not torch.equal(tensor, numbers):
                tensor.data.copy_(numbers)  # autograd, which may have saved it, is not to know
        for value, content in self._contents:
            if isinstance(value, np.ndarray):
                value[...] = content
                continue
            value.clear()
            value.extend(content) if isinstance(value, list | deque) else value.update(content)
        for generator, state in self._generators:
            if isinstance(generator, torch.Generator):
                generator.set_state(state)
            elif isinstance(generator, random.Random):
                generator.setstate(state)
            else:
                generator.bit_generator.state = state


def _may_change(value: Any) -> bool:
    """Whether a pass may change what a value holds: not what modules hold, nor trainers, which hold modules."""
    held = getattr(value, "__dict__", {})  # of modules and functions, which are callable, nothing is looked at
    return not callable(value) and not any(isinstance(each, nn.Module) for each in held.values())


def _held_by(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple) else list(getattr(value, "__dict__", {}).values())


def _state_of(value: Any) -> Any:
    """The state of a generator of random numbers; None of what is none."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    return value.bit_generator.state if isinstance(value, np.random.Generator) else None
