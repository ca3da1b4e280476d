"""What keeps files readable: length, complexity, and that lint and types cover all of them."""

import ast
import tomllib
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))
ROOMS = ["source_proj", "kernels", "tests", "examples"]
CODE = [".py", ".c", ".h", ".cu", ".js", ".html", ".css"]
LONGEST = 400


def code_files():
    paths = [path for room in ROOMS for path in (CHECKOUT / room).rglob("*") if path.suffix in CODE and path.is_file()]
    return [path for path in paths if "results" not in path.parts]


def test_no_file_is_longer_than_a_sitting():
    lengths = {path: path.read_text(encoding="utf-8").count("\n") for path in code_files()}
    assert {str(path.relative_to(CHECKOUT)): n for path, n in lengths.items() if n > LONGEST} == {}


def test_lint_bounds_the_complexity_of_every_function():
    lint = SETTINGS["tool"]["ruff"]["lint"]
    assert "C90" in lint["select"]
    assert lint["mccabe"]["max-complexity"] <= 10
    assert not [codes for codes in lint["per-file-ignores"].values() if {"C90", "C901"} & set(codes)]
    excused = [path for path in code_files() if "noqa: C9" + "01" in path.read_text(encoding="utf-8")]
    assert not excused


def test_types_are_checked_strictly_everywhere():
    mypy = SETTINGS["tool"]["mypy"]
    assert mypy["strict"]
    assert set(mypy["files"]) == {"source_proj", "examples"}  # source_proj/kernels is the kernels folder


RECORDS = {"spec", "trajectory", "trajectory_spec", "run", "record", "stage_record", "segment_record"}


def string_subscripts(source):
    """Lines where an attribute that holds a record is asked for a key, which the type checker cannot follow."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Subscript) and getattr(node.value, "attr", None) in RECORDS:
            yield from [node.lineno] * isinstance(getattr(node.slice, "value", None), str)


def test_records_are_read_by_their_attributes():
    assert list(string_subscripts("a.spec['steps'] + bank.trajectory_spec['stages'][0]")) == [1, 1]
    library = [path for path in code_files() if path.suffix == ".py" and "source_proj" in path.parts]
    lines_of = {str(path): list(string_subscripts(path.read_text(encoding="utf-8"))) for path in library}
    assert {path: lines for path, lines in lines_of.items() if lines} == {}
