"""Safe loading: files of tensors and plain values are read, and no file's own code is run."""

from __future__ import annotations

import argparse
from io import BytesIO
from pathlib import Path, PosixPath, PurePosixPath
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from source_proj._errors import MismatchError

__all__ = ["load_safetensors", "load_tensors", "require_loadable"]

# What scripts keep beside weights: holders of values, of which reading runs no code of the file's.
_PLAIN: list[Any] = [argparse.Namespace, PosixPath, PurePosixPath]
_ZIP = b"PK\x03\x04"  # how a file of torch.save begins


def load_tensors(path: Path, remedy: str, *, mapped: bool = False, unpickle: bool = False) -> Any:
    """Read what :func:`torch.save` wrote, onto the CPU.

    Args:
        path: the file.
        remedy: what the reader of an error can do, as its last words.
        mapped: map the file into memory, so that a large one is read where it is used.
        unpickle: read other objects than tensors and plain values too, which runs code that the file contains.

    Raises:
        FileNotFoundError: there is no file.
        MismatchError: it is empty, cut short, corrupt, or holds other objects.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}: {remedy}")
    try:
        with torch.serialization.safe_globals(_PLAIN):
            return torch.load(path, map_location="cpu", weights_only=not unpickle, mmap=mapped and is_zipfile(path))
    except Exception as error:  # torch.load lets through whatever zip, pickle and its own readers raise
        raise MismatchError(f"{str(path)!r} {_trouble(path, error)}: {remedy}") from error


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        MismatchError: it is empty, cut short or corrupt.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        what = "is empty" if not path.stat().st_size else f"is no whole safetensors file ({error})"
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


def _trouble(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(len(_ZIP))
    if not start:
        return "is empty"
    if start == _ZIP and not is_zipfile(path):
        return "was cut short: it begins as a file of torch.save and has no end"
    said = str(error).split("WeightsUnpickler error:")[-1].strip().split("\n")[0]  # without advice to run foreign code
    return (
        "is corrupt, or holds other objects, and cannot be read as tensors and plain values alone "
        f"({type(error).__name__}: {said[:200]})"
    )
