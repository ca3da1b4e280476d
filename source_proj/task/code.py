"""What a task's own functions do, as far as their code tells: names alone stay when a loss is edited."""

from __future__ import annotations

import dis
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import chain
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

__all__ = ["code_digest", "importable_name", "interpreter"]

_NUMBERS = 1 << 16  # of a tensor whose values count, such as weights of classes; of larger ones the shape does
_OTHERS = ("torch.", "numpy.", "source_proj.", "builtins.")  # whose code is not the user's


def interpreter() -> str:
    """The version of Python whose compiler made the code: digests of two versions are not to be compared."""
    return f"{sys.implementation.cache_tag}"


def importable_name(thing: Any) -> str:
    """``module:name`` of a function, a class or an object's class; of a script's own, the module that others import.

    Example:
        >>> importable_name(Tensor.add_), importable_name(partial(print))
        ('torch._C:TensorBase.add_', 'functools:partial')
    """
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    module = getattr(named, "__module__", None) or getattr(getattr(named, "__objclass__", None), "__module__", "")
    if module in ("__main__", "__mp_main__"):  # the latter in processes that multiprocessing started
        main = sys.modules["__main__"]
        spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
        if spec is not None:  # python -m package.module
            module = spec.name.removesuffix(".__main__")
        elif file is not None:
            module = file.replace("\\", "/").rpartition("/")[2].removesuffix(".py")
    return f"{module}:{named.__qualname__}"


def code_digest(thing: Any) -> str:
    """A hash of a function's code, with the plain values that it sees: defaults, closure, constants of its module.

    Lists, dicts and what the function itself assigns to do not count: it may keep there what it saw.

    Args:
        thing: a function, a method, a ``partial``, a class, or an object that is called.

    Returns:
        16 hexadecimal digits. They are the same in every process of one version of Python.

    Example:
        >>> two, again, three = partial(round, ndigits=2), partial(round, ndigits=2), partial(round, ndigits=3)
        >>> code_digest(two) == code_digest(again), code_digest(two) == code_digest(three)
        (True, False)
    """
    digest = hashlib.sha256()
    for part in _parts(thing, set()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:16]


def _parts(thing: Any, seen: set[int]) -> Iterator[bytes]:
    """What a thing is made of, in an order that is always the same."""
    if id(thing) in seen:
        return
    for kind, parts in _KINDS:
        if isinstance(thing, kind):
            if not isinstance(thing, _PLAIN):  # small numbers are one object wherever they stand
                seen.add(id(thing))
            yield type(thing).__qualname__.encode()
            yield from parts(thing, seen)
            return
    yield importable_name(thing).encode()
    yield from _of_mapping(getattr(thing, "__dict__", {}), seen)
    if not _is_foreign(type(thing)):
        yield from _parts(type(thing), seen)


def _of_function(function: FunctionType, seen: set[int]) -> Iterator[bytes]:
    if _is_foreign(function):
        yield importable_name(function).encode()
        return
    code = function.__code__
    if function.__doc__ is not None and function.__doc__ in code.co_consts[:1]:  # words do nothing
        code = code.replace(co_consts=(None, *code.co_consts[1:]))
    yield from _of_code(code, seen)
    yield from _parts(function.__defaults__ or (), seen)
    yield from _of_mapping(function.__kwdefaults__ or {}, seen)
    kept = {step.argval for step in dis.get_instructions(code) if step.opname in ("STORE_DEREF", "STORE_GLOBAL")}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # it is empty yet
            yield from () if name in kept else _parts(cell.cell_contents, seen)  # such as a count of its calls
    for name in sorted((_names(code) & function.__globals__.keys()) - kept):
        value = function.__globals__[name]
        if isinstance(value, _PLAIN | tuple | FunctionType | partial) or (
            isinstance(value, Tensor) and value.numel() <= _NUMBERS
        ):
            yield name.encode()
            yield from _parts(value, seen)


def _names(code: CodeType) -> set[str]:
    """The names that code looks up, also within what it defines."""
    return set(code.co_names).union(*(_names(part) for part in code.co_consts if isinstance(part, CodeType)))


def _of_code(code: CodeType, seen: set[int]) -> Iterator[bytes]:
    yield code.co_code
    yield from _parts(code.co_names, seen)
    yield from _parts(code.co_consts, seen)


def _of_class(kind: type, seen: set[int]) -> Iterator[bytes]:
    for own in kind.__mro__:
        if not _is_foreign(own):
            yield own.__qualname__.encode()
            for name, value in sorted(vars(own).items()):
                if name not in _KEPT and isinstance(value, _MEMBERS):
                    yield name.encode()
                    yield from _parts(value, seen)


def _of_mapping(mapping: Mapping[Any, Any], seen: set[int]) -> Iterator[bytes]:
    for name, value in sorted(mapping.items(), key=lambda pair: str(pair[0])):
        yield str(name).encode()
        yield from _parts(value, seen)


def _of_tensor(tensor: Tensor, _: set[int]) -> Iterator[bytes]:
    yield repr((tuple(tensor.shape), str(tensor.dtype))).encode()
    if tensor.numel() <= _NUMBERS and not tensor.is_meta and not tensor.requires_grad:  # a model's weights move
        yield repr(tensor.detach().cpu().tolist()).encode()


def _each(things: Any, seen: set[int]) -> Iterator[bytes]:
    yield str(len(things)).encode()
    for thing in things:
        yield from _parts(thing, seen)


def _is_foreign(thing: Any) -> bool:
    return f"{getattr(thing, '__module__', '')}.".startswith(_OTHERS)


_MEMBERS = (FunctionType, staticmethod, classmethod, property, int, float, str, bool)
_PLAIN = int | float | complex | str | bytes | bool | None
_KEPT = ("__module__", "__qualname__", "__doc__", "__firstlineno__")
_KINDS: tuple[tuple[Any, Callable[[Any, set[int]], Iterator[bytes]]], ...] = (
    (_PLAIN, lambda value, _: iter([repr(value).encode()])),
    (tuple, _each),
    (frozenset, lambda values, _: iter(sorted(repr(value).encode() for value in values))),
    (list | set | Mapping, lambda *_: iter(())),  # in which a function may keep what it saw
    (Tensor, _of_tensor),
    (nn.Module, lambda module, _: iter([importable_name(module).encode()])),  # whose weights move
    (CodeType, _of_code),
    (FunctionType, _of_function),
    (MethodType, lambda method, seen: _each((method.__func__, method.__self__), seen)),
    (partial, lambda made, seen: _each((made.func, made.args, *chain(*sorted(made.keywords.items()))), seen)),
    ((staticmethod, classmethod), lambda made, seen: _parts(made.__func__, seen)),
    (property, lambda made, seen: _parts(made.fget, seen)),
    (BuiltinFunctionType, lambda function, _: iter([importable_name(function).encode()])),
    (type, _of_class),
)
