"""What `build` and `Bank.append` are called with, refused by name before anything is written."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from source_proj.sketch import Sketch
from source_proj.task import Task
from source_proj.trajectory import Recorder, Trajectory
from source_proj.trajectory.placement import require_shapes
from source_proj.trajectory.recording.run_files import recorders_own

__all__ = ["require_arguments", "require_device"]

_KINDS: dict[str, tuple[type, str]] = {
    "model": (nn.Module, "give the module itself, of the architecture that was trained; checkpoints bring the weights"),
    "task": (Task, "give an instance, such as Classification()"),
    "trajectory": (Trajectory, "give Trajectory([Checkpoint(...), ...]), one checkpoint or many"),
    "sketch": (Sketch, "give Sketch(dim=...), or leave it out for the default"),
}


def require_arguments(**arguments: Any) -> None:
    """Refuse a model, task, trajectory or sketch that is something else, and a model whose shapes are not known yet.

    Raises:
        TypeError, ValueError: names the argument, what was got and the remedy.
    """
    for name, value in arguments.items():
        kind, remedy = _KINDS[name]
        if not isinstance(value, kind):
            remedy = (_trajectory_of(value) if kind is Trajectory else None) or remedy
            got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
            raise TypeError(f"{name} must be a {kind.__name__}, got {'None' if value is None else got}; {remedy}")
        if isinstance(value, nn.Module):
            require_shapes(value)
            _warn_of_gradient_hooks(value)


def _warn_of_gradient_hooks(model: nn.Module) -> None:
    """Say so where training changed a gradient between backward and step: an example's own gradient is taken before."""
    hooked = [name for name, parameter in model.named_parameters() if parameter._backward_hooks]
    if hooked:
        more = f" and {len(hooked) - 3} others" if len(hooked) > 3 else ""
        warnings.warn(
            f"the gradients of {', '.join(hooked[:3])}{more} pass through register_hook in training, and examples' own "
            "are taken as they are before: freeze what the hook holds still, or leave it out by parameter_weights=",
            UserWarning,
            stacklevel=4,
        )


def _trajectory_of(value: Any) -> str | None:
    """How a trajectory is made of a Recorder, or of a folder's name; None for what makes none."""
    if isinstance(value, Recorder):
        return "give recorder.trajectory(), what it has recorded"
    if not isinstance(value, str | Path):
        return None
    named = f"({str(value)!r})"
    if recorders_own(Path(value)):
        return f"give Trajectory.from_recorder{named}"
    return f"give Trajectory.from_recorder{named}, or from_hf_trainer{named} or from_lightning{named}, by who wrote it"


def require_device(device: torch.device | str | None) -> None:
    """Refuse a device that this machine or this torch lacks, or that has no numbers, as "meta".

    Raises:
        ValueError: names it, and says what torch says of it.
    """
    if device is None:
        return
    try:
        torch.zeros((), dtype=torch.uint8, device=device).item()
    except (RuntimeError, AssertionError) as error:  # an AssertionError where torch was compiled without CUDA
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"device {str(device)!r} cannot be used here ({reason}); give one that torch has, such as 'cpu', or none "
            "to stay where the model is"
        ) from error
