"""Frozen dataclasses as JSON: written plainly, read strictly.

A record's entries are the fields of its dataclass: all of them, no others, each of its annotated type. A field of a
type that is no record brings functions of its own: ``field(metadata={"write": to_json, "read": from_json})``.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = ["read_json", "read_record", "write_record"]

T = TypeVar("T")

_MOST_BYTES = 256 << 20  # of a document: a run whose rate changed ten million times has less
_SHOWN = 80  # letters of a value spelled out in an error


def read_json(path: Path) -> Any:
    """Read a file of JSON.

    Raises:
        ValueError: it cannot be read, is no file, too large, no JSON, or nested too deep.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would keep its reader waiting
            raise ValueError("it is no file")
        if status.st_size > _MOST_BYTES:
            raise ValueError(f"it has {status.st_size} bytes, and at most {_MOST_BYTES} are read")
        return json.loads(path.read_bytes())
    except (OSError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def write_record(record: Any) -> dict[str, Any]:
    """The record's entries, as JSON has them."""
    return {field.name: field.metadata.get("write", _plain)(getattr(record, field.name)) for field in fields(record)}


def read_record(kind: type[T], content: object, name: str) -> T:
    """Make a record of what JSON gave.

    Args:
        kind: its dataclass, whose own checks raise ValueError.
        content: the parsed JSON.
        name: what errors call it.

    Raises:
        ValueError: an entry is missing, unknown, of the wrong type or out of its range; names it, and what it is.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{name} must be an object, got {_shown(content)}")
    known = fields(kind)  # type: ignore[arg-type]
    absent = [field.name for field in known if field.name not in content]
    unknown = sorted(map(str, set(content) - {field.name for field in known}))
    if absent or unknown:
        raise ValueError(f"{name} {f'lacks {absent[0]!r}' if absent else f'has an unknown entry {unknown[0]!r}'}")
    hints = get_type_hints(kind)
    values = {}
    for field in known:
        read, entry, called = field.metadata.get("read"), content[field.name], f"{name}.{field.name}"
        values[field.name] = _read(hints[field.name], entry, called) if read is None else _by(read, entry, called)
    made: T = _by(lambda given: kind(**given), values, name)
    return made


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return write_record(value)
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return value


def _by(read: Any, content: Any, name: str) -> Any:
    """What a function reads, its complaints under the entry's name."""
    try:
        return read(content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        said = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{name}: {said}") from error


def _read(hint: Any, content: object, name: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        (other,) = (kind for kind in arguments if kind is not NoneType)
        return None if content is None else _read(other, content, name)
    if origin is Literal:
        if content not in arguments:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, arguments))}, got {_shown(content)}")
        return content
    if origin in (tuple, Sequence):
        return _tuple(arguments if origin is tuple else (*arguments, ...), content, name)
    if origin is dict:
        if not isinstance(content, Mapping):
            raise ValueError(f"{name} must be an object, got {_shown(content)}")
        return {str(key): _read(arguments[1], entry, f"{name}.{key}") for key, entry in content.items()}
    if isinstance(hint, type) and is_dataclass(hint):
        return read_record(hint, content, name)
    return _scalar(hint, content, name)


def _tuple(kinds: tuple[Any, ...], content: object, name: str) -> tuple[Any, ...]:
    if not isinstance(content, list | tuple):
        raise ValueError(f"{name} must be a list, got {_shown(content)}")
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(content)
    if len(content) != len(kinds):
        raise ValueError(f"{name} must have {len(kinds)} entries, got {_shown(content)}")
    pairs = zip(kinds, content, strict=True)
    return tuple(_read(kind, entry, f"{name}[{place}]") for place, (kind, entry) in enumerate(pairs))


def _scalar(kind: type, content: object, name: str) -> Any:
    numbers = int | float if kind is float else kind
    if not isinstance(content, numbers) or (isinstance(content, bool) and kind is not bool):
        words = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
        raise ValueError(f"{name} must be {words[kind]}, got {_shown(content)}")
    if kind is not float:
        return content
    try:
        value = float(content)  # type: ignore[arg-type]
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {_shown(content)}")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
