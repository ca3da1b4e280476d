"""Numbers among a Trainer's arguments, without running what their file would run."""

from __future__ import annotations

import inspect
import pickletools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from torch import nn

__all__ = ["accumulated_undivided", "trainer_arguments"]

_CARD = re.compile(r"^- (label_smoothing_factor): ([0-9.eE+-]+)$", re.MULTILINE)
_CONSTANTS = {"NEWTRUE": 1.0, "NEWFALSE": 0.0}


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


def accumulated_undivided(arguments: Mapping[str, float], model: nn.Module | None) -> int:
    """Number of micro-batches whose gradients the Trainer summed where it should have averaged; else 1.

    It divides by their number only if the model's ``forward`` takes no further keywords, and otherwise hands the number
    of all labels on, for the loss to be divided by. A ``forward`` that takes keywords and keeps them from its loss is
    divided by neither. With label smoothing the Trainer computes the loss itself, and divides it.

    Args:
        arguments: see :func:`trainer_arguments`.
        model: the model that was trained; None if it is not known, which counts as averaged.
    """
    count = int(arguments.get("gradient_accumulation_steps", 1))
    if count == 1 or model is None or arguments.get("label_smoothing_factor"):
        return 1
    unwrapped: Any = model
    kind = type(unwrapped.get_base_model() if hasattr(model, "get_base_model") else model)
    forward = inspect.unwrap(kind.forward)
    accepts = getattr(kind, "accepts_loss_kwargs", None)
    if accepts is None:
        accepts = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(forward).parameters.values())
    uses = re.search(r"loss_function\([^()]*(\([^()]*\)[^()]*)*\*\*\w*kwargs", inspect.getsource(forward))
    return count if accepts and not uses else 1


def _numbers(file: Path) -> dict[str, float]:
    """Each text of a pickle that a number follows, as a key is followed by its value; empty where it is no archive."""
    try:
        with ZipFile(file) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            operations = list(pickletools.genops(archive.read(name)))
    except (BadZipFile, ValueError):
        return {}
    found: dict[str, float] = {}
    key: str | None = None
    for operation, argument, _ in operations:
        if operation.name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            continue
        value = _CONSTANTS.get(operation.name, argument)
        if key is not None and isinstance(value, int | float) and "GET" not in operation.name:
            found[key] = float(value)
        key = argument if isinstance(argument, str) and "UNICODE" in operation.name else None
    return found
