"""Every example that is meant for newcomers runs, in a process of its own, away from the checkout."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*arguments, cwd):
    search = os.pathsep.join(filter(None, [str(EXAMPLES.parent), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def test_quickstart(tmp_path):
    pytest.importorskip("sklearn")
    lines = run("-W", "error", EXAMPLES / "quickstart.py", cwd=tmp_path).stdout.splitlines()
    asked = [line.split() for line in lines if line.startswith("query ")]
    assert [words[1] for words in asked] == [str(query) for query in range(5)] * 2  # the first five, twice
    assert all(words[2:][:1] == ["label"] for words in asked)
    assert sum("helpful" in line for line in lines) == sum("harmful" in line for line in lines) == 5 * 3
    assert list(tmp_path.iterdir()) == []  # it writes to a temporary folder only


@pytest.mark.slow
def test_evaluate_your_model(tmp_path):
    for extra in ("sklearn", "matplotlib"):
        pytest.importorskip(extra)
    text = (EXAMPLES / "evaluate_your_model.py").read_text(encoding="utf-8")
    fewer = text.replace("count=50,", "count=8,")  # subsets, each of which is trained on twice
    assert fewer != text
    script = tmp_path / "evaluate_your_model.py"
    script.write_text(fewer, encoding="utf-8")
    first, slope, figure = run("-W", "error", script, "--folder", "kept", cwd=tmp_path).stdout.splitlines()
    assert first.startswith("LDS 0.")
    assert "noise ceiling" in first
    assert slope.startswith("slope of actual on predicted")
    assert figure.endswith("evaluation.png")
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "kept" / "truth").is_dir()


NOTEBOOKS = ["tour", "pictures"]


@pytest.mark.slow
def test_notebooks_run_from_top_to_bottom(tmp_path):
    if importlib.util.find_spec("nbclient") is None:
        pytest.skip('needs the notebook extra: pip install "source-proj[notebook]"')
    for name in NOTEBOOKS:
        shutil.copy(EXAMPLES / f"{name}.ipynb", tmp_path)  # a notebook runs, and writes, where it lies
    run("-m", "jupyter", "execute", *(f"{name}.ipynb" for name in NOTEBOOKS), cwd=tmp_path)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_kept_without_outputs(name):
    cells = json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
