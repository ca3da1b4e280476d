"""The shapes that saved weights come in: folders, dicts around a state, names that wrappers changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from source_proj._errors import MismatchError

__all__ = [
    "WEIGHTS",
    "averaged_keys",
    "is_count",
    "listed",
    "model_state",
    "sharded_state",
    "unwrapped_names",
    "weights_file",
]

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.bin",
    "pytorch_model_fsdp.bin",
)
"""Files that a folder of transformers, PEFT or accelerate keeps its weights in."""

_Value = TypeVar("_Value")
_STATES = (
    "model", "state_dict", "model_state_dict", "net", "module", "params", "network", "model_state", "net_state_dict",
    "weights",
)  # fmt: skip
_AVERAGED = ("ema", "swa", "averag")  # in the name of an entry: weights that are means over training
_WRAPPED = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_COUNT = "n_averaged"  # of torch's AveragedModel: bookkeeping beside the weights
_TRAINED = "current_model_state"  # of Lightning's WeightAveraging, which puts the averages in the state's place
_DEEPEST = 16  # levels of dicts around a state
_LISTED = 8  # names spelled out in an error before it is cut short


def weights_file(folder: Path) -> Path | None:
    """The file that holds a folder's weights, or the index of several such files; None where there is none."""
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def sharded_state(folder: Path) -> str | None:
    """Who cut a folder's state into pieces, and what puts them together; None if nobody did."""
    if (folder / ".metadata").is_file() and any(folder.glob("*.distcp")):
        return (
            "torch.distributed.checkpoint cut it into pieces: put them together by "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} FILE.pt"
        )
    pieces = next(iter(sorted(folder.glob("pytorch_model_fsdp_*"))), None)
    if pieces is not None:
        return f"FSDP cut it into pieces: put them together by accelerate merge-weights {pieces} {folder}"
    if (folder / "zero_to_fp32.py").is_file() or any(folder.glob("global_step*/*_model_states.pt")):
        return (
            f"DeepSpeed cut it into pieces: put them together by python {folder / 'zero_to_fp32.py'} {folder} {folder}"
        )
    return None


def model_state(content: object, source: str, key: str | None = None) -> dict[str, Tensor]:
    """Return the state of a model inside what was read.

    Args:
        content: a state, names to tensors, or a dict that holds one under a name that people use.
        source: what an error calls it.
        key: the entry that holds the state; default: the only one that does, or the one with a name that is usual.

    Raises:
        MismatchError: there is no state, or several, of which none is meant more than the others.
    """
    if not isinstance(content, Mapping):
        raise MismatchError(f"{source} must hold a model's state_dict, names to tensors, but has a {_kind(content)}")
    if key is not None:
        if key not in content:
            raise MismatchError(f"{source} has no entry {key!r}, only {_listed_names(content)}")
        return model_state(content[key], f"{key!r} of {source}")
    chosen = _entry(content, source)
    if chosen is not None:
        if source.count(" of ") > _DEEPEST:
            raise MismatchError(f"{source} holds dicts in dicts: save the model's state_dict() alone")
        return model_state(content[chosen], f"{chosen!r} of {source}")
    foreign = [repr(name) for name, value in content.items() if not _is_plain(name, value)]
    if content and not foreign:
        return dict(content)
    found = listed("entries that are no plain tensors with names", foreign) or "no entry"
    raise MismatchError(f"{source} must hold a model's state_dict, names to tensors, but has {found}")


def averaged_keys(content: object) -> list[str]:
    """Entries with averaged weights that stand beside those that :func:`model_state` takes."""
    if not isinstance(content, Mapping):
        return []
    if _TRAINED in content:
        return ["state_dict"]
    states = [name for name in content if _is_state(content[name])]
    averaged = [name for name in states if _is_averaged(name)]
    return averaged if len(averaged) < len(states) else []


def unwrapped_names(state: Mapping[str, _Value], own: Iterable[str]) -> dict[str, _Value]:
    """The entries of a state under the names that a model has, whichever of the two was wrapped.

    DistributedDataParallel, torch.compile, FSDP and AveragedModel put parts into every name; a module that holds the
    model puts its attribute before them. Names that fit are left alone, and so is what fits no name.

    Args:
        state: names to tensors, or to anything else.
        own: the model's names.

    Example:
        >>> import torch
        >>> list(unwrapped_names({"_orig_mod.module.0.bias": torch.zeros(1)}, ["0.bias"]))
        ['0.bias']
        >>> list(unwrapped_names({"0.bias": torch.zeros(1)}, ["module.0.bias", "n_averaged"]))
        ['module.0.bias']
    """
    names = list(own)
    places: dict[str, list[str]] = {}
    for name in names:
        places.setdefault(_bare(name), []).append(name)
    strangers = Counter(_bare(name) for name in state if name not in names)
    fitted: dict[str, _Value] = {}
    for name, value in state.items():
        bare = _bare(name)
        candidates = [place for place in places.get(bare, ()) if place not in state]
        is_clear = name not in names and len(candidates) == 1 == strangers[bare]
        fitted[candidates[0] if is_clear else name] = value
    counts = [name for name in fitted if name not in names and is_count(name)]
    if len(counts) == len(set(fitted) - set(names)):
        fitted = {name: value for name, value in fitted.items() if name not in counts}
    prefix = _common_prefix(fitted, names)
    return {name.removeprefix(prefix): value for name, value in fitted.items()}


def is_count(name: str) -> bool:
    """Whether an entry is what AveragedModel counts, and no weight."""
    return _bare(name) == _COUNT


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def _common_prefix(state: Mapping[str, object], names: list[str]) -> str:
    """What stands before every name of a state, where the rest are all names of the model."""
    if not state or not names or any(name in names for name in state):
        return ""
    known, first = set(names), next(iter(state))
    cuts = (first[: place + 1] for place, letter in enumerate(first) if letter == ".")
    fits = (p for p in cuts if all(name.startswith(p) and name.removeprefix(p) in known for name in state))
    return next(fits, "")


def _entry(content: Mapping[Any, Any], source: str) -> Any:
    """The entry that holds the state; None where the content is one itself."""
    if _TRAINED in content:
        return _TRAINED
    usual = [name for name in _STATES if isinstance(content.get(name), Mapping)]
    if len(usual) > 1:
        raise MismatchError(f"{source} holds several states ({', '.join(usual)}): give the one that is meant by key=")
    if usual:
        return usual[0]
    states = [name for name in content if _is_state(content[name])]
    trained = [name for name in states if not _is_averaged(name)] or states
    if len(trained) > 1:
        raise MismatchError(
            f"{source} holds several states ({', '.join(map(str, trained))}): give the one that is meant by key="
        )
    return trained[0] if trained else None


def _is_state(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(entry, Tensor) for entry in value.values())


def _is_plain(name: object, value: object) -> bool:
    """Whether it is a name, and a tensor with all its numbers in memory: not sparse, quantized, nested or empty."""
    if not (isinstance(name, str) and isinstance(value, Tensor)):
        return False
    return value.layout == torch.strided and value.device.type != "meta" and not (value.is_quantized or value.is_nested)


def _is_averaged(name: object) -> bool:
    return any(part in str(name).lower() for part in _AVERAGED)


def _kind(content: object) -> str:
    return type(content).__name__


def _listed_names(content: Mapping[Any, Any]) -> str:
    return ", ".join(map(str, list(content)[:_LISTED])) or "none"


def listed(label: str, names: list[str]) -> str:
    """Spell out the first names after a label; nothing for no names."""
    if not names:
        return ""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{label}: {', '.join(names[:_LISTED])}{more}"
