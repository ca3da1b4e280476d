"""What a bank notes of the model and the data that it was made with, to recognise those that it is asked with."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from source_proj._errors import MismatchError
from source_proj.bank.base_weights import BasePrint, require_base
from source_proj.task import Task
from source_proj.trajectory import Checkpoint

__all__ = ["Notes", "modules_of"]

_NAMED = 5  # kinds of modules in a message


@dataclass(frozen=True)
class Notes:
    """No row depends on them, and no fingerprint covers them.

    Attributes:
        parameter_choice: in words, which parameters are attributed.
        modules: how many modules of each kind the model has, see `modules_of`; empty where that is not known.
        columns: of a training set that was a table of numbers, their names in order; else empty.
        task_code: hashes of the code of a task of one's own, see `Task.code`; else empty.
        base: what tells the weights that no checkpoint holds, of an adapter's base model, from others; else empty.
    """

    parameter_choice: str
    modules: Mapping[str, int]
    columns: tuple[str, ...] = ()
    base: BasePrint = field(default_factory=dict)
    task_code: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As the root's attributes hold them."""
        return {
            "parameter_choice": self.parameter_choice,
            "modules": dict(self.modules),
            "columns": list(self.columns),
            **({"task_code": dict(self.task_code)} if self.task_code else {}),
            **({"base": {name: list(numbers) for name, numbers in self.base.items()}} if self.base else {}),
        }

    @classmethod
    def from_json(cls, attributes: Mapping[str, Any]) -> Notes:
        """Read them among the root's attributes.

        Raises:
            ValueError: one is of another type; names it with its value.
        """
        choice, modules, columns = (attributes.get(name) for name in ("parameter_choice", "modules", "columns"))
        if not isinstance(choice, str):
            raise ValueError(f"parameter_choice is {choice!r}, not a text")
        modules, columns = modules or {}, columns or []
        if not isinstance(modules, Mapping) or not all(type(count) is int for count in modules.values()):
            raise ValueError(f"modules is {modules!r}, not numbers by name")
        if not isinstance(columns, list) or not all(isinstance(name, str) for name in columns):
            raise ValueError(f"columns is {columns!r}, not a list of names")
        code = attributes.get("task_code") or {}
        if not isinstance(code, Mapping) or not all(isinstance(each, str) for each in code.values()):
            raise ValueError(f"task_code is {code!r:.200}, not texts by name")
        return cls(choice, dict(modules), tuple(columns), _base_of(attributes.get("base") or {}), dict(code))

    def require_columns(self, columns: Sequence[str], where: str) -> None:
        """Compare a table with the one that the bank was begun with: rows are made of numbers in their order.

        Raises:
            MismatchError: both are tables, of other columns or in another order; names both.
        """
        if self.columns and columns and self.columns != tuple(columns):
            raise MismatchError(
                f"the bank {where} was begun with the columns {list(self.columns)}, got {list(columns)}: give them "
                "in that order to go on with it, or build another bank"
            )

    def require_base(self, model: nn.Module, checkpoints: Iterable[Checkpoint], where: str) -> None:
        """Compare a model's weights with those that the bank was made with and the checkpoints do not hold.

        Raises:
            MismatchError: they are others, as of another base model under an adapter; names the first.
        """
        require_base(model, self.base, checkpoints, where)

    def warn_of_other_modules(self, model: nn.Module, stacklevel: int = 4) -> None:
        """Compare a model with the one that the bank was made with, whose parameters are of the same names and shapes.

        Args:
            model: what is asked, or makes rows.
            stacklevel: whose line is named: 2 is the caller's.

        Warns:
            UserWarning: it has modules of other kinds, or another number of some; names them.
        """
        there, here = Counter(self.modules), Counter(modules_of(model))
        if there and there != here:
            missing, new = (" and ".join(_counted(part)) or "none" for part in (there - here, here - there))
            warnings.warn(
                f"the model is not made like the one that the bank was built with: that one has {missing} where this "
                f"one has {new}. Its answers, rows and scores are those of another model if that is more than a name",
                UserWarning,
                stacklevel=stacklevel,
            )

    def warn_of_other_code(self, task: Task, stacklevel: int = 4) -> None:
        """Compare the code of a task of one's own with that of the one that the bank was built with.

        Args:
            task: the task, whose functions have the same names.
            stacklevel: whose line is named: 2 is the caller's.

        Warns:
            UserWarning: a function that makes rows is another one now; names it.
        """
        here = task.code()
        if here.get("python") != self.task_code.get("python"):
            return
        others = sorted(key for key in here.keys() & self.task_code.keys() if here[key] != self.task_code[key])
        if others:
            warnings.warn(
                f"the code of the task's {' and '.join(others)}, or a value that it uses, was another when the bank "
                "was built, and rows are that one's: if more than its wording changed, build another bank",
                UserWarning,
                stacklevel=stacklevel,
            )


def _base_of(base: Any) -> BasePrint:
    """What the root says of a base model.

    Raises:
        ValueError: it is no pair of numbers by name.
    """
    if not isinstance(base, Mapping) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(number, float | int) for number in pair)
        for pair in base.values()
    ):
        raise ValueError(f"base is {base!r:.200}, not pairs of numbers by name")
    return {str(name): (float(pair[0]), float(pair[1])) for name, pair in base.items()}


def modules_of(model: nn.Module) -> dict[str, int]:
    """How many modules of each kind a model has, but for containers, losses, and what does nothing in evaluation.

    Example:
        >>> modules_of(nn.Sequential(nn.Linear(2, 3), nn.Dropout(), nn.Tanh(), nn.Linear(3, 2)))
        {'Linear': 2, 'Tanh': 1}
    """
    kinds = Counter(
        type(module).__name__
        for module in model.modules()
        if not any(module.children()) and not isinstance(module, _NOTHING)
    )
    return dict(sorted(kinds.items()))


_NOTHING = (
    nn.modules.dropout._DropoutNd, nn.modules.loss._Loss, nn.Identity, nn.Sequential, nn.ModuleList, nn.ModuleDict
)  # fmt: skip


def _counted(kinds: Counter[str]) -> Sequence[str]:
    listed = [f"{count} {kind}" for kind, count in sorted(kinds.items())]
    return [*listed[:_NAMED], *(["others"] if len(listed) > _NAMED else [])]
