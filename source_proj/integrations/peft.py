"""Fine-tuning of some parameters: LoRA and other adapters, frozen bodies."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from source_proj._errors import MismatchError
from source_proj.trajectory.adapters import ADAPTER_FILE

__all__ = ["require_adapter", "trainable_parameters"]


def trainable_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that require a gradient, for ``build(..., parameters=trainable_parameters(model))``.

    With an adapter of PEFT in place (``peft.get_peft_model``) these are the adapter's. Its checkpoints
    (``adapter_model.safetensors``) hold these alone; the base model's weights are then taken from the model that is
    passed, so it must be the same in the build and for queries: they are part of no checkpoint, and of no hash.

    Raises:
        ValueError: all parameters are frozen, as after loading an adapter for inference.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 1))
        >>> trainable_parameters(model)
        ['1.weight', '1.bias']
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not names:
        raise ValueError(
            f"no parameter of {type(model).__name__} requires a gradient: load the adapter with is_trainable=True"
        )
    return names


def require_adapter(folder: Path, model: nn.Module) -> None:
    """Refuse a model without the adapter that a checkpoint's folder holds, or with it frozen.

    Raises:
        MismatchError: says how to load it.
    """
    if not any(folder.glob(f"{ADAPTER_FILE}*")):
        return
    how = f"peft.AutoPeftModelFor….from_pretrained({str(folder)!r}, is_trainable=True)"
    if not hasattr(model, "peft_config"):
        raise MismatchError(
            f"{str(folder)!r} holds an adapter of PEFT, and the model, a {type(model).__name__}, has none: give the "
            f"model with its adapter, {how}; on the command line leave --hf-model out"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise MismatchError(f"no parameter of {type(model).__name__} requires a gradient: load the adapter by {how}")
