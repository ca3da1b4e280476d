"""A model's weights at one moment of training: where they are, what they hash to, how they get into a model."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from source_proj._errors import MismatchError
from source_proj._io.hashing import hash_file
from source_proj._io.outputs import local_path
from source_proj.trajectory.adapters import ADAPTER_FILE, adapted_state, adapter_places, is_adapter
from source_proj.trajectory.counts import checked_count
from source_proj.trajectory.layouts import averaged_keys, is_count, listed, model_state, unwrapped_names
from source_proj.trajectory.optimizers.describe import is_optimizer_state, kept_state, within
from source_proj.trajectory.optimizers.moments import holds_optimizer
from source_proj.trajectory.placement import placement_of, require_shapes_of
from source_proj.trajectory.schedules import finite_rate
from source_proj.trajectory.state_files import checked_path, read_state, state_files, whole_path

__all__ = ["Checkpoint", "set_evaluating"]


class Checkpoint:
    """The weights (and buffers) of a model after ``step`` optimizer steps.

    Args:
        state: what ``model.state_dict()`` gave, as a dict, or a file that holds it: ``.safetensors``, or ``.pt``,
            ``.pth``, ``.pth.tar``, ``.bin``, ``.ckpt`` written by :func:`torch.save`, or the
            ``.safetensors.index.json`` or ``.bin.index.json`` of one in several files; or a folder of transformers or
            accelerate with such a file. One named ``adapter_model``, or of a model of PEFT with nothing of what is
            frozen, holds adapters alone: the rest is the model's own. A dict that holds the state under "model",
            "state_dict", "net" and the like is unwrapped. Tensors of a dict are copied to the CPU, because
            ``state_dict()`` returns the live weights, which training goes on to overwrite. A file is read when needed.
        step: optimizer steps taken so far, ≥ 0.
        lr: learning rate at that time; enough where it is constant (see :class:`Stage` for schedules).
        optimizer_state: the optimizer's ``state_dict()``, or a file with it, for optimizers whose preconditioner is
            read from their state. SGD needs none. Of a dict, the second moments are copied, the rest is left out.
            Default: the one that stands beside the weights in the same dict or file, if one does, but for step 0: there
            it is of whoever trained these weights before.
        key: the entry that holds the state, such as "state_dict_ema"; default: that of the trained weights. The state
            is then read at once, and is a dict's from there on.

    Warns:
        UserWarning: if a file also holds averaged weights, when it is read.

    Raises:
        ValueError: ``step`` or ``lr`` is out of range, the file type is unknown, the state is ambiguous, or is of lazy
            modules before their first batch.
        MissingFileError: no such file.
        MismatchError: a file is one of several that hold a state.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> initial = Checkpoint(model.state_dict(), step=0, lr=0.1)
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(1.0)
        >>> with initial.applied_to(model):
        ...     torch.equal(model.weight, initial.load()["weight"])
        True
        >>> torch.equal(model.weight, initial.load()["weight"])
        False
    """

    def __init__(
        self,
        state: Mapping[str, Any] | str | Path,
        step: int,
        lr: float | None = None,
        optimizer_state: Mapping[str, Any] | str | Path | None = None,
        key: str | None = None,
    ) -> None:
        rate = None if lr is None else finite_rate(lr)
        if lr is not None and rate is None:
            raise ValueError(f"lr must be a number, finite and at least 0, got {lr!r}")
        if hasattr(optimizer_state, "state_dict"):
            raise TypeError(f"optimizer_state must be a dict or a file, got {_named(optimizer_state)}")
        self.step = checked_count("step", step, 0)
        self.lr = rate
        self._optimizer_state: Mapping[str, Any] | str | Path | None = (
            optimizer_state if isinstance(optimizer_state, str | Path) else kept_state(optimizer_state)
        )
        self._beside: tuple[object, bool] | None = None
        self.path: Path | None = None
        self._state: dict[str, Tensor] | None = None
        self._hash: tuple[object, str] | None = None
        if isinstance(state, str | Path):
            path = whole_path(local_path(state).absolute())
            if key is None:
                self.path = path
            else:
                content = read_state(path)
                self._state = model_state(content, str(path), key)
                if optimizer_state is None and self.step and is_optimizer_state(within(content)):
                    self._optimizer_state = path
        elif isinstance(state, Mapping):
            tensors = model_state(state, "the dict", key)
            require_shapes_of(tensors)
            self._state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            if optimizer_state is None and self.step and is_optimizer_state(within(state)):
                self._optimizer_state = kept_state(state)
        else:
            raise TypeError(f"state must be a dict of tensors or a path, got {_named(state)}")

    def __repr__(self) -> str:
        where = "a dict" if self.path is None else repr(str(self.path))
        return f"Checkpoint({where}, step={self.step}, lr={self.lr})"

    @property
    def optimizer_state(self) -> Mapping[str, Any] | str | Path | None:
        """The optimizer's state, or a file with it: the one given, else the weights' own file where it is in there."""
        if self._optimizer_state is not None or not self.step or self.path is None or not self.path.is_file():
            return self._optimizer_state
        facts = self.path.stat()
        key = facts.st_size, facts.st_mtime_ns
        if self._beside is None or self._beside[0] != key:
            self._beside = key, holds_optimizer(self.path)
        return self.path if self._beside[1] else None

    def load(self) -> dict[str, Tensor]:
        """Return the state, on the CPU: a new dict; the tensors of a checkpoint given as a dict are shared, not copied.

        Raises:
            MissingFileError: the file has gone.
            MismatchError: the file is corrupt or holds no state of a model.
        """
        if self._state is not None:
            return dict(self._state)
        path = checked_path(self.path)  # it may have gone since
        content = read_state(path)
        averaged = averaged_keys(content)
        if averaged:
            warnings.warn(
                f"{str(path)!r} holds averaged weights too: the trained ones were taken; "
                f"key={averaged[0]!r} takes the averaged ones",
                UserWarning,
                stacklevel=2,
            )
        return model_state(content, str(path))

    def hash(self) -> str:
        """SHA-256, in hex: of the file's bytes, or of a dict's names, types, shapes and bytes (order does not matter).

        Of a state in several files it is that of their hashes, the index first. It is cached; a file whose size or time
        of modification changed is read again.
        """
        if self._state is not None:
            self._hash = self._hash or (None, _hash_state(self._state))
            return self._hash[1]
        files = state_files(checked_path(self.path))
        key = tuple((file.stat().st_size, file.stat().st_mtime_ns) for file in files)
        if self._hash is None or self._hash[0] != key:
            hashes = [hash_file(file) for file in files]
            joint = hashes[0] if len(files) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
            self._hash = (key, joint)
        return self._hash[1]

    def load_into(self, model: nn.Module) -> None:
        """Put these weights into a model and the model into evaluation mode, to stay.

        Raises:
            MismatchError: as for :meth:`applied_to`.
        """
        placement_of(model).load(lambda: self._state_of(model))
        set_evaluating(model)

    def parameters_of(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's parameters that the state has, by name; of an adapter's file its own ones alone.

        Raises:
            MismatchError: the state does not fit the model.
        """
        state = self.load()
        if is_adapter(self.path, state, model):
            places = adapter_places(state, model, repr(self))
            state = {places[name]: value for name, value in state.items()}
        else:
            state = matched_state(state, model, repr(self))
        own = dict(model.named_parameters(remove_duplicate=False))
        values = {id(own[name]): value for name, value in state.items() if name in own}  # one name of tied ones
        return {name: values[id(value)] for name, value in model.named_parameters() if id(value) in values}

    def left_to(self, model: nn.Module) -> list[str]:
        """Names of the model's entries that these weights leave as they are: of an adapter's file all but its own.

        Raises:
            MismatchError: the adapter does not fit the model.
        """
        if not hasattr(model, "peft_config") and (self.path is None or not self.path.name.startswith(ADAPTER_FILE)):
            return []
        state = self.load()
        if not is_adapter(self.path, state, model):
            return []
        own, full = model.state_dict(keep_vars=True), adapted_state(state, model, repr(self))
        return [name for name, value in full.items() if value is own.get(name)]

    def _state_of(self, model: nn.Module) -> dict[str, Tensor]:
        """These weights under the names that a model has."""
        state = self.load()
        if is_adapter(self.path, state, model):
            state = adapted_state(state, model, repr(self))
        return matched_state(state, model, repr(self))

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[nn.Module]:
        """Put these weights into a model and the model into evaluation mode, for the length of a ``with`` block.

        The model's own weights, buffers and training flags come back bit for bit, also after an exception. A name
        missing here only because it is tied to one that is present is no mismatch.

        Raises:
            MismatchError: names or shapes differ from the model's; the message lists them. The model is untouched.
        """
        state = self._state_of(model)
        own_state = {
            name: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
            for name, value in model.state_dict().items()
        }
        own_buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]  # also those of no state_dict
        own_flags = [(module, module.training) for module in model.modules()]
        try:
            model.load_state_dict(state)
            set_evaluating(model)
            yield model
        finally:
            model.load_state_dict(own_state)
            with torch.no_grad():
                for buffer, value in own_buffers:
                    buffer.copy_(value)
            for module, flag in own_flags:
                module.training = flag


