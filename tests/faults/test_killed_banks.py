"""Law 5: a bank whose writers were killed or stopped at any moment equals one built at a stretch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

HERE = Path(__file__).parent


KILLS = {
    "resumed": 12,
    "together": 4,
    "racing": 0,
    "instants": 10,
    "straggled": 3,
    "taken_over": 2,
    "outputs": 12,
    "fitted": 2,
    "recorded": 2,
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Of all scenarios in one process, whose imports take longer than most of them.

    The program holds every bank to one that was built at a stretch, and reports an error if it differs.
    """
    path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    scenarios = ",".join(f"{name}={kills}" for name, kills in KILLS.items())
    command = [sys.executable, "-W", "error", str(HERE / "killed_banks.py"), scenarios]
    done = subprocess.run(
        [*command, str(tmp_path_factory.mktemp("killed")), "--seed", "1"],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.stdout, done.stderr
    return {name: {**report, "stderr": done.stderr} for name, report in json.loads(done.stdout).items()}


def whole(reports, scenario):
    report = reports[scenario]
    assert "error" not in report, f"{report['error']}: {report['stderr']}"
    assert report["kills"] >= KILLS[scenario]
    return report


def test_builds_killed_at_random_moments(reports):
    report = whole(reports, "resumed")
    assert len(set(report["killed"])) >= 4  # at different moments of the build


def test_two_builders_of_one_bank_one_of_them_killed(reports):
    report = whole(reports, "together")
    assert any("lacks shard 0" in refusal for refusal in report["refusals"])
    assert not any("shard 1 " in refusal for refusal in report["refusals"])  # the other builder's


def test_builders_that_begin_at_one_moment(reports):
    assert whole(reports, "racing")["banks"] == 3


def test_builds_and_appends_killed_before_a_file_event(reports):
    assert whole(reports, "instants")["moments"] > 300


def test_stragglers_with_other_bits_change_nothing_that_is_sealed(reports):
    whole(reports, "straggled")


def test_workers_that_take_over_from_one_that_was_killed(reports):
    whole(reports, "taken_over")


@pytest.mark.parametrize("scenario", ["outputs", "fitted", "recorded"])
def test_outputs_fits_and_recorders_killed_before_a_file_event(reports, scenario):
    assert whole(reports, scenario)["moments"] > 40
