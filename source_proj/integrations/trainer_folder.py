"""What a Trainer of transformers leaves in one ``checkpoint-N`` folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from source_proj._errors import MismatchError
from source_proj._io.loading import load_tensors
from source_proj.trajectory.layouts import WEIGHTS, sharded_state, weights_file

__all__ = ["NamedState", "TrainerFolder", "logged", "read_tensors"]

_COUNTED = ("total_flos", "num_input_tokens_seen")


@dataclass(frozen=True)
class TrainerFolder:
    """One ``checkpoint-N`` folder.

    Attributes:
        path: the folder.
        step: optimizer steps taken until then; with gradient accumulation, several micro-batches each.
        max_steps: steps that the run was planned for at that time.
        history: what was logged until then, also before a resume.
        grown: what ``trainer_state.json`` counts: operations, tokens; by name.
    """

    path: Path
    step: int
    max_steps: int
    history: Sequence[Mapping[str, Any]]
    grown: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, step: int) -> TrainerFolder:
        """Read a folder's ``trainer_state.json``.

        Raises:
            FileNotFoundError: it has none.
            MismatchError: it is of another step, or no Trainer wrote it.
        """
        file = path / "trainer_state.json"
        if not file.is_file():
            raise FileNotFoundError(f"{str(path)!r} has no trainer_state.json: give a folder that a Trainer wrote")
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
            there = int(state["global_step"])
            grown = {name: float(state[name]) for name in _COUNTED if state.get(name)}
            found = cls(path, there, int(state["max_steps"]), list(state["log_history"]), grown)
        except (ValueError, KeyError, TypeError) as error:
            raise MismatchError(
                f"{str(file)!r} was not written by a Trainer ({type(error).__name__}: {error})"
            ) from error
        if there != step:
            raise MismatchError(f"{str(file)!r} is of step {there}, and its folder is named after step {step}")
        return found

    @property
    def weights(self) -> Path:
        """The file that holds the weights, or the index of several such files.

        Raises:
            FileNotFoundError: there is none.
        """
        file = weights_file(self.path)
        if file is None:
            why = sharded_state(self.path) or "it has no weights to read"
            raise FileNotFoundError(f"{str(self.path)!r} holds none of {', '.join(WEIGHTS)}: {why}")
        return file

    @property
    def saved_optimizer(self) -> Path:
        """``optimizer.pt``.

        Raises:
            ValueError: there is none, as where the Trainer saved the model alone.
        """
        file = self.path / "optimizer.pt"
        if not file.is_file():
            raise ValueError(
                f"{str(self.path)!r} has no optimizer.pt ({sharded_state(self.path) or 'save_only_model=True?'}), so "
                "nothing says how Adam scaled gradients: give preconditioner='none' (--preconditioner none on the "
                "command line), which takes gradients as they are, as if each step had gone along its own; of a run of "
                "SGD give optimizer=source_proj.SGD(...)"
            )
        return file

    @cached_property
    def scheduler(self) -> Mapping[str, Any]:
        """State of the learning-rate scheduler; empty where the Trainer saved the model alone."""
        file = self.path / "scheduler.pt"
        return read_tensors(file) if file.is_file() else {}


def logged(history: Sequence[Mapping[str, Any]], key: str) -> dict[int, float]:
    """What was logged under a key, by the step it was logged at; entries without it, as of evaluations, don't count.

    Example:
        >>> logged([{"step": 2, "loss": 0.5}, {"step": 2, "eval_loss": 0.7}, {"step": 4, "loss": 0.25}], "loss")
        {2: 0.5, 4: 0.25}
    """
    return {int(entry["step"]): float(entry[key]) for entry in history if key in entry and "step" in entry}


def read_tensors(file: Path) -> dict[str, Any]:
    """Read a dict of tensors and plain values; what holds other objects, and could run foreign code, is refused."""
    content = load_tensors(file, "give the folder as the Trainer wrote it", mapped=True)  # a large optimizer's moments
    if not isinstance(content, dict):
        raise MismatchError(f"{str(file)!r} holds a {type(content).__name__}, and a dict was expected")
    return content


class NamedState(Mapping[str, Any]):
    """An optimizer's state in a file, read when it is asked for, with parameter names put to its numbers.

    They are where :class:`torch.optim.Optimizer` has them if it is made from named parameters: ``param_names`` in each
    of ``param_groups``.

    Args:
        file: what :func:`torch.save` wrote of ``optimizer.state_dict()``.
        names: parameter names of each group, in its order.
    """

    def __init__(self, file: Path, names: Sequence[Sequence[str]]) -> None:
        self.file = file
        self.names = tuple(names)

    def __repr__(self) -> str:
        return f"NamedState({str(self.file)!r})"

    def __getitem__(self, key: str) -> Any:
        value = read_tensors(self.file)[key]
        if key != "param_groups":
            return value
        return [{**group, "param_names": list(names)} for group, names in zip(value, self.names, strict=True)]

    def __iter__(self) -> Iterator[str]:
        return iter(("state", "param_groups"))

    def __len__(self) -> int:
        return 2
