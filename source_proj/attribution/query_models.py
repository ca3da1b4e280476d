"""Models that queries are asked of: private copies at a bank's checkpoints, kept with their proofs between calls."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from source_proj.bank import Bank
from source_proj.bank.build.arguments import require_arguments
from source_proj.gradients import GradientEngine, ParameterSpace, gradient_engine, private_copy
from source_proj.sketch import Sketch
from source_proj.trajectory import Checkpoint
from source_proj.trajectory.placement import placement_of

__all__ = ["LoadedModel", "OpenModel", "QueryModels"]

_HELD_BYTES = 1 << 30  # of weights that an open model keeps beside those in use
_IDLE = 4  # open models that wait for the next call
_DEPTH = 2  # of objects in objects that a module holds; beyond may be a whole trainer


@dataclass
class LoadedModel:
    """A copy of the model with a checkpoint's weights.

    Attributes:
        module: the copy.
        engine: its engine, with the proof of all batches since it was loaded.
        checked: whether it was seen that the copy alone is used.
    """

    module: nn.Module
    engine: GradientEngine
    checked: bool = False


class OpenModel:
    """One thread's copies of a model, a checkpoint's weights in each; the least recently used make room.

    Args:
        model: what is copied; it is only read.
        device: where copies are; default: where the model is.
    """

    def __init__(self, model: nn.Module, device: torch.device | str | None) -> None:
        self._model, self._device = model, device
        self._loaded: OrderedDict[tuple[str, str, bool], LoadedModel] = OrderedDict()
        self.state = _state(model)

    def at(self, bank: Bank, point: Checkpoint, *, exact: bool = False) -> LoadedModel:
        """The model at a checkpoint of a bank, from an earlier call or loaded now.

        Args:
            bank: whose sketch and parameters are used.
            point: whose weights are loaded.
            exact: for gradients of all d coordinates, and not their sketches.

        Raises:
            MismatchError: the model's parameters are not the bank's, those under an adapter are others, or the
                checkpoint changed since the build.
        """
        key = (bank.fingerprint, point.hash(), exact)
        if key not in self._loaded:
            space = ParameterSpace.from_spec(bank.space_spec)
            space.parameters(self._model)  # refuses another model
            bank.notes.require_base(self._model, [point], str(bank.path))
            module = self._free_copy()
            point.load_into(module)
            sketch = Sketch(space.size, "identity") if exact else bank.sketch
            engine = gradient_engine(module, space, sketch, method=bank.gradients, autocast=bank.autocast)
            engine.begin(bank.sketch.seed, point.step)
            self._loaded[key] = LoadedModel(module, engine)
        self._loaded.move_to_end(key)
        loaded = self._loaded[key]
        if loaded.engine.proof.general or loaded.engine.proof.refused:  # no call's path depends on those before it
            loaded.engine.begin(bank.sketch.seed, point.step)
        return loaded

    def _free_copy(self) -> nn.Module:
        if not placement_of(self._model).is_copied:  # the model itself, at one checkpoint at a time
            self._loaded.clear()
            return self._model
        size = sum(tensor.nbytes for tensor in [*self._model.parameters(), *self._model.buffers()])
        if self._loaded and size * (len(self._loaded) + 1) > _HELD_BYTES:
            former = self._loaded.popitem(last=False)[1]
            former.engine.placement.forget()
            return former.module
        return private_copy(self._model, self._device)


class QueryModels:
    """Open models of one module for any number of threads: each has its own while it asks.

    A module that was changed since (trained, another flag) is copied anew. One that is sharded over processes cannot be
    copied: all of its processes ask the same together, and its weights come back afterwards.

    Args:
        model: what is asked.
        device: where copies are; default: where the model is.

    Raises:
        TypeError: it is no module, such as a file's name.
    """

    def __init__(self, model: nn.Module, device: torch.device | str | None = None) -> None:
        require_arguments(model=model)
        self.model, self._device = model, device
        self._idle: list[OpenModel] = []
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[QueryModels], tuple[nn.Module, torch.device | str | None]]:
        return QueryModels, (self.model, self._device)  # what is open, and who waits for it, is this process's

    @contextmanager
    def borrowed(self) -> Iterator[OpenModel]:
        """An open model that nobody else uses; after an error it is not used again."""
        state = _state(self.model)
        with self._lock:
            self._idle = [opened for opened in self._idle if opened.state == state]
            opened = self._idle.pop() if self._idle else None
        opened = opened or OpenModel(self.model, self._device)
        placement = placement_of(self.model)
        with placement.kept():
            yield opened
        with self._lock:
            if placement.is_copied and len(self._idle) < _IDLE:
                self._idle.append(opened)


def _state(model: nn.Module) -> list[Any]:
    """What shows that a module was changed: versions of its tensors, and all that its modules hold."""
    seen: dict[int, Any] = {}  # a configuration that many modules hold is looked at once
    return [
        *(
            (name, id(tensor), None if tensor.is_inference() else tensor._version)
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        ),
        *((name, type(module), _plain(vars(module), seen)) for name, module in model.named_modules()),
    ]


def _plain(value: Any, seen: dict[int, Any], within: int = 0) -> Any:
    """A value as it is compared; of objects, such as configurations and those that they hold, what is in them."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor | nn.Module | ModuleType | type) or callable(value) or id(value) in seen:
        return id(value)
    seen[id(value)] = value
    if isinstance(value, dict):  # other mappings may read from a disk
        return [(str(key), _plain(entry, seen, within)) for key, entry in value.items()]
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(entry, seen, within) for entry in value]
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value.shape, str(value.dtype), hash(value.tobytes())
    try:
        held = dict(vars(value)) if within < _DEPTH else {}
    except Exception:  # slots alone, or what a property says
        held = {}
    return type(value), id(value), _plain(held, seen, within + 1)
