"""States of an adapter alone, such as PEFT saves: the rest is the base model's own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from source_proj._errors import MismatchError
from source_proj.trajectory.layouts import unwrapped_names

__all__ = ["ADAPTER_FILE", "adapted_state", "adapter_places", "is_adapter"]

ADAPTER_FILE = "adapter_model."  # PEFT's name for one
_WHOLE = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")  # PEFT's copy of a module that is trained whole, one an adapter
_PROMPT = re.compile(r"prompt_encoder\..+")
_PROMPTS = "prompt_embeddings"  # what PEFT saves of it


def is_adapter(path: Path | None, state: Mapping[str, Tensor], model: nn.Module) -> bool:
    """Whether a state is an adapter's: by its file's name, or as it has all of a model of PEFT that is not frozen.

    Args:
        path: the file that it is from, if it is.
        state: entries by name.
        model: the model that it is for.
    """
    if path is not None and path.name.startswith(ADAPTER_FILE):
        return True
    own = model.state_dict(keep_vars=True) if hasattr(model, "peft_config") else {}
    if own.keys() <= unwrapped_names(state, own).keys():
        return False
    try:
        places = adapter_places(state, model, "the state")
    except MismatchError:
        return False
    held = {id(own[place]) for place in places.values()}  # under all names of tied ones
    return not any(value.requires_grad and id(value) not in held for value in own.values())


def adapted_state(adapter: Mapping[str, Tensor], model: nn.Module, source: str) -> dict[str, Tensor]:
    """A model's own state with an adapter's entries in the place of its own.

    Args:
        adapter: entries of an adapter file.
        model: the base model with the adapter's modules in place.
        source: what an error calls the adapter.

    Raises:
        MismatchError: the model has no such entry, or several.
    """
    places = adapter_places(adapter, model, source)
    full = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    replaced = {id(full[place]) for place in places.values() if place in full}  # under all names of tied ones
    rest = {name: value for name, value in full.items() if id(value) not in replaced}
    return rest | {places[name]: value for name, value in adapter.items()}


def adapter_places(adapter: Iterable[str], model: nn.Module, source: str) -> dict[str, str]:
    """The model's name for each entry of an adapter: PEFT leaves the adapter's own ("default") out when it saves."""
    own: dict[str, Any] = model.state_dict()
    saved: dict[str, list[str]] = {}
    for name in own:
        saved.setdefault(_PROMPT.sub(_PROMPTS, _WHOLE.sub("", name)), []).append(name)
    names = {}
    for name in adapter:
        stem, dot, leaf = name.rpartition(".")
        within = [
            n
            for n in own
            if n.startswith(f"{stem}{dot}") and n.endswith(f".{leaf}") and n.count(".") == name.count(".") + 1
        ]
        places = saved.get(name) or ([name] if name in own else within) or [n for n in own if n.startswith(f"{name}.")]
        if len(places) != 1:
            remedy = "give the base model with this one adapter in place (peft.get_peft_model)"
            if name == _PROMPTS and places:
                remedy = "PEFT saved what they make of it, and not their weights: record the run by a RecorderCallback"
            kind = type(model).__name__
            raise MismatchError(f"{source} has {name}, which the model {kind} has as {places}: {remedy}")
        names[name] = places[0]
    return names
