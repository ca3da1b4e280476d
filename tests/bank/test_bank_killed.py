"""Law 5: a bank whose build was killed at random moments and resumed equals one built at a stretch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bank_runs import assert_same

from source_proj import bank as banks

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

HERE = Path(__file__).parent


def run_program(scenario, folder, seed=0):
    path = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "error", str(HERE / "killed_builds.py"), scenario, str(folder), str(seed)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    whole = banks.open(folder / "whole")
    assert whole.finalized
    made = sorted(folder.glob(f"{scenario}_*"))
    assert len(made) == report["banks"]
    for path in made:
        assert_same(path, whole.path)
        verified = banks.verify(path)
        assert verified.ok, verified.problems
        assert not verified.leftovers
    assert {entry.name for entry in folder.iterdir()} == {"whole", *(path.name for path in made)}
    return report


def test_builds_killed_at_twenty_random_moments(tmp_path):
    report = run_program("resumed", tmp_path)
    killed = report["killed"]
    assert len(killed) >= 20
    assert len(set(killed)) >= 4  # at different moments of the build


def test_two_builders_of_one_bank_one_of_them_killed(tmp_path):
    report = run_program("together", tmp_path, seed=1)
    assert len(report["refusals"]) == 4
    assert any("lacks shard 0" in refusal for refusal in report["refusals"])
    assert not any("shard 1 " in refusal for refusal in report["refusals"])  # the other builder's


def test_builders_that_begin_at_one_moment(tmp_path):
    run_program("racing", tmp_path)
