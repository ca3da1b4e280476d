"""Weights of a Trainer's checkpoint, under the names that the model has in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from source_proj._errors import MismatchError
from source_proj.integrations.trainer_folder import TrainerFolder
from source_proj.trajectory.layouts import listed, unwrapped_names

__all__ = ["model_of", "trainer_weights"]


def trainer_weights(folder: TrainerFolder, model: nn.Module | None) -> Path | Mapping[str, Tensor]:
    """The file with a checkpoint's weights; or the weights themselves, where the file has other names for them.

    For some models, such as mixtures of experts, transformers writes one file entry for each expert and has them as one
    parameter in memory. Such checkpoints are read by transformers itself, and are kept in memory, then in the bank.

    Args:
        folder: the checkpoint.
        model: the model that was trained; None if it is not known, which leaves the file as it is.
    """
    file = folder.weights
    if model is None or file.name.startswith("adapter_model.") or not hasattr(type(model), "from_pretrained"):
        return file
    own = model.state_dict()
    if set(unwrapped_names(dict.fromkeys(_names(file)), own)) <= set(own):
        return file
    loaded, report = type(model).from_pretrained(  # type: ignore[attr-defined]
        folder.path, local_files_only=True, output_loading_info=True, trust_remote_code=False
    )
    if report["missing_keys"]:
        missing = listed("it lacks", sorted(report["missing_keys"]))
        raise MismatchError(f"{str(file)!r} does not fit {type(model).__name__}: {missing}; give the model as trained")
    state: Mapping[str, Tensor] = loaded.state_dict()
    return state


def model_of(folder: Path) -> nn.Module:
    """The architecture that a checkpoint's ``config.json`` names, without memory for weights.

    Raises:
        ValueError: there is none, transformers has no such class, or it is not installed.
    """
    remedy = "give the model as model="
    if not (folder / "config.json").is_file():
        raise ValueError(f"{str(folder)!r} has no config.json that says which parameter has which number: {remedy}")
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"the order of parameters in optimizer.pt follows from the model: {remedy}, or install source-proj[hf]"
        ) from error
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    for name in config.architectures or ():
        kind = getattr(transformers, name, None)
        if kind is not None:
            with torch.device("meta"):
                model: nn.Module = kind(config)
            return model
    raise ValueError(f"transformers has no model {config.architectures} ({str(folder)!r}): {remedy}")


def _names(file: Path) -> list[str]:
    """Names of the entries, without reading them; of a pickled file none.

    Raises:
        MismatchError: the file is empty, cut short or damaged.
    """
    if not file.name.endswith((".index.json", ".safetensors")):
        return []
    try:
        if file.name.endswith(".index.json"):
            return list(json.loads(file.read_text(encoding="utf-8"))["weight_map"])
        with safe_open(file, framework="pt") as entries:
            return list(entries.keys())
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise MismatchError(f"{str(file)!r} is damaged ({type(error).__name__}: {error}): copy it anew") from error
