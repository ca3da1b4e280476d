"""Runs that are killed and go on end as if nothing had been."""

import os
from pathlib import Path

import pytest
from killed_programs import kill_at_random
from recorded_runs import described, same, train


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "run"
    recorder, model, _ = train(directory)
    return described(recorder.trajectory(segments=3), directory), model.state_dict()


def test_stopped_without_a_word_and_continued(tmp_path, uninterrupted):
    starts = [train(tmp_path, until=until)[2] for until in (2, 4, 13, 29)]
    recorder, model, last = train(tmp_path)
    assert [*starts, last] == [0, 0, 3, 10, 25]
    assert same(model.state_dict(), uninterrupted[1])
    assert described(recorder.trajectory(segments=3), tmp_path) == uninterrupted[0]


IMPORTS = f"""
import signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from recorded_runs import train
"""


def test_killed_at_random_moments(tmp_path, uninterrupted):
    """SIGKILL in the middle of anything; each new process goes on; the last one comes to the same end."""
    work = f"train({str(tmp_path / 'run')!r}, pause=0.01)\nsignal.pause()"
    kill_at_random(IMPORTS, work, 4, within=(0.02, 0.25))
    recorder, model, _ = train(tmp_path / "run")
    assert same(model.state_dict(), uninterrupted[1])
    assert described(recorder.trajectory(segments=3), tmp_path / "run") == uninterrupted[0]


class Killed(BaseException):
    """Stands for a SIGKILL at one exact place."""


@pytest.mark.parametrize("call", range(1, 22))
def test_killed_at_every_place_where_files_change(tmp_path, uninterrupted, monkeypatch, call):
    """The process dies just before the n-th rename, or just after it, leaving exactly what was on the disk then."""
    count, real = 0, os.replace

    def replace(source, target):
        nonlocal count
        count += 1
        if count == (call + 1) // 2 and call % 2:
            raise Killed
        real(source, target)
        if count == (call + 1) // 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            train(tmp_path)
    recorder, model, _ = train(tmp_path)
    assert same(model.state_dict(), uninterrupted[1])
    assert described(recorder.trajectory(segments=3), tmp_path) == uninterrupted[0]
    assert len(list(tmp_path.glob("optimizer_*"))) == 1
