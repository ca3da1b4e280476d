"""Workers that a launcher starts: one bank, the bits of one process, whoever is stopped."""

import json
import os
import signal
import time

import pytest
import torch
from cluster_run import ARGUMENTS, torchrun, write_run
from typer.testing import CliRunner

import source_proj as sp
from source_proj.bank.build.claims import heartbeats
from source_proj.bank.store import LocalStore
from source_proj.cli.app import app, run
from source_proj.cli.jobs import Command, submit_job


def call(*arguments, code=0):
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("cluster")
    write_run(folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        call("build", "whole", *ARGUMENTS)
    return folder


@pytest.fixture(autouse=True)
def there(home, monkeypatch):
    monkeypatch.chdir(home)


def test_torchrun_builds_the_bank_of_one_process(home):
    torchrun(home, 2, "build", "bank", *ARGUMENTS)
    assert sp.open("bank").fingerprint == sp.open("whole").fingerprint
    report = sp.open("bank").verify()
    assert report.ok
    assert not report.leftovers


def test_the_environment_says_which_share(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    call("build", "part", *ARGUMENTS, "--shard", "0/3")  # said in words, it is that share alone
    assert json.loads(call("status", "part", "--json"))["rows_done"] == 160
    assert "160 of 480 rows (33.3 %), 0 workers at work" in call("status", "part")
    assert call("build", "part", *ARGUMENTS)
    assert "480 of 480 rows (100.0 %), finalized" in call("status", "part")
    assert sp.open("part").fingerprint == sp.open("whole").fingerprint


def test_a_job_that_is_preempted_goes_on(home, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("SLOW", "1")
    job = submit_job(Command(run, ["build", "job", *ARGUMENTS]), home / "jobs", {"timeout_min": 5}, local=True)
    store = LocalStore(home / "job")
    while not (beats := heartbeats(store)):
        assert not job.done(), job.stderr()
        time.sleep(0.02)
    os.kill(beats[0].pid, signal.SIGUSR2)  # as a scheduler does before it takes the machine away
    job.results()
    assert "Requeued job" in job.stdout()
    assert sp.open("job").fingerprint == sp.open("whole").fingerprint
    assert not sp.open("job").verify().leftovers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "submit needs a command"),
        (["inspect", "bank"], "submit needs a command, one of build"),
        (["--option", "account", "build", "bank"], "key=value"),
    ],
)
def test_what_no_job_can_be_is_refused(arguments, message):
    assert message in call("submit", "--local", *arguments, code=2)


def test_without_slurm_it_is_said_so(monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")
    assert "--local" in call("submit", "--gpus", "2", "build", "bank", code=1)
