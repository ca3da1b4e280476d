"""Models whose modules accelerate runs on several devices (`device_map`, `dispatch_model`, `cpu_offload`).

accelerate puts a forward of its own before a module's. It moves the inputs to the module's device and, where weights
are offloaded, makes parameters of them for the length of the forward pass: outside of it they are on "meta".
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from source_proj._errors import SourceProjError
from source_proj.trajectory.placement.base import Live, Placement, State, entries_to_load, requiring_only

__all__ = ["Dispatched"]


class Dispatched(Placement):
    """Modules run where accelerate's hooks say.

    Args:
        model: after `dispatch_model`, `cpu_offload` or `from_pretrained(device_map=...)`.
    """

    kind = "offloaded by accelerate"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._hooks = {name: _hooks(module) for name, module in model.named_modules()}
        self._checked: set[str] = set()
        self.is_whole = not any(hook.offload for hooks in self._hooks.values() for hook in hooks)

    @property
    def device(self) -> torch.device:
        """Where the first module runs."""
        run = (hook.execution_device for hooks in self._hooks.values() for hook in hooks)
        first = next((device for device in run if device is not None), None)
        return super().device if first is None else _device(first)

    def devices(self, names: Collection[str]) -> list[torch.device]:
        """Those that the hooks of the parameters' modules name, else where the parameters are."""
        present = dict(self.model.named_parameters(remove_duplicate=False))
        return list(dict.fromkeys(self._device_of(name, present[name]) for name in names))

    def load(self, state: State) -> None:
        """Put the entries into the modules, and into what accelerate fills them from."""
        given = entries_to_load(state(), self.model)
        offloaded = self._offloaded()
        super().load(lambda: {name: value for name, value in given.items() if name not in offloaded})
        with torch.no_grad():
            for name in given.keys() & offloaded.keys():
                _put(*offloaded[name], given[name])

    @contextmanager
    def running(self, names: Collection[str]) -> Iterator[Live]:
        """Within, each call of a module notes the parameters that it is given."""
        if self.is_whole:
            with super().running(names) as all_of:
                yield all_of
            return
        if not self._checked >= set(names):  # a look at all weights, which may lie in files
            self._refuse_tied(set(names))
            self._checked |= set(names)
        live: Live = {name: [] for name in names}
        with requiring_only(self.model, names), ExitStack() as stack:
            for prefix, module in self.model.named_modules():
                local = {own: _join(prefix, own) for own, _ in module.named_parameters(recurse=False)}
                local = {own: name for own, name in local.items() if name in live}
                if local:
                    stack.enter_context(_noting(module, partial(_note, live, module, local)))
            yield live

    def _refuse_tied(self, names: set[str]) -> None:
        """Refuse parameters that are one outside of a pass and that accelerate fills in as several.

        Raises:
            SourceProjError: names them.
        """
        by_storage: defaultdict[int, list[str]] = defaultdict(list)
        for name, place in self._offloaded().items():
            held, key = _held(*place)
            if key in held:  # else in a file, each in its own
                by_storage[held[key].data_ptr()].append(name)
        tied = [several for several in by_storage.values() if len(several) > 1 and names & set(several)]
        if tied:
            raise SourceProjError(
                f"the parameters {tied[0]} are tied, and the model is {self.kind}, in which they come apart: "
                "keep these modules on a device by the device_map, or leave the parameters out"
            )

    def _device_of(self, name: str, parameter: Tensor) -> torch.device:
        owner = name.rpartition(".")[0]
        while True:
            for hook in self._hooks.get(owner, []):
                if hook.execution_device is not None:
                    return _device(hook.execution_device)
            if not owner or not parameter.is_meta:  # a module above may have loaded it
                return parameter.device
            owner = owner.rpartition(".")[0]

    def _offloaded(self) -> dict[str, tuple[Any, str]]:
        """Where accelerate takes an offloaded entry from: a map, and the entry's name in it."""
        places: dict[str, tuple[Any, str]] = {}
        for prefix, module in self.model.named_modules():
            for hook in self._hooks[prefix]:
                if hook.offload:
                    deep = hook.place_submodules
                    tensors = [*module.named_parameters(recurse=deep), *module.named_buffers(recurse=deep)]
                    places |= {_join(prefix, own): (hook.weights_map, own) for own, t in tensors if t.is_meta}
        return places


def _hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [each for each in getattr(hook, "hooks", [hook]) if hasattr(each, "execution_device")]


def _held(weights: Any, name: str) -> tuple[dict[str, Tensor], str]:
    """What is in memory of accelerate's maps, a dict, one with a prefix, or one with files behind it; and the key."""
    if hasattr(weights, "prefix"):
        weights, name = weights.dataset, f"{weights.prefix}{name}"
    return (weights if isinstance(weights, dict) else weights.state_dict), name


def _put(weights: Any, name: str, value: Tensor) -> None:
    """Replace an entry of accelerate's maps."""
    held, key = _held(weights, name)
    if key in held:
        held[key].copy_(value)  # tied entries share it
    else:
        held[key] = value.to(weights[name].dtype, copy=True)  # goes before the file's


@contextmanager
def _noting(module: nn.Module, note: Callable[[], None]) -> Iterator[None]:
    """Call `note` whenever the module's own forward begins, when accelerate has put the weights in."""
    own = vars(module).get("_old_forward")
    if own is None:
        handle = module.register_forward_pre_hook(lambda *_: note())
        try:
            yield
        finally:
            handle.remove()
        return

    def forward(*args: Any, **kwargs: Any) -> Any:
        note()
        return own(*args, **kwargs)

    vars(module)["_old_forward"] = forward
    try:
        yield
    finally:
        vars(module)["_old_forward"] = own


def _note(live: Live, module: nn.Module, local: Mapping[str, str]) -> None:
    for own, name in local.items():
        parameter = module.get_parameter(own)
        if all(parameter is not known for known in live[name]):
            live[name].append(parameter)


def _device(given: Any) -> torch.device:
    return torch.device("cuda", given) if isinstance(given, int) else torch.device(given)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
