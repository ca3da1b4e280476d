"""Fine-tuning of some parameters: LoRA and other adapters, frozen bodies."""

from __future__ import annotations

from torch import nn

__all__ = ["trainable_parameters"]


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
