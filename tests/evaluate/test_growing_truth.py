"""Processes that grow one store at once: what any of them has finished stays, whatever the order of their steps."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import zarr
from retrainings import COUNT, RETRAININGS, open_truth, train

from source_proj._errors import SourceProjError
from source_proj._io.locks import FolderLock, locked
from source_proj.evaluate import GroundTruth, _truth_files, ground_truth

PROGRAM = Path(__file__).with_name("retrainings.py")


def grow_and_fill(path, retrainings=RETRAININGS):
    return open_truth(path, retrainings=retrainings).fill(train, progress=False)


def first_then(before, function):
    """``function``, before whose first call something else happens."""
    once = iter([before])

    def changed(*arguments, **keywords):
        next(once, lambda: None)()
        return function(*arguments, **keywords)

    return changed


PLACES = {
    "after the size was read": (ground_truth, "grow"),
    "before the turn is waited for": (_truth_files, "locked"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("wanted", [2, RETRAININGS - 1, RETRAININGS + 1])
def test_another_grows_and_fills_while_one_is_about_to_grow(tmp_path, monkeypatch, place, wanted):
    folder = tmp_path / "truth"
    open_truth(folder, retrainings=1)
    module, name = PLACES[place]
    monkeypatch.setattr(module, name, first_then(lambda: grow_and_fill(folder), getattr(module, name)))
    late = open_truth(folder, retrainings=wanted)
    assert late.shape[1] == max(wanted, RETRAININGS)
    assert [r for _, r in late.missing()] == [RETRAININGS] * COUNT * (wanted > RETRAININGS)
    assert late.verify() == []


def test_another_grows_and_fills_while_one_opens(tmp_path, monkeypatch):
    """Between what one reads of the arrays' sizes and what it sees of their files."""
    folder = tmp_path / "truth"
    open_truth(folder, retrainings=1)
    monkeypatch.setattr(_truth_files, "walk", first_then(lambda: grow_and_fill(folder), _truth_files.walk))
    assert GroundTruth(folder).complete


@pytest.mark.parametrize("moment", range(1, 5))
def test_another_grows_and_fills_while_one_reads(tmp_path, monkeypatch, moment):
    """Before or after each of the two arrays' sizes, or cells, was read."""
    folder = tmp_path / "truth"
    truth, calls = grow_and_fill(folder, 1), iter(range(1, 9))

    def late(function):
        def call(*arguments):
            if next(calls) == moment:
                monkeypatch.undo()
                grow_and_fill(folder)
            return function(*arguments)

        return call

    for name in ("array_of", "_cells"):
        monkeypatch.setattr(_truth_files, name, late(getattr(_truth_files, name)))
    assert truth.missing() == []
    assert truth.shape[1] == RETRAININGS


def test_another_waits_while_one_grows(tmp_path, monkeypatch):
    """One stops between what it read and what it writes; without a lock the other has grown and filled by then."""
    folder, done = tmp_path / "truth", threading.Event()
    open_truth(folder, retrainings=1)
    other = threading.Thread(target=lambda: [grow_and_fill(folder), done.set()])

    def pause():
        other.start()
        done.wait(2)

    monkeypatch.setattr(zarr.Array, "resize", first_then(pause, zarr.Array.resize))
    open_truth(folder, retrainings=2)
    other.join()
    assert GroundTruth(folder).shape[1] == RETRAININGS
    assert GroundTruth(folder).complete


@pytest.mark.parametrize("seed", [0, 1])
def test_processes_grow_and_fill_in_any_order(tmp_path, seed):
    rng, folder = np.random.default_rng(seed), tmp_path / "truth"
    sizes = [[RETRAININGS, *rng.integers(1, RETRAININGS, size=5)] for _ in range(3)]
    processes = [
        subprocess.Popen([sys.executable, PROGRAM, folder, "0", "1", "0.002", *map(str, rng.permutation(own))])
        for own in sizes
    ]
    assert [process.wait(timeout=240) for process in processes] == [0, 0, 0]
    truth = GroundTruth(folder)
    assert truth.shape[1] == RETRAININGS
    assert truth.complete
    np.testing.assert_array_equal(truth.outcomes, grow_and_fill(tmp_path / "alone").outcomes)


def test_a_lock_that_another_keeps_is_an_error_that_names_it(tmp_path, monkeypatch):
    folder = tmp_path / "truth"
    open_truth(folder, retrainings=1)
    lock = FolderLock(folder, "grow.lock")
    assert lock.acquire()
    monkeypatch.setattr(_truth_files, "locked", lambda path, name: locked(path, name, wait=0.05))
    with pytest.raises(SourceProjError, match=r"grow\.lock for 0\.05 s"):
        open_truth(folder)
    lock.release()
    assert open_truth(folder).shape[1] == RETRAININGS
