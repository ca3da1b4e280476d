"""Law 5: a bank whose writers were killed or stopped at any moment equals one built at a stretch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

HERE = Path(__file__).parent


def run_program(scenario, folder, kills, seed=0):
    """The program holds every bank to one that was built at a stretch, and fails if it differs."""
    path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "error", str(HERE / "killed_banks.py"), scenario, str(folder)]
    done = subprocess.run(
        [*command, "--kills", str(kills), "--seed", str(seed)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["kills"] >= kills
    return report


def test_builds_killed_at_random_moments(tmp_path):
    report = run_program("resumed", tmp_path, 12)
    assert len(set(report["killed"])) >= 4  # at different moments of the build


def test_two_builders_of_one_bank_one_of_them_killed(tmp_path):
    report = run_program("together", tmp_path, 4, seed=1)
    assert any("lacks shard 0" in refusal for refusal in report["refusals"])
    assert not any("shard 1 " in refusal for refusal in report["refusals"])  # the other builder's


def test_builders_that_begin_at_one_moment(tmp_path):
    assert run_program("racing", tmp_path, 0)["banks"] == 3


def test_builds_and_appends_killed_before_a_file_event(tmp_path):
    report = run_program("instants", tmp_path, 10)
    assert report["moments"] > 300


def test_stragglers_with_other_bits_change_nothing_that_is_sealed(tmp_path):
    run_program("straggled", tmp_path, 3)


def test_workers_that_take_over_from_one_that_was_killed(tmp_path):
    run_program("taken_over", tmp_path, 2)


@pytest.mark.parametrize(("scenario", "kills"), [("outputs", 12), ("fitted", 2), ("recorded", 2)])
def test_outputs_fits_and_recorders_killed_before_a_file_event(tmp_path, scenario, kills):
    assert run_program(scenario, tmp_path, kills)["moments"] > 40
