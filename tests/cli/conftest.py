"""A bank that the command line built, and how to call it."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from command_line import BUILD, MODULE
from torch import nn
from typer.testing import CliRunner

import source_proj as sp
from source_proj.cli import app


@pytest.fixture(scope="package")
def home(tmp_path_factory):
    """A directory with a module, a recorded run, and a bank built by the command line."""
    path = tmp_path_factory.mktemp("home")
    (path / "mine.py").write_text(MODULE)
    before = Path.cwd(), list(sys.path)
    os.chdir(path)
    sys.path.insert(0, str(path))
    import mine

    model = mine.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    recorder = sp.Recorder(model, optimizer, path / "run", every=10)
    inputs, labels = mine.train_set().tensors
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        recorder.step()
    done = CliRunner().invoke(app, BUILD)
    assert done.exit_code == 0, done.output
    yield path
    os.chdir(before[0])
    sys.path[:] = before[1]
    sys.modules.pop("mine")


@pytest.fixture
def call(home, monkeypatch):
    """Run a command in that directory; JSON output is parsed, and the exit code is checked."""
    monkeypatch.chdir(home)

    def run(*arguments, code=0):
        result = CliRunner().invoke(app, [str(one) for one in arguments])
        if result.exit_code != code:
            raise AssertionError(f"exit code {result.exit_code}: {result.output}") from result.exception
        if code:
            return result.stderr if code == 2 else result.stdout + result.stderr
        return json.loads(result.stdout) if "--json" in arguments else result.stdout

    return run


@pytest.fixture
def scores(home, monkeypatch):
    monkeypatch.chdir(home)
    import mine

    return sp.Source(sp.open("bank"), model=mine.model(), progress=False).score(mine.queries())
