"""The examples of trainers run: what a bank makes of a run's files equals the framework's own numbers."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TRAINERS = Path(__file__).parents[2] / "examples" / "trainers"
LARGEST = 1e-5
HF = ("transformers", "accelerate")
COMPARED = {"times of the checkpoints", "gradient of update 0", "losses of update 0"}
RESUMED = {"gradient of update 6", "losses of update 6"}
SCRIPTS = [
    ("run_glue_like.py", HF, {*RESUMED, "weights of the best model"}),
    ("run_clm_like.py", HF, RESUMED),
    ("run_clm_like.py --padded", HF, RESUMED),
    ("sft_lora.py", (*HF, "peft", "datasets", "trl"), {"adapter of the last checkpoint"}),
    ("lightning_onecycle.py", ("lightning",), {"averaged weights"}),
    ("lightning_onecycle.py --logged", ("lightning",), {"averaged weights"}),
    ("lightning_onecycle.py --optimizer adamw", ("lightning",), {"averaged weights"}),
]


def printed_by(command, needed, folder):
    """What a script prints that is run in a folder; skips where a module that it needs is missing."""
    for module in needed:
        if importlib.util.find_spec(module) is None:  # not imported: some of them replace things when they are
            pytest.skip(f"{module} is not installed")
    script, *options = command.split()
    search = os.pathsep.join(filter(None, [str(TRAINERS.parents[1]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, TRAINERS / script, *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("command", "needed", "further"), SCRIPTS, ids=[command for command, *_ in SCRIPTS])
def test_a_frameworks_numbers_are_those_of_its_files(command, needed, further, tmp_path):
    printed_lines = printed_by(command, needed, tmp_path)
    printed = re.findall(r"^(.+): .*relative difference (\S+)$", printed_lines, re.MULTILINE)
    assert {what for what, _ in printed} == COMPARED | further
    assert all(float(difference) <= LARGEST for _, difference in printed)
    assert re.search(r"^scores of 3 queries against \d+ ", printed_lines, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []  # but for temporary folders, nothing is written


@pytest.mark.slow
def test_progress_of_a_build_and_its_questions_reaches_a_tracker(tmp_path):
    printed_lines = printed_by("tracked_run.py", (*HF, "datasets"), tmp_path)
    told = re.findall(r"^(bank|queries|fit)\b.* (\S+)$", printed_lines, re.MULTILINE)
    assert {what for what, _ in told} == {"bank", "queries", "fit"}
    assert {what for what, share in told if float(share) == 1} == {"bank", "queries", "fit"}
    assert all(0 < float(share) <= 1 for _, share in told)
    assert re.search(r"^strongest score \S+$", printed_lines, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []
