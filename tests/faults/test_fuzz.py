"""A few mutants of each kind; `fuzz.py` makes as many as one likes."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs fork and /proc")

HERE = Path(__file__).parent


def test_mutants_give_the_right_answers_or_are_refused_by_name(tmp_path):
    path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    seed = random.randrange(1 << 30)  # others every time; the program prints it beside a mutant that fails
    command = [sys.executable, str(HERE / "fuzz.py"), str(tmp_path), "--mutants", "100", "--seconds", "4"]
    done = subprocess.run(
        [*command, "--seed", str(seed)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert list(report) == ["bank", "fits", "run", "checkpoint", "truth"]
    assert all(counts["mutants"] > 0 and counts["wrong"] == 0 for counts in report.values())
