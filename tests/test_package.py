"""What the package as a whole promises: its public names, its types, and which room may use which."""

import ast
import importlib
import pkgutil
import re
import textwrap
import types
from importlib.resources import files
from pathlib import Path

import pytest

import source_proj as sp

ROOT = Path(sp.__file__).parent
PUBLIC = [
    "CausalLM", "Checkpoint", "Classification", "GradCos", "GradDot", "Hydra", "InfluenceFunction", "Adam", "Recorder",
    "Regression", "RepSim", "Scores", "SGD", "Sketch", "Source", "Stage", "Task", "TokenQueries", "TracIn",
    "Trajectory", "Trak", "build", "empirical_influence", "evaluate", "open",
]  # fmt: skip
METHODS = {
    "Trajectory": ["from_stages", "from_recorder", "from_hf_trainer", "from_lightning", "average_parameters"],
    "Recorder": ["step", "trajectory", "restore"],
    "Source": ["score", "top_k", "bottom_k", "self_influence", "by_segment", "by_token", "fit"],
    "Scores": ["top_k", "bottom_k", "group", "predict_removal", "to_numpy", "to_zarr", "to_pandas"],
    "evaluate": ["lds", "subset_removal", "mislabel", "leave_one_out", "GroundTruth", "compare_methods"],
    **{
        name: ["score", "top_k"]
        for name in ("TracIn", "Trak", "InfluenceFunction", "GradDot", "GradCos", "Hydra", "RepSim")
    },
}

# From below to above: a room may use what stands before it, never what stands after it. Rooms on one line don't use
# each other.
LEVELS = [
    ["kernels", "_errors", "_io"],
    ["task"],
    ["trajectory"],
    ["sketch"],
    ["gradients"],
    ["bank"],
    ["attribution"],
    ["evaluate"],
    ["integrations"],
    ["report"],
    ["demo"],
    ["cli"],
]
RANK = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names(name):
    assert name in sp.__all__
    assert getattr(sp, name).__doc__
    for method in METHODS.get(name, ()):
        assert callable(getattr(getattr(sp, name), method))


def test_all_names_exist_and_none_is_private():
    for name in sp.__all__:
        assert hasattr(sp, name)
        assert not name.startswith("_") or name == "__version__"


def test_types_are_shipped():
    assert (files("source_proj") / "py.typed").is_file()


def sources():
    return sorted(path for path in ROOT.rglob("*.py"))


def room_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imported_rooms(path):
    """Every room of this package that a file imports, relative and absolute imports alike, with the line."""
    package = ["source_proj", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # "from source_proj import kernels" names the room among what it imports
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "source_proj" else [module]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "source_proj":
                yield node.lineno, parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize("path", [path for path in sources() if room_of(path)], ids=lambda path: str(path))
def test_a_file_imports_only_from_below(path):
    room = room_of(path)
    assert room in RANK, f"{path.name}: room {room!r} has no place in the order of rooms"
    for line, other in imported_rooms(path):
        where = f"{path.relative_to(ROOT)}:{line}"
        assert other in RANK, f"{where} imports source_proj.{other}, which has no place in the order of rooms"
        assert other == room or RANK[other] < RANK[room], f"{where}: {room} must not import {other}, which is no lower"


def test_kernels_know_nothing_of_the_package():
    for path in (ROOT / "kernels").glob("*.py"):
        assert {room for _, room in imported_rooms(path)} <= {"kernels"}


def packages():
    yield "source_proj"
    for module in pkgutil.iter_modules([str(ROOT)]):
        if module.ispkg:
            yield f"source_proj.{module.name}"


@pytest.mark.parametrize("name", list(packages()))
def test_packages_only_re_export(name):
    """An ``__init__`` holds a docstring, imports and ``__all__``, and everything in ``__all__`` is there."""
    module = importlib.import_module(name)
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    for node in tree.body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_list = isinstance(node, ast.Assign) and [getattr(t, "id", "") for t in node.targets] in (
            ["__all__"],
            ["__version__"],
        )
        assert isinstance(node, ast.Import | ast.ImportFrom) or is_docstring or is_list, ast.unparse(node)
    assert len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        assert hasattr(module, public)


def test_every_module_lists_its_public_names():
    for path in sources():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assigned = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
        assert any(getattr(target, "id", "") == "__all__" for target in assigned), f"{path} has no __all__"


def test_readme_shows_the_quickstart_as_it_runs():
    checkout = Path(__file__).parent.parent
    readme = (checkout / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"<!-- quickstart -->\n```python\n(.*?)```", readme, re.DOTALL)
    assert shown.count("\n") == 10
    assert shown in (checkout / "examples" / "quickstart.py").read_text(encoding="utf-8")


def test_readme_shows_the_evaluation_as_it_runs():
    checkout = Path(__file__).parent.parent
    readme = (checkout / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"<!-- evaluate -->\n```python\n(.*?)```", readme, re.DOTALL)
    example = (checkout / "examples" / "evaluate_your_model.py").read_text(encoding="utf-8")
    (lines,) = re.findall(r"# ten lines\n(.*?) *# end", example, re.DOTALL)
    # The formatter puts two blank lines after a function of a module, one after a function within another.
    assert re.sub("\n\n+", "\n\n", shown) == textwrap.dedent(lines)


def test_evaluate_is_a_module():
    assert isinstance(sp.evaluate, types.ModuleType)
