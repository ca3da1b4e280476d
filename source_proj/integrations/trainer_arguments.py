"""What a Trainer's arguments say, without running what their file would run."""

from __future__ import annotations

import inspect
import json
import pickletools
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from torch import nn

from source_proj._errors import MismatchError
from source_proj.trajectory import Optimizer
from source_proj.trajectory.optimizers.describe import optimizer_of_trainer

__all__ = [
    "accumulated_undivided",
    "check_trainer_optimizer",
    "trainer_arguments",
    "trainer_optimizer",
    "trainer_version",
    "version_numbers",
]

_CARD = re.compile(r"^- (label_smoothing_factor): ([0-9.eE+-]+)$", re.MULTILINE)
_CARD_VERSION = re.compile(r"^- Transformers:? ([0-9]\S*)$", re.MULTILINE)
_DIVIDING = (4, 46)  # before this version of transformers the Trainer always divided by accumulated batches
_NUMBERING = ("BINPUT", "LONG_BINPUT", "MEMOIZE")
_CLASSES = ("GLOBAL", "BINGET", "LONG_BINGET")
_CONSTANTS = {"NEWTRUE": 1.0, "NEWFALSE": 0.0}
_WITHOUT = {"max_grad_norm": 0.0}  # arguments whose None is as good as a number


def trainer_arguments(checkpoint: Path) -> dict[str, float]:
    """The arguments that are numbers, of a ``checkpoint-N`` folder; empty where neither of the two files is there.

    They are read from ``training_args.bin``, a pickle that is looked through and not loaded; else from the model card,
    ``README.md``, which names those that matter for the loss.

    Args:
        checkpoint: the folder; a card may also lie in the one above it.
    """
    file = checkpoint / "training_args.bin"
    if file.is_file():
        return _numbers(file)
    for card in (checkpoint / "README.md", checkpoint.parent / "README.md"):
        if card.is_file():
            return {"label_smoothing_factor": 0.0} | {
                name: float(value) for name, value in _CARD.findall(card.read_text(encoding="utf-8"))
            }
    return {}


def trainer_version(checkpoint: Path) -> str | None:
    """The version of transformers whose Trainer wrote a checkpoint; None where nothing says so, as of adapters.

    Args:
        checkpoint: the ``checkpoint-N`` folder, with a ``config.json``; else a model card counts, also one above it.

    Raises:
        MismatchError: ``config.json`` is damaged.
    """
    file = checkpoint / "config.json"
    if file.is_file():
        try:
            version = json.loads(file.read_text(encoding="utf-8")).get("transformers_version")
        except (ValueError, AttributeError) as error:
            raise MismatchError(f"{str(file)!r} is damaged ({type(error).__name__}: {error}): copy it anew") from error
        if version:
            return str(version)
    for card in (checkpoint / "README.md", checkpoint.parent / "README.md"):
        told = _CARD_VERSION.search(card.read_text(encoding="utf-8")) if card.is_file() else None
        if told:
            return told[1]
    return None


def version_numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version, to be compared; () of one without.

    >>> version_numbers("5.10.0.dev0")
    (5, 10)
    """
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def trainer_optimizer(checkpoint: Path) -> type[Optimizer] | None:
    """The kind of optimizer that a run's ``optim=`` names; None where its arguments are not there.

    Args:
        checkpoint: the ``checkpoint-N`` folder.

    Raises:
        ValueError: it is not described.
    """
    name = _text(checkpoint / "training_args.bin", "optim")
    return None if name is None else optimizer_of_trainer(name)


def check_trainer_optimizer(checkpoint: Path) -> None:
    """Refuse a run whose ``optim=`` trains with an optimizer that is not described.

    Nothing is said of a run whose arguments are not there, or whose optimizer was made outside of the Trainer.

    Args:
        checkpoint: the ``checkpoint-N`` folder.

    Raises:
        ValueError: names the optimizer, the reason, and what can be done.
    """
    name = _text(checkpoint / "training_args.bin", "optim")
    if name is None:
        return
    try:
        optimizer_of_trainer(name)
    except ValueError as error:
        raise ValueError(
            f"{checkpoint.name}: {error}; or, if the Trainer was given another optimizer than this "
            "(optimizers=), say how it acts by optimizer="
        ) from error


def accumulated_undivided(arguments: Mapping[str, float], model: nn.Module | None, version: str | None = None) -> int:
    """Number of micro-batches whose gradients the Trainer summed where it should have averaged; else 1.

    It divides by their number only if the model's ``forward`` takes no further keywords, and otherwise hands the number
    of all labels on, for the loss to be divided by. A ``forward`` that takes keywords and keeps them from its loss is
    divided by neither. With label smoothing the Trainer computes the loss itself, and divides it.

    Args:
        arguments: see :func:`trainer_arguments`.
        model: the model that was trained; None if it is not known, which counts as averaged.
        version: of the transformers that it was trained with; None if that is not known, which counts as one of today.
    """
    count = int(arguments.get("gradient_accumulation_steps", 1))
    if version and version_numbers(version) < _DIVIDING:
        return 1
    if count == 1 or model is None or arguments.get("label_smoothing_factor"):
        return 1
    unwrapped: Any = model
    unwrapped = getattr(unwrapped, "_orig_mod", unwrapped)  # of torch.compile
    kind = type(unwrapped.get_base_model() if hasattr(unwrapped, "get_base_model") else unwrapped)
    forward = inspect.unwrap(kind.forward)
    accepts = getattr(kind, "accepts_loss_kwargs", None)
    if accepts is None:
        accepts = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(forward).parameters.values())
    uses = re.search(r"loss_function\([^()]*(\([^()]*\)[^()]*)*\*\*\w*kwargs", inspect.getsource(forward))
    return count if accepts and not uses else 1


def _numbers(file: Path) -> dict[str, float]:
    """Each text of a pickle that a number follows, as a key is followed by its value; empty where it is no archive."""
    numbers: dict[str, float] = {}
    for (name, key), (operation, argument) in pairwise(_operations(file)):
        value = _CONSTANTS.get(operation, _WITHOUT.get(key) if operation == "NONE" else argument)
        if "UNICODE" in name and isinstance(value, int | float) and "GET" not in operation:
            numbers[key] = float(value)
    return numbers


def _text(file: Path, key: str) -> str | None:
    """The text that follows a key: its value, or what an enumeration's class, which comes first, makes its member of.

    None where there is no such file, or another value.
    """
    operations = _operations(file) if file.is_file() else []
    for place, (operation, argument) in enumerate(operations):
        if argument == key and "UNICODE" in operation:
            value = operations[place + 1 : place + 3]
            if value and value[0][0] in _CLASSES:
                value = value[1:]
            return str(value[0][1]) if value and "UNICODE" in value[0][0] else None
    return None


def _operations(file: Path) -> list[tuple[str, Any]]:
    """A pickle's operations with their arguments, but for those that only number its objects."""
    try:
        with ZipFile(file) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            operations = list(pickletools.genops(archive.read(name)))
    except (BadZipFile, ValueError):
        return []
    return [(operation.name, argument) for operation, argument, _ in operations if operation.name not in _NUMBERING]
