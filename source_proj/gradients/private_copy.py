"""A model of one's own: other weights are put into a copy, so that the caller's model is never touched.

Gradients need a model whose weights, buffers, training flags, ``requires_grad`` and hooks can be changed. Changed in
the caller's module, they would give wrong numbers to every other thread that uses it at that moment.
"""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from source_proj._errors import GradientError, MismatchError, SourceProjError
from source_proj.gradients.batches import Batch, batch_size, require_in_front, take
from source_proj.gradients.general import Function
from source_proj.gradients.kept import tensors_held
from source_proj.trajectory.placement import Placement, placement_of

__all__ = ["private_copy", "require_own_weights", "require_takes"]

_COPYING = threading.Lock()  # a lazy module changes while it is copied


def private_copy(model: nn.Module, device: torch.device | str | None = None) -> nn.Module:
    """Copy a model with its weights, buffers, flags and hooks; the model itself is only read.

    An attribute that cannot be copied (a lock, an open file) is shared with the original; weights never are. What a
    module makes of its weights and keeps while it is evaluated, as LeViT its tables of biases, the copy makes anew for
    every pass: it would be of other weights, or of a pass without gradients. Autocast that training put around the
    model is not copied. A model
    that is sharded over processes is not copied: the model itself is returned, and `Placement.kept` is for its weights.

    Args:
        model: any module.
        device: where the copy goes; default: where the model is.

    Raises:
        GradientError: the model cannot be copied; says why.
        ValueError: a device for a model whose modules are on devices of their own.
    """
    placement = placement_of(model)
    if device is not None and type(placement) is not Placement:
        asked, lies = (torch.empty(0, dtype=torch.uint8, device=each).device for each in (device, placement.device))
        if asked != lies:
            raise ValueError(
                f"device {str(device)!r} was given for a model that is {placement.kind} and runs on "
                f"{str(placement.device)!r}: leave device out"
            )
        device = None
    if not placement.is_copied:
        return model
    with _COPYING:
        memo: dict[int, Any] = {
            id(value): value.detach().clone()  # as weight_norm keeps one; deepcopy refuses what has a graph
            for value in tensors_held(model)
            if not value.is_leaf
        }
        try:
            own = copy.deepcopy(model, dict(memo))
        except Exception:  # whatever an attribute's own __deepcopy__ raises
            own = _copied_but_for(_uncopyable(model), model, memo)
    _leave_autocast(own)
    for module in own.modules():
        if type(module).train is not nn.Module.train:
            with suppress(Exception):  # of a train() that refuses
                _train_once(module)
            module.register_forward_pre_hook(_let_go)
    return own if device is None else own.to(device)


def _leave_autocast(model: nn.Module) -> None:
    """Take off the autocast in which accelerate's ``prepare`` wraps a forward, and the Trainer leaves it behind."""
    forward = vars(model).get("_original_forward")
    if forward is not None and getattr(model, "_is_accelerate_prepared", False):
        model.forward = forward  # bound to the copy, as it was copied with it


def _let_go(module: nn.Module, _inputs: object) -> None:
    """Have an evaluated module let go of tensors that it keeps in dicts, as it does by itself where it is trained."""
    if module.training or not any(_keeps_tensors(name, value) for name, value in vars(module).items()):
        return
    _train_once(module)


def _train_once(module: nn.Module) -> None:
    """Have a module take out of its weights what it folds into them, or makes of them, for evaluation; flags stay."""
    flags = [(each, each.training) for each in module.modules()]
    try:
        module.train()
    finally:
        for each, flag in flags:
            each.training = flag


def _keeps_tensors(name: str, value: object) -> bool:
    if not isinstance(value, dict) or name in ("_parameters", "_buffers"):
        return False
    return any(isinstance(each, Tensor) for each in value.values())


def _copied_but_for(shared: Sequence[object], model: nn.Module, memo: Mapping[int, Any]) -> nn.Module:
    try:
        return copy.deepcopy(model, {**memo, **{id(value): value for value in shared}})
    except Exception as error:
        raise GradientError(
            f"the model {type(model).__name__} cannot be copied ({type(error).__name__}: {error}), and its weights are "
            "never changed in place: give the plain module, without what copy.deepcopy refuses"
        ) from error


def _uncopyable(model: nn.Module) -> list[object]:
    """What modules hold, themselves or in containers and as owners of hooks, that is no tensor and cannot be copied."""
    return [value for module in model.modules() for value in _held(vars(module)) if not _can_be_copied(value)]


def _held(values: Mapping[Any, Any]) -> Iterator[object]:
    for value in values.values():
        if isinstance(value, Tensor | nn.Module):
            continue
        if isinstance(value, Mapping):
            yield from _held(value)
        elif isinstance(value, list | tuple | set):
            yield from _held(dict(enumerate(value)))
        else:
            yield getattr(value, "__self__", value)  # of a bound method, as a hook often is, its object


def _can_be_copied(value: object) -> bool:
    if isinstance(value, nn.Module):
        return True
    try:
        copy.deepcopy(value)
    except Exception:
        return False
    return True


def require_own_weights(function: Function, own: nn.Module, original: nn.Module, batch: Batch) -> None:
    """Refuse a function, or a model, that reaches past the copy for the original's weights.

    A closure is not copied with the module that holds it: ``lambda x: model.head(x)``, in a module or in a task, goes
    on using the model that it was made with, whose weights are not the checkpoint's.

    Args:
        function: of (model, batch).
        own: the copy.
        original: what it is a copy of.
        batch: tried with its first example.

    Raises:
        GradientError: it does; names them.
        MismatchError: the model cannot take the batch at all.
    """
    if own is original:  # one that is not copied
        return
    with _Watch(original) as watch:
        require_takes(function, own, batch)
    if watch.seen:
        raise GradientError(
            f"the model's weights {sorted(watch.seen)[:5]} were used otherwise than through the model that the task "
            "is given: a function within the model, or the task, holds on to the module that it was made with (a "
            "closure, a lambda, a global name). Let it use the module that it is called with"
        )


def require_takes(function: Callable[[nn.Module, Batch], object], model: nn.Module, batch: Batch) -> None:
    """Refuse a batch that a model cannot take: what torch says of it names neither.

    Args:
        function: of (model, batch).
        model: the model.
        batch: tried with its first example.

    Raises:
        MismatchError: the model cannot take it.
        GradientError: it takes the whole batch, and no example of it.
    """
    try:
        with torch.no_grad():
            function(model, take(batch, [0]))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, ValueError) as error:
        if isinstance(error, SourceProjError):
            raise
        require_in_front(function, model, batch, batch_size(batch), error)
        if isinstance(error, ValueError):  # of a task, which says what is wrong
            raise
        raise MismatchError(
            f"the model {type(model).__name__} cannot take the first example ({str(error).splitlines()[0]}): its "
            "input must be as in training, of the same shape and type"
        ) from error


class _Watch(TorchFunctionMode):
    """Notes which parameters and buffers of a model torch's functions are called with."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self._names = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._note([args, kwargs or {}])
        return func(*args, **(kwargs or {}))

    def _note(self, value: object) -> None:
        if isinstance(value, Tensor):
            name = self._names.get(id(value))
            if name is not None:
                self.seen.add(name)
        elif isinstance(value, Mapping):
            self._note(list(value.values()))
        elif isinstance(value, list | tuple):
            for part in value:
                self._note(part)
