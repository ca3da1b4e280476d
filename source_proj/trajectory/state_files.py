"""Files that hold a model's state: which they are, and how they are read."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from source_proj._errors import MismatchError, MissingFileError
from source_proj._io.json_records import read_json
from source_proj._io.loading import load_safetensors, load_tensors
from source_proj.trajectory.layouts import WEIGHTS, model_state, sharded_state, weights_file

__all__ = ["checked_path", "read_state", "state_files", "whole_path"]

_INDEX = ".index.json"  # behind the type of a state's files, transformers' name for the list of them
_INDEXED = (".safetensors", ".bin")
_INDEXES = tuple(kind + _INDEX for kind in _INDEXED)
_PIECE = re.compile(r"-\d{5}-of-(\d{5})(?=\.)")  # in the name of one of them
_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pt.tar", ".pth.tar")
_LISTED = 8  # names spelled out in an error before it is cut short


def checked_path(path: Path | None) -> Path:
    """The file of a path, or of the folder that it leads to.

    Raises:
        MissingFileError: there is no file, or a folder holds no weights, or pieces of them.
        MismatchError: its name says nothing about what it holds.
    """
    if path is not None and path.is_dir():
        file = weights_file(path)
        if file is None:
            raise MissingFileError(
                f"checkpoint {str(path)!r} is a directory that holds none of {', '.join(WEIGHTS)}: "
                f"{sharded_state(path) or 'give the file that holds the state_dict'}"
            )
        path = file
    if path is None or not path.is_file():
        raise MissingFileError(f"checkpoint file {str(path)!r} does not exist: give the one that holds the state_dict")
    if not path.name.endswith((*_TORCH_SUFFIXES, ".safetensors", *_INDEXES)):
        known = ", ".join((".safetensors", *_INDEXES, *_TORCH_SUFFIXES))
        raise MismatchError(f"checkpoint file {str(path)!r} is of an unknown type: its name must end in one of {known}")
    return path


def whole_path(path: Path) -> Path:
    """The file of a path, as :func:`checked_path` gives it, unless it is one of several.

    Raises:
        MismatchError: it holds a piece of a state.
    """
    path = checked_path(path)
    piece = _PIECE.search(path.name)
    if piece is not None and int(piece[1]) > 1:
        raise MismatchError(
            f"checkpoint file {str(path)!r} is one of {int(piece[1])} that hold a state: give the folder that they "
            f"are in, or their index, such as {path.name.replace(piece[0], '') + _INDEX!r}"
        )
    return path


def state_files(path: Path) -> list[Path]:
    """The file itself, and, if it is an index, those that it names."""
    return [path, *(path.parent / name for name in sorted(set(_weight_map(path).values())))]


def _weight_map(path: Path) -> dict[str, str]:
    """Entry of the state → the file that an index has it in; nothing for any other file.

    Raises:
        MismatchError: the index is none, or names a file outside of its own directory.
        MissingFileError: a file that it names is missing.
    """
    if not path.name.endswith(_INDEXES):
        return {}
    kind = next(kind for kind in _INDEXED if path.name.endswith(kind + _INDEX))
    try:
        places = dict(read_json(path)["weight_map"])
        names = sorted(set(places.values()))
        if not all(isinstance(name, str) for name in names):
            raise TypeError(f"its files are {names[:_LISTED]}")
    except (ValueError, KeyError, TypeError) as error:
        raise MismatchError(f"{str(path)!r} is no index of weights ({type(error).__name__}: {error})") from error
    for name in names:
        if Path(name).name != name or not name.endswith(kind):
            raise MismatchError(f"{str(path)!r} names {name!r}, which is no {kind} file beside it")
        checked_path(path.parent / name)
    return places


def _read_parts(path: Path) -> dict[str, Tensor]:
    places = _weight_map(path)
    state: dict[str, Tensor] = {}
    for file in state_files(path)[1:]:
        state |= model_state(_read_file(file), str(file))
    absent = [name for name in places if name not in state]
    if absent or len(state) > len(places):
        others = absent or [name for name in state if name not in places]
        raise MismatchError(f"{str(path)!r} and its files do not hold the same entries: {', '.join(others[:_LISTED])}")
    return state


def read_state(path: Path) -> object:
    """Read what a file, or those of an index, hold: tensors alone, without running foreign code.

    Raises:
        MismatchError: a file is corrupt, or holds other objects.
    """
    return _read_parts(path) if path.name.endswith(_INDEXES) else _read_file(path)


def _read_file(path: Path) -> object:
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    return load_tensors(path, "save model.state_dict() alone")
