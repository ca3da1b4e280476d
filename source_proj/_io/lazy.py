"""Names of a package that load what holds them when they are first asked for."""

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["lazy_exports"]


def lazy_exports(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package, by the imports of the stub beside its ``__init__.py``.

    ``import source_proj`` would take seconds if it loaded torch; the stub is what type checkers and editors read, so
    that names are listed once. (The way of https://scientific-python.org/specs/spec-0001/.)

    Args:
        package: its name.
        file: its ``__file__``.
    """
    tree = ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))
    homes = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names
    }
    names = sorted(homes)

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, attribute = homes[name]
        if module == package:  # ``from package import room``: the room itself
            module = f"{package}.{attribute}"
            value = import_module(module)
        else:
            value = getattr(import_module(module), attribute)
        setattr(sys.modules[package], name, value)
        return value

    return load, lambda: names, names
