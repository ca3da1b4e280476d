"""Which parameters are attributed, and where each one lies in the coordinates that the sketch sees."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod
from numbers import Real
from typing import Any

from torch import nn

from source_proj._errors import MismatchError

__all__ = ["LEAST_WEIGHT", "ParameterSpace"]

_BY_NAME = "give names, such as [name for name, _ in model.named_parameters() if ...] or ['head.*']"
LEAST_WEIGHT = 1e-6  # of a parameter, and the inverse of the largest: products of two stay far within float32


@dataclass(frozen=True)
class ParameterSpace:
    """The attributed parameters of a model, laid end to end: p owns the coordinates [offset(p), offset(p) + numel(p)).

    The order is that of `model.named_parameters()`; a tied parameter appears once, under its first name. Two spaces are
    equal when names, shapes and weights are, and only then do their sketches speak of the same coordinates.

    Args:
        names: full parameter names.
        shapes: one shape per name.
        weights: what the gradient of each parameter is multiplied by before it is sketched; None: by 1.

    Example:
        >>> space = ParameterSpace.from_model(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)), ["*.weight", "!0.*"])
        >>> space.names, space.size
        (('1.weight',), 2)
        >>> ParameterSpace.from_spec(space.spec()) == space
        True
        >>> space.weighted({"1.*": 0.5}).weights
        (0.5,)
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    weights: tuple[float, ...] | None = None

    @classmethod
    def from_model(cls, model: nn.Module, patterns: Sequence[str] | None = None) -> ParameterSpace:
        """Choose parameters by globs; `"!glob"` excludes, and excluding wins over including.

        Args:
            model: its parameters are chosen from, whether or not they require gradients.
            patterns: globs on full names (`"blocks.*.mlp.*"`; `*` also matches dots). A tied parameter answers to each
                of its names. Default, or when there are only exclusions: all parameters.

        Raises:
            ValueError: a pattern matches no parameter, or nothing is left; the message lists the names.
        """
        aliases = _aliases(model)
        chosen = _checked(patterns, aliases)
        names = [name for name in aliases if _is_chosen(aliases, name, chosen)]
        if not names:
            raise ValueError(f"the patterns {chosen} select no parameter; the model has {_listed(aliases)}")
        return cls.of_names(model, names)

    @classmethod
    def of_names(cls, model: nn.Module, names: Sequence[str]) -> ParameterSpace:
        """The space of these names of `model.named_parameters()`, which are in its order.

        Raises:
            ValueError: a parameter is no floating-point tensor.
        """
        parameters = dict(model.named_parameters())
        _refuse_complex(parameters, names)
        return cls(tuple(names), tuple(tuple(parameters[name].shape) for name in names))

    def weighted(self, weights: Mapping[str, float], model: nn.Module | None = None) -> ParameterSpace:
        """The same parameters, their gradients multiplied by numbers.

        Args:
            weights: by glob on the parameters' names. A name itself counts before any glob, and of several globs the
                first; where none matches it is 1.
            model: whose other names of tied parameters, and parameters that are not attributed, globs may mean too.

        Raises:
            TypeError: a glob is no text.
            ValueError: a glob matches no parameter, or others before it take all that it matches; or a number is out
                of range.
        """
        aliases = {name: [name] for name in self.names} | ({} if model is None else _aliases(model))
        for glob, weight in weights.items():
            _require_weight(glob, weight)
        exact = {name for names in aliases.values() for name in names} & set(weights)
        said = {name: [g for g in weights if _says(g, names, exact)] for name, names in aliases.items()}
        chosen = {name: min(globs, key=lambda glob: glob not in exact, default="") for name, globs in said.items()}
        for glob in weights:
            matched = [name for name, globs in said.items() if glob in globs]
            if not matched:
                raise ValueError(f"the weights' pattern {glob!r} matches none of the parameters {_listed(aliases)}")
            if glob not in chosen.values():
                raise ValueError(
                    f"the weights' pattern {glob!r} has no effect, as {chosen[matched[0]]!r} comes before it and "
                    "matches the same parameters: put it first"
                )
        return replace(self, weights=tuple(float(weights.get(chosen[name], 1.0)) for name in self.names))

    @cached_property
    def offsets(self) -> dict[str, int]:
        """First coordinate of each parameter."""
        starts, at = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            starts[name] = at
            at += prod(shape)
        return starts

    @cached_property
    def size(self) -> int:
        """The number d of attributed coordinates."""
        return sum(prod(shape) for shape in self.shapes)

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The model's attributed parameters by name, in the order of the space.

        Raises:
            MismatchError: the model lacks one of them, or has it in another shape.
        """
        present = dict(model.named_parameters(remove_duplicate=False))
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in present:
                raise MismatchError(f"the model has no parameter {name!r} of the bank; it has {_listed(present)}")
            if tuple(present[name].shape) != shape:
                raise MismatchError(
                    f"parameter {name!r} has shape {tuple(present[name].shape)} in the model and {shape} in the bank; "
                    "give a model of the architecture that was trained, as the bank was built with"
                )
        return {name: present[name] for name in self.names}

    def spec(self) -> dict[str, Any]:
        """JSON-able form: `{"names": [...], "shapes": [[...], ...]}`, and `"weights": [...]` where there are some."""
        plain = {"names": list(self.names), "shapes": [list(shape) for shape in self.shapes]}
        return plain if self.weights is None else {**plain, "weights": list(self.weights)}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> ParameterSpace:
        """The space that `spec` describes."""
        shapes = tuple(tuple(int(n) for n in shape) for shape in spec["shapes"])
        weights = spec.get("weights")
        return cls(
            tuple(spec["names"]), shapes, None if weights is None else tuple(float(weight) for weight in weights)
        )


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """First name of every parameter → all names it is registered under."""
    first: dict[int, str] = {}
    aliases: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(first.setdefault(id(parameter), name), []).append(name)
    return aliases


def _checked(patterns: Any, aliases: Mapping[str, list[str]]) -> list[str]:
    """The patterns as a list; a string in place of a list, or a pattern without a match, is a slip worth naming."""
    if isinstance(patterns, str):
        raise TypeError(f"parameters must be a list of globs, got the string {patterns!r}; write [{patterns!r}]")
    if patterns is not None and (isinstance(patterns, Iterator) or not isinstance(patterns, Iterable)):
        raise TypeError(f"parameters must be a list of globs on their names, got {patterns!r:.80}; {_BY_NAME}")
    chosen: list[Any] = [] if patterns is None else list(patterns)
    for pattern in chosen:
        if not isinstance(pattern, str):
            kind = type(pattern).__name__
            raise TypeError(f"parameters must be globs on their names, got a {kind} among them; {_BY_NAME}")
    if patterns is not None and not chosen:
        raise ValueError(f"parameters={patterns!r} names no parameter; give globs, ['*'] for all, or None")
    for pattern in chosen:
        glob = pattern.removeprefix("!")
        if not any(fnmatchcase(alias, glob) for names in aliases.values() for alias in names):
            raise ValueError(f"the pattern {pattern!r} matches no parameter; the model has {_listed(aliases)}")
    return chosen


def _is_chosen(aliases: Mapping[str, list[str]], name: str, patterns: Sequence[str]) -> bool:
    included = [p for p in patterns if not p.startswith("!")] or ["*"]
    excluded = [p[1:] for p in patterns if p.startswith("!")]

    def matches(globs: Sequence[str]) -> bool:
        return any(fnmatchcase(alias, glob) for alias in aliases[name] for glob in globs)

    return matches(included) and not matches(excluded)


def _require_weight(glob: object, weight: object) -> None:
    """Refuse what is no weight of a glob.

    Raises:
        TypeError, ValueError: says what it is.
    """
    if not isinstance(glob, str):
        raise TypeError(f"weights of parameters belong to globs on their names, got {glob!r}")
    number: Any = math.nan if isinstance(weight, bool) or not isinstance(weight, Real) else weight
    if not LEAST_WEIGHT <= number <= 1 / LEAST_WEIGHT:
        out = f"; to leave them out, give parameters=['!{glob}']" if number == 0 else ""
        raise ValueError(
            f"the weight of parameters {glob!r} must be a number from {LEAST_WEIGHT:g} to {1 / LEAST_WEIGHT:g}, got "
            f"{weight!r:.40}{out}"
        )


def _says(glob: str, names: Sequence[str], exact: Container[str]) -> bool:
    """Whether a glob is about a parameter of these names; one that is itself a parameter's name is about that alone."""
    return glob in names or (glob not in exact and any(fnmatchcase(name, glob) for name in names))


def _refuse_complex(parameters: Mapping[str, nn.Parameter], names: Sequence[str]) -> None:
    for name in names:
        if not parameters[name].is_floating_point():
            raise ValueError(f"parameter {name!r} is of type {parameters[name].dtype}; exclude it: '!{name}'")


def _listed(names: Mapping[str, Any], limit: int = 40) -> str:
    shown = list(names)[:limit]
    rest = len(names) - len(shown)
    return f"{shown}" + (f" and {rest} more" if rest else "")
