"""Safe loading: files of tensors and plain values are read, and no file's own code is run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path, PosixPath, PurePosixPath
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from source_proj._errors import MismatchError, MissingFileError

__all__ = ["load_safetensors", "load_tensors", "require_loadable"]

# What scripts keep beside weights: holders of values, of which reading runs no code of the file's.
_SCALAR = np.float64(0).__reduce__()[0]  # what makes a number of NumPy, such as the best accuracy so far
_NUMBERS = [np.dtype(code) for code in ("?", *"bBhHiIlLqQefdFD")]
_PLAIN: list[Any] = [
    argparse.Namespace, PosixPath, PurePosixPath, _SCALAR, np.dtype, *{type(number) for number in _NUMBERS},
]  # fmt: skip
_MOST_EXPANDED = 16 << 20  # bytes of tensors beyond those stored: a mask may be saved as one row, expanded
_ZIP = b"PK\x03\x04"  # how a file of torch.save begins


def load_tensors(path: Path, remedy: str, *, mapped: bool = False, unpickle: bool = False) -> Any:
    """Read what :func:`torch.save` wrote, onto the CPU.

    Args:
        path: the file.
        remedy: what the reader of an error can do, as its last words.
        mapped: map the file into memory, so that a large one is read where it is used.
        unpickle: read other objects than tensors and plain values too, which runs code that the file contains.

    Raises:
        MissingFileError: there is no file.
        MismatchError: it is empty, cut short, corrupt, claims more than it has, or holds other objects.
    """
    if not path.is_file():
        raise MissingFileError(f"there is no file {str(path)!r}: {remedy}")
    try:
        with torch.serialization.safe_globals(_PLAIN):
            content = torch.load(path, map_location="cpu", weights_only=not unpickle, mmap=mapped and is_zipfile(path))
        _require_modest(content)
        return content
    except Exception as error:  # torch.load lets through whatever zip, pickle and its own readers raise
        raise MismatchError(f"{str(path)!r} {_trouble(path, error)}: {remedy}") from error


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        MismatchError: it is empty, cut short or corrupt.
    """
    try:
        return load_file(path)
    except Exception as error:  # that of the format, of the file system, or of a type that torch has not
        empty = path.is_file() and not path.stat().st_size
        what = "is empty" if empty else f"is no whole safetensors file ({error})"
        raise MismatchError(f"{str(path)!r} {what}: write it anew") from error


def require_loadable(content: object, what: str) -> None:
    """Find out now, and not when it is read, whether an object can be saved and read back safely.

    Raises:
        TypeError: it holds more than tensors and plain values.
    """
    file = BytesIO()
    torch.save(content, file)
    try:
        torch.load(BytesIO(file.getvalue()), weights_only=True)
    except UnpicklingError as error:
        raise TypeError(f"{what} holds more than tensors and plain values: {error}") from error


def _require_modest(content: object) -> None:
    """Refuse tensors that are far larger than what was stored of them: a few bytes can be expanded to any size.

    Raises:
        ValueError: they are.
    """
    expanded, seen, todo = 0, set[int](), [content]
    while todo:
        value = todo.pop()
        if id(value) in seen:  # a pickle may hold itself
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            todo.extend(value.values())
        elif isinstance(value, list | tuple):
            todo.extend(value)
        elif isinstance(value, Tensor) and value.layout == torch.strided and value.device.type != "meta":
            stored = value.untyped_storage().nbytes()
            expanded += max(0, value.numel() * value.element_size() - stored)
    if expanded > _MOST_EXPANDED:
        raise ValueError(f"its tensors claim {expanded} bytes more than it has")


def _trouble(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(len(_ZIP))
    if not start:
        return "is empty"
    if start == _ZIP and not is_zipfile(path):
        return "was cut short: it begins as a file of torch.save and has no end"
    said = str(error).split("WeightsUnpickler error:")[-1].strip().split("\n")[0]
    said = said.split(" Please use")[0]  # without advice to run foreign code
    return (
        "is corrupt, or holds other objects, and cannot be read as tensors and plain values alone "
        f"({type(error).__name__}: {said[:200]})"
    )
