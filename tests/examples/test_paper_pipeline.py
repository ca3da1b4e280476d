"""The paper's pipeline, end to end in miniature on the digits that scikit-learn ships."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAPER = Path(__file__).parents[2] / "examples" / "paper"


def run(*arguments, cwd):
    search = os.pathsep.join(filter(None, [str(PAPER.parents[1]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *map(str, arguments), "--quick", "--cache", "cache", "--results", "results"],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_a_task_and_a_study_run_end_to_end(tmp_path):
    for extra in ("sklearn", "pandas", "joblib", "matplotlib"):
        pytest.importorskip(extra)
    table = run(PAPER / "rotated_digits.py", cwd=tmp_path)
    scored = set(re.findall(r"^\d+ +(\S.*?) +(?:single|multiple) ", table, re.MULTILINE))
    assert scored >= {
        "SOURCE", "SOURCE, query at the end", "SOURCE, time of the retraining", "SOURCE, averaged parameters", "TRAK",
        "Influence functions", "Influence functions, averaged", "TracIn", "Hydra (fast)", "GradDot", "GradCos",
        "RepSim", "Empirical influence", "EK-FAC SOURCE", "EK-FAC SOURCE, mean query gradient",
    }  # fmt: skip
    # A miniature is no result; and what one run retrained, the next finds.
    assert not (tmp_path / "results").exists()
    study = run(PAPER / "laboratory.py", "--tasks", "rotated_digits", "--studies", "e", "--runs", "1", cwd=tmp_path)
    assert len(re.findall(r"^rotated_digits +e ", study, re.MULTILINE)) == 5
    assert re.search(r"mean over all of the last stage +\S+ +\+0\.000 \[\+0\.000, \+0\.000\]", study)
    assert not (tmp_path / "results").exists()
