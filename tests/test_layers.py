"""Data flow one way: which file may use which, late imports and names of modules in strings included."""

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import source_proj as sp

ROOT = Path(sp.__file__).parent
# From below to above: a file uses only what its own room, or one before it, holds.
ROOMS = [
    "kernels", "_errors", "_io", "task", "trajectory", "sketch", "gradients", "bank", "attribution", "distribute",
    "evaluate", "curate", "integrations", "report", "demo", "cli", "__main__",
]  # fmt: skip
LOADERS = {"import_module", "__import__", "run_module"}


def module_of(path: Path) -> str:
    """source_proj/bank/format.py → source_proj.bank.format; a package's __init__ is the package."""
    parts = ("source_proj", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def python_files() -> dict[str, Path]:
    """Every module of the package, by name; the kernels are a linked folder."""
    paths = [Path(folder) / name for folder, _, names in os.walk(ROOT, followlinks=True) for name in names]
    return {module_of(path): path for path in sorted(paths) if path.suffix == ".py"}


def imports(source: str, module: str, *, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Line and name of all modules of the package, or names within them, that a file may load at any time."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in LOADERS:
            first = node.args[0] if node.args else None
            if not (isinstance(first, ast.Constant) and isinstance(first.value, str)):
                # A module of the user, whose name is an argument, is no import of ours; a name made here might be.
                assert isinstance(first, ast.Name | ast.Subscript), f"{module}:{node.lineno}: name the module in full"
                continue
            names = [first.value] if not first.value.startswith(".") else [f"source_proj.relative{first.value}"]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value] if re.fullmatch(r"source_proj(\.\w+)*", node.value) else []
        else:
            continue
        for name in names:
            if name.split(".")[0] == "source_proj":
                yield node.lineno, name


def room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


FILES = python_files()


def imports_of(module: str) -> list[tuple[int, str]]:
    path = FILES[module]
    return list(imports(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py"))


@pytest.mark.parametrize("module", [name for name in FILES if room(name)])
def test_a_file_imports_only_from_rooms_above_it(module):
    own = room(module)
    assert own in ROOMS, f"{module}: room {own!r} has no place in the order of rooms"
    for line, name in imports_of(module):
        other = room(name)
        assert other in ROOMS, f"{module}:{line} imports {name}, which has no place in the order of rooms"
        assert ROOMS.index(other) <= ROOMS.index(own), f"{module}:{line}: {own} must not import {name}"


def test_no_circle_between_files():
    edges = {module: used_files(module) for module in FILES}
    remaining = dict(edges)
    while True:
        free = {module for module, used in remaining.items() if not used & remaining.keys()}
        if not free:
            break
        remaining = {module: used for module, used in remaining.items() if module not in free}
    circular = {module: sorted(used & remaining.keys()) for module, used in remaining.items()}
    assert not circular, f"these files import each other, or hang on some that do: {circular}"


def used_files(module: str) -> set[str]:
    """The files that a file's imports name: a module where a name is one, else the module that holds the name."""
    used = {name if name in FILES else name.rpartition(".")[0] for _, name in imports_of(module)}
    # A package's name in a string, within the package, finds its data files.
    return {name for name in used & FILES.keys() if not f"{module}.".startswith(f"{name}.")}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def late():\n    from source_proj.cli import main", "source_proj.cli.main"),
        ("if TYPE_CHECKING:\n    import source_proj.report.page", "source_proj.report.page"),
        ("import_module('source_proj.integrations')", "source_proj.integrations"),
        ("importlib.import_module('source_proj.integrations')", "source_proj.integrations"),
        ("__import__('source_proj.demo')", "source_proj.demo"),
        ("sys.modules['source_proj.demo']", "source_proj.demo"),
        ("NAMES = {'page': 'source_proj.report.page'}", "source_proj.report.page"),
        ("from .. import report", "source_proj.report"),
        ("from source_proj import report", "source_proj.report"),
        ("import_module('..report', __package__)", "source_proj.relative..report"),
    ],
)
def test_late_imports_are_seen(source, expected):
    assert expected in [name for _, name in imports(source, "source_proj.bank.format")]


@pytest.mark.parametrize("source", ["import_module('source_proj.' + room)", "import_module(f'source_proj.{room}')"])
def test_a_module_name_made_at_run_time_is_refused(source):
    with pytest.raises(AssertionError, match="name the module in full"):
        list(imports(source, "source_proj.bank.format"))
