"""Where a Trainer's trajectory ends: at the checkpoint whose weights the run's final model has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from source_proj.integrations.trainer_folder import TrainerFolder
from source_proj.trajectory import Checkpoint
from source_proj.trajectory.layouts import weights_file

__all__ = ["step_of_final_model"]


def step_of_final_model(
    directory: Path, folders: Sequence[TrainerFolder], model: nn.Module | None
) -> tuple[int, str | None]:
    """Find the checkpoint that became the model that people use, by comparing weights.

    With ``load_best_model_at_end`` it is an earlier one than the last. The final model is what ``save_model`` wrote
    into the run's directory, or else the model that was given, if it has the weights of a checkpoint.

    Args:
        directory: the Trainer's ``output_dir``.
        folders: the checkpoints, in order of steps.
        model: the model that was given, with whatever weights it has.

    Returns:
        The step to end at; and what a user should know of it, None where it goes without saying.
    """
    last = folders[-1].step
    saved = weights_file(directory)
    if saved is not None:
        what, state = f"the model in {str(directory)!r} ({saved.name})", _load(saved)
    elif model is not None and not any(parameter.is_meta for parameter in model.parameters()):
        what, state = "the model that was given", _tensors(model.state_dict())
    else:
        return last, None
    for folder in reversed(folders):
        if _same(state, _load(folder.weights)):
            if folder.step == last:
                return last, None
            return folder.step, (
                f"{what} has the weights of {folder.path.name} (load_best_model_at_end?), so the trajectory ends there "
                f"and not at step {last}; steps=[...] chooses otherwise"
            )
    if saved is None:
        return last, None  # such as a model that is to be filled from the checkpoints
    return last, (
        f"{what} has the weights of none of the checkpoints: the trajectory ends at step {last}, and scores are about "
        "the model of that step"
    )


def _load(file: Path) -> dict[str, Tensor]:
    return Checkpoint(file, step=0).load()


def _tensors(state: Mapping[str, object]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _same(state: Mapping[str, Tensor], checkpoint: Mapping[str, Tensor]) -> bool:
    """Whether all that both hold is equal, and that is all of the checkpoint but for what is tied in the other."""
    shared = [name for name in checkpoint if name in state]
    return bool(shared) and all(torch.equal(state[name].to("cpu"), checkpoint[name]) for name in shared)
