"""What the package as a whole promises: its public names, its types, and what its README shows."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
import textwrap
import types
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import pytest

import source_proj as sp

ROOT = Path(sp.__file__).parent
PUBLIC = [
    "CausalLM", "Checkpoint", "Classification", "GradCos", "GradDot", "Hydra", "InfluenceFunction", "Adam", "Recorder",
    "Regression", "RepSim", "Scores", "SGD", "Sketch", "Source", "Stage", "Task", "TokenQueries", "TracIn",
    "Trajectory", "Trak", "build", "empirical_influence", "evaluate", "open", "report",
]  # fmt: skip
METHODS = {
    "Trajectory": ["from_stages", "from_recorder", "from_hf_trainer", "from_lightning", "average_parameters"],
    "Recorder": ["step", "trajectory", "restore"],
    "Source": [
        *["score", "top_k", "bottom_k", "helpful", "harmful", "self_influence", "by_segment", "by_token", "fit"],
        "replace",
    ],
    "Hits": ["helpful", "harmful", "to_pandas", "plot"],
    "Scores": ["top_k", "bottom_k", "group", "predict_removal", "to_numpy", "to_zarr", "to_pandas"],
    "evaluate": ["lds", "subset_removal", "mislabel", "leave_one_out", "GroundTruth", "compare_methods"],
    **{
        name: ["score", "top_k", "helpful", "harmful"]
        for name in (
            "TracIn",
            "Trak",
            "InfluenceFunction",
            "ArnoldiInfluence",
            "DataInf",
            "GradDot",
            "GradCos",
            "Hydra",
            "RepSim",
        )
    },
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names(name):
    assert name in sp.__all__
    assert getattr(sp, name).__doc__
    for method in METHODS.get(name, ()):
        assert callable(getattr(getattr(sp, name), method))


def test_all_names_exist_and_none_is_private():
    for name in sp.__all__:
        assert hasattr(sp, name)
        assert not name.startswith("_")


def test_completion_shows_the_public_names_and_nothing_else():
    assert sorted(dir(sp)) == sorted(sp.__all__)
    assert sp.__version__ == version("source-proj")


def test_type_checkers_and_editors_see_the_same_names():
    stub = ast.parse((ROOT / "__init__.pyi").read_text(encoding="utf-8"))
    (listed,) = [ast.literal_eval(node.value) for node in stub.body if isinstance(node, ast.Assign)]
    assert sorted(listed) == sp.__all__


def test_the_package_and_its_help_load_no_torch():
    """Seconds that nobody who asks for help, or completes a name, should wait."""
    code = (
        "import sys, source_proj, source_proj.cli; from typer.testing import CliRunner; "
        "results = [CliRunner().invoke(source_proj.cli.app, [*name, '--help']) for name in "
        "([], ['build'], ['score'], ['top-k'], ['inspect'], ['demo'], ['status'], ['curate'])]; "
        "assert all(result.exit_code == 0 for result in results), results; "
        "print(sorted({'torch', 'numpy', 'zarr'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_types_are_shipped():
    assert (files("source_proj") / "py.typed").is_file()
    assert (files("source_proj") / "__init__.pyi").is_file()


def sources():
    return sorted(path for path in ROOT.rglob("*.py"))


def packages():
    yield "source_proj"
    for module in pkgutil.iter_modules([str(ROOT)]):
        if module.ispkg:
            yield f"source_proj.{module.name}"


def targets(node):
    return node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []


@pytest.mark.parametrize("name", list(packages()))
def test_packages_only_re_export(name):
    """An ``__init__`` holds a docstring, imports and ``__all__``, and everything in ``__all__`` is there."""
    module = importlib.import_module(name)
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    for node in tree.body:
        names = [getattr(name, "id", "") for target in targets(node) for name in getattr(target, "elts", [])]
        is_lazy = names == ["__getattr__", "__dir__", "__all__"]  # the stub beside it has the imports
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_list = {getattr(target, "id", "") for target in targets(node)} in ({"__all__"}, {"__version__"})
        is_dir = isinstance(node, ast.FunctionDef) and node.name == "__dir__"
        assert isinstance(node, ast.Import | ast.ImportFrom) or is_lazy or is_docstring or is_list or is_dir, (
            ast.unparse(node)
        )
    assert len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        assert hasattr(module, public)


def test_every_module_lists_its_public_names():
    for path in sources():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assigned = {
            getattr(name, "id", "")
            for node in tree.body
            for target in targets(node)
            for name in getattr(target, "elts", [target])
        }
        assert "__all__" in assigned, f"{path} has no __all__"


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


@pytest.mark.parametrize("room", [sp.evaluate, sp.report])
def test_a_room_of_functions_is_a_module(room):
    assert isinstance(room, types.ModuleType)


def test_the_guide_cleans_a_csv_file_as_the_example_does():
    checkout = Path(__file__).parent.parent
    guide = (checkout / "examples" / "guide" / "curation.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"<!-- clean a csv -->\n```python\n(.*?)```", guide, re.DOTALL)
    assert shown == (checkout / "examples" / "clean_a_csv.py").read_text(encoding="utf-8")
    assert shown.count("\n") < 30