def _named(thing: object) -> str:
    return f"{type(thing).__name__}{': give its state_dict()' if hasattr(thing, 'state_dict') else ''}"


def set_evaluating(model: nn.Module) -> nn.Module:
    """Put a model into evaluation mode by its modules' flags: an overridden train() may fold weights into others."""
    for module in model.modules():
        module.training = False
    return model


def matched_state(state: Mapping[str, Tensor], model: nn.Module, source: str) -> dict[str, Tensor]:
    """Check a state against a model's names and shapes, and fill in names that are tied to present ones.

    Args:
        state: name to tensor.
        model: the model that must take it.
        source: what the error calls the state.

    Raises:
        MismatchError: names, shapes or kinds of numbers differ, or entries that the model ties hold different values.
    """
    own = model.state_dict(keep_vars=True)
    state = {**_bookkeeping(own), **unwrapped_names(state, own)}
    first_of: dict[int, str] = {}  # tensor identity → the first name under which the state has it
    for name in own:
        if name in state:
            first_of.setdefault(id(own[name]), name)
    full = {name: state[first_of[id(own[name])]] for name in own if name not in state and id(own[name]) in first_of}
    full |= {name: value for name, value in state.items() if name in own}
    problems = [
        listed("missing", [name for name in own if name not in full]),
        listed("not in the model", [name for name in state if name not in own]),
        listed(
            "of another shape",
            [
                f"{name} {tuple(value.shape)} where the model has {tuple(own[name].shape)}"
                for name, value in full.items()
                if isinstance(own[name], Tensor) and value.shape != own[name].shape
            ],
        ),
        listed(
            "of another kind of number",
            [
                f"{name} {value.dtype} where the model has {own[name].dtype}"
                for name, value in full.items()
                if isinstance(own[name], Tensor) and _loses(value, own[name])
            ],
        ),
    ]
    if any(problems):
        raise MismatchError(
            f"{source} does not fit the model {type(model).__name__}: {'; '.join(filter(None, problems))}. "
            "Give the model that was trained, or its own checkpoint."
        )
    for name, value in full.items():
        twin = first_of[id(own[name])]
        if value is not full[twin] and not torch.equal(value, full[twin]):
            raise MismatchError(f"{source}: {twin} and {name} are tied in the model, but hold different values here")
    return full


def _loses(value: Tensor, own: Tensor) -> bool:
    """Whether torch, copying a value into a model's own entry, would make other numbers of it without an error."""
    if isinstance(own, nn.Parameter) and own.is_floating_point():
        return not value.is_floating_point()
    return value.is_complex() and not own.is_complex()


def _bookkeeping(own: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a wrapper of torch counts for itself, which a checkpoint of the bare model has not."""
    return {name: value.detach() for name, value in own.items() if is_count(name)}


def _hash_state(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        flat = tensor.reshape(-1)
        if flat.stride(0) != 1:  # also of one element cut out of a larger tensor, which counts as contiguous
            flat = flat.clone(memory_format=torch.contiguous_format)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
