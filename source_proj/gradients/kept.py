"""What a forward pass may leave in a model, kept, and put back."""

from __future__ import annotations

import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["kept_states", "tensors_held"]

_DEPTH = 5  # of what modules hold, and what that holds
_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict, Counter)  # and no other kinds of them
_FOREIGN = sys.stdlib_module_names - {"types", "dataclasses", "collections", "__main__"} | {"torch", "numpy"}
_OF_TORCH = frozenset(vars(nn.Module()))  # a module's own tables of parameters, buffers, modules and hooks


@contextmanager
def kept_states(model: nn.Module) -> Iterator[None]:
    """Put back what a forward pass may leave: attributes and what they hold, weights, buffers, random states.

    Buffers are exchanged for the time, and not written back: autograd may have saved them for a pass that was made.
    What can't be kept, such as a closure's counter or an open file, stays as the pass leaves it.
    """
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    kept = _Kept()
    for parameter in model.parameters():
        kept.whatever(parameter, 0)
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


def tensors_held(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and the tensors that a model's modules hold otherwise, also in lists and dicts."""
    yield from model.parameters()
    yield from model.buffers()
    kept = _Kept()
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if name not in _OF_TORCH:
                kept.whatever(value, 0, copies=False)
    yield from kept.tensors


class _Kept:
    """Contents of what was given, and how to bring them back.

    Nothing that differs in no way is written to, and nothing is looked into that is of Python's or torch's own.

    Attributes:
        tensors: those that were met.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._seen: dict[int, Any] = {}
        self._numbers: list[tuple[Tensor, Tensor]] = []
        self._contents: list[tuple[Any, Any]] = []
        self._slots: list[tuple[Any, str, Any]] = []
        self._generators: list[tuple[Any, Any]] = []

    def content(self, value: Any) -> None:
        """Keep what a container, or an array, holds."""
        self._contents.append((value, value.copy()))

    def whatever(self, value: Any, depth: int, *, copies: bool = True) -> None:
        """Keep what a value holds, and what that holds, to some depth; what can't be kept is left alone.

        Args:
            value: anything.
            depth: how far within what modules hold it was met.
            copies: whether it is to be put back, and not only met.
        """
        if depth >= _DEPTH or id(value) in self._seen or isinstance(value, ModuleType | nn.Module | type):
            return
        self._seen[id(value)] = value
        with suppress(Exception):  # of the value's own making
            if isinstance(value, Tensor):
                self._tensor(value, copies)
            elif not self._generator(value, copies):
                for each in self._held_by(value, copies):
                    self.whatever(each, depth + 1, copies=copies)

    def _tensor(self, tensor: Tensor, copies: bool) -> None:
        self.tensors.append(tensor)
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_nested
        if copies and plain and tensor.device.type != "meta" and not (tensor.is_inference() or tensor.is_quantized):
            self._numbers.append((tensor, tensor.detach().clone()))

    def _generator(self, value: Any, copies: bool) -> bool:
        state = _state_of(value)
        if state is not None and copies:
            self._generators.append((value, state))
        return state is not None

    def _held_by(self, value: Any, copies: bool) -> list[Any]:
        """What a container, an array or an object of the user's own kind holds, once that is kept."""
        if isinstance(value, tuple):
            return list(value)
        if isinstance(value, np.ndarray):
            if copies and value.flags.writeable and not isinstance(value, np.memmap):
                self.content(value)
            return []
        if type(value) in _CONTAINERS:
            if "__builtins__" in value or "__spec__" in value:  # the names of a Python module
                return []
            if copies:
                self.content(value)
            return list(value.values()) if isinstance(value, dict) else list(value)
        return self._held_by_object(value, copies)

    def _held_by_object(self, value: Any, copies: bool) -> list[Any]:
        if callable(value) or type(value).__module__.partition(".")[0] in _FOREIGN:
            return []
        held = getattr(value, "__dict__", {})
        slots = [
            name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()) if hasattr(value, name)
        ]
        inner = [*held.values(), *(getattr(value, name) for name in slots)]
        if any(isinstance(each, nn.Module) for each in inner):  # as trainers hold
            return []
        if copies:
            if held:
                self.content(held)
            self._slots += [(value, name, getattr(value, name)) for name in slots if name != "__dict__"]
        return inner

    def put_back(self) -> None:
        """Bring back what differs."""
        for tensor, numbers in self._numbers:
            with suppress(Exception):
                if tensor.shape != numbers.shape:
                    tensor.data = numbers
                elif not torch.equal(tensor, numbers):
                    tensor.data.copy_(numbers)  # autograd, which may have saved it, is not to know
        for value, content in self._contents:
            with suppress(Exception):
                if not _is_same(value, content):
                    _fill(value, content)
        for value, name, held in self._slots:
            with suppress(Exception):
                if getattr(value, name) is not held:
                    setattr(value, name, held)
        for generator, state in self._generators:
            _set_state(generator, state)


def _is_same(value: Any, content: Any) -> bool:
    """Whether a container holds the very things that it held."""
    if isinstance(value, np.ndarray):
        return bool(np.array_equal(value, content))
    if len(value) != len(content):
        return False
    if isinstance(value, dict):
        return all(key in value and value[key] is held for key, held in content.items())
    return value == content if isinstance(value, set) else all(a is b for a, b in zip(value, content, strict=True))


def _fill(value: Any, content: Any) -> None:
    if isinstance(value, np.ndarray):
        value[...] = content
        return
    value.clear()
    value.extend(content) if isinstance(value, list | deque) else value.update(content)


def _state_of(value: Any) -> Any:
    """The state of a generator of random numbers; None of what is none."""
    if isinstance(value, torch.Generator | np.random.RandomState):
        return value.get_state()
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return value.getstate()
    return value.bit_generator.state if isinstance(value, np.random.Generator) else None


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator | np.random.RandomState):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.bit_generator.state = state
