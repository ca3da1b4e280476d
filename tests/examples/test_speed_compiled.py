"""The Triton kernels compiled without a device: they fit into registers, read wide, and use tensor cores."""

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "speed" / "compiled.py"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(*arguments, cache):
    """The script in a process of its own, where Triton's interpreter is off: it is on or off for a whole process."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", SCRIPT, *arguments]
    return subprocess.run(command, env={**kept, "TRITON_CACHE_DIR": str(cache)}, capture_output=True, text=True)


def test_shapes_that_matter_compile_well(tmp_path):
    done = run("--capability", "90", "--only", "bfloat16", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines()[2:]:
        launch, _, kernel, _, spills, _, resident, wide, tensor, *_ = line.split()
        found[launch, kernel] = int(spills), int(resident), int(wide.split("/")[0]), int(tensor)
    assert set(found) == {
        ("rows", "rows_kernel"),
        ("step", "rows_kernel"),
        ("columns", "columns_kernel"),
        ("columns", "rows_kernel"),
        ("embedding", "at_kernel"),
        ("dense", "dense_kernel"),
        ("tensor", "narrow_kernel"),
        ("transforms", "spectra_kernel"),
        ("table", "at_kernel"),
        ("along", "rows_kernel"),
        ("channels", "channels_kernel"),
    }
    for (launch, _), (spills, resident, wide, tensor) in found.items():
        # Sums of a whole spectrum fill the registers; by how much is up to the version of the compiler.
        assert spills <= (64 if launch == "transforms" else 0)
        assert resident > 0
        assert wide > 0 or launch in ("step", "columns")  # whose inputs are found number by number
        assert (tensor > 0) == (launch in ("dense", "transforms"))


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT))["main"]([])
    assert ended.value.code == 2
    assert "TRITON_INTERPRET is 1" in capsys.readouterr().err
