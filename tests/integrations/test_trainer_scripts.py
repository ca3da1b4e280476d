"""The examples of trainers run: what a bank makes of a run's files equals the framework's own numbers."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TRAINERS = Path(__file__).parents[2] / "examples" / "trainers"
LARGEST = 1e-5
HF = ("transformers", "accelerate")
TRL, LIGHTNING = (*HF, "peft", "datasets", "trl"), ("lightning",)
COMPARED = {"times of the checkpoints", "gradient of update 0", "losses of update 0"}
RESUMED = {"gradient of update 6", "losses of update 6"}
SCRIPTS = {  # what each needs, and what it compares beside the usual
    "run_glue_like.py": (HF, {*RESUMED, "weights of the best model"}),
    "run_clm_like.py": (HF, RESUMED),
    "run_clm_like.py --padded": (HF, RESUMED),
    "sft_lora.py": (TRL, {"adapter of the last checkpoint"}),
    "lightning_onecycle.py": (LIGHTNING, {"averaged weights"}),
    "lightning_onecycle.py --logged": (LIGHTNING, {"averaged weights"}),
    "lightning_onecycle.py --optimizer adamw": (LIGHTNING, {"averaged weights"}),
}
TRACKED = "tracked_run.py"
NEEDED = {**{command: needed for command, (needed, _) in SCRIPTS.items()}, TRACKED: (*HF, "datasets")}

RUNNER = """
import contextlib, json, os, runpy, sys, traceback
trainers, *commands = sys.argv[1:]
sys.path.insert(0, trainers)
done = {}
for number, command in enumerate(commands):
    script, *options = command.split()
    os.makedirs(f"{number}.here")
    sys.argv = [script, *options]
    with contextlib.chdir(f"{number}.here"), open(f"../{number}.txt", "w+") as file:
        error = ""
        try:
            with contextlib.redirect_stdout(file):
                runpy.run_path(os.path.join(trainers, script), run_name="__main__")
        except (Exception, SystemExit):
            error = traceback.format_exc()
        file.seek(0)
        done[command] = {"printed": file.read(), "error": error, "left": os.listdir()}
print(json.dumps(done))
"""


@pytest.fixture(scope="module")
def printed_by(tmp_path_factory):
    """A function: what a script prints that is run in a folder, where it leaves nothing.

    All that need no more than transformers and datasets run in one process, which imports them once; so do those of
    Lightning. A script is skipped where a module that it needs is missing.
    """
    done = {}

    def printed(command):
        for module in NEEDED[command]:
            if importlib.util.find_spec(module) is None:  # not imported: trl replaces things when it is
                pytest.skip(f"{module} is not installed")
        if command not in done:
            done.update(run_together(command, tmp_path_factory.mktemp("scripts")))
        assert not done[command]["error"], done[command]["error"]
        assert not done[command]["left"]  # but for temporary folders, nothing is written
        return done[command]["printed"]

    return printed


def run_together(command, folder):
    alike = [other for other, needed in NEEDED.items() if needed[0] == NEEDED[command][0] and "trl" not in needed]
    search = os.pathsep.join(filter(None, [str(TRAINERS.parents[1]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(TRAINERS), *(alike if command in alike else [command])],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("command", SCRIPTS)
def test_a_frameworks_numbers_are_those_of_its_files(command, printed_by):
    lines = printed_by(command)
    printed = re.findall(r"^(.+): .*relative difference (\S+)$", lines, re.MULTILINE)
    assert {what for what, _ in printed} == COMPARED | SCRIPTS[command][1]
    assert all(float(difference) <= LARGEST for _, difference in printed)
    assert re.search(r"^scores of 3 queries against \d+ ", lines, re.MULTILINE)


@pytest.mark.slow
def test_progress_of_a_build_and_its_questions_reaches_a_tracker(printed_by):
    lines = printed_by(TRACKED)
    told = re.findall(r"^(bank|queries|fit)\b.* (\S+)$", lines, re.MULTILINE)
    assert {what for what, _ in told} == {"bank", "queries", "fit"}
    assert {what for what, share in told if float(share) == 1} == {"bank", "queries", "fit"}
    assert all(0 < float(share) <= 1 for _, share in told)
    assert re.search(r"^strongest score \S+$", lines, re.MULTILINE)


@pytest.mark.parametrize("reader", ["from_hf_trainer", "from_lightning"])
def test_runs_are_read_in_a_process_that_imported_nothing_else(tmp_path, reader):
    """Where there is no run, the reader itself says so."""
    line = f"import source_proj as sp; sp.Trajectory.{reader}({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert str(tmp_path) in done.stderr.splitlines()[-1], done.stderr
