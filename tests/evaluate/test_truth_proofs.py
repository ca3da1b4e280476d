"""Outcomes are where they were measured: swapped, foreign or unproven files are named, and a full disk too."""

import contextlib
import errno
import itertools
import json
import os
import shutil
import threading

import numpy as np
import pytest
import zarr
from retrainings import COUNT, RETRAININGS, open_truth, train

from source_proj._errors import SourceProjError
from source_proj.evaluate import GroundTruth, _truth_files

CELLS = [(0, 0), (0, 3), (4, 2), (COUNT - 1, RETRAININGS - 1)]
SWAPPED = {"outcomes": ["outcomes"], "outcomes and proofs": ["outcomes", "proofs"], "proofs": ["proofs"]}


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    return open_truth(tmp_path_factory.mktemp("truths") / "truth").fill(train, progress=False)


@pytest.fixture
def truth(filled, tmp_path):
    shutil.copytree(filled.path, tmp_path / "truth")
    return open_truth(tmp_path / "truth")


def chunk(truth, array, cell):
    return truth.path / array / "c" / str(cell[0]) / str(cell[1]) / "0"


def swap(first, second):
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(CELLS, 2)))
@pytest.mark.parametrize("what", SWAPPED)
def test_swapped_cells_are_named(truth, first, second, what):
    assert truth.verify() == []
    for array in SWAPPED[what]:
        swap(chunk(truth, array, first), chunk(truth, array, second))
    problems = truth.verify()
    assert len(problems) == 2
    for cell in (first, second):
        assert any(f"subset {cell[0]}, retraining {cell[1]} is not what was measured" in line for line in problems)
    with pytest.raises(SourceProjError, match=r"belongs elsewhere.*remove outcomes/c/"):
        _ = truth.outcomes
    for cell in (first, second):
        chunk(truth, "outcomes", cell).unlink()
    assert sorted(truth.missing()) == sorted([first, second])
    np.testing.assert_array_equal(truth.fill(train, progress=False).outcomes, open_truth(truth.path).outcomes)
    assert truth.verify() == []


@pytest.mark.parametrize("other", [{"seed": 7}, {"settings": {"epochs": 3}}])
def test_outcomes_of_another_store_are_named(truth, tmp_path, other):
    foreign = open_truth(tmp_path / "foreign", **other).fill(train, progress=False)
    for array in ("outcomes", "proofs"):
        shutil.copy(chunk(foreign, array, (1, 1)), chunk(truth, array, (1, 1)))
    assert len(truth.verify()) == 1
    with pytest.raises(SourceProjError, match="subset 1, retraining 1 is not what was measured"):
        truth.missing()


def test_an_outcome_without_its_proof_is_done_again(truth):
    """A process was killed between the two."""
    chunk(truth, "proofs", (2, 1)).unlink()
    assert truth.missing() == [(2, 1)]
    assert truth.verify() == []


@pytest.mark.parametrize("moment", ["before it writes", "between its two writes"])
def test_the_first_of_two_outcomes_of_a_cell_counts(tmp_path, monkeypatch, moment):
    """Two processes fill one store, and training gives other bits each time."""
    truth, starts = open_truth(tmp_path / "truth"), itertools.count()

    def noisy(kept, seed):
        return np.arange(truth.shape[2]) + next(starts)

    def other():
        monkeypatch.undo()
        fill = threading.Thread(target=GroundTruth(truth.path).fill, args=[noisy], kwargs={"progress": False})
        fill.start()
        fill.join(None if moment == "before it writes" else 0.5)
        return fill

    others = []
    owner, name = (_truth_files, "locked") if moment == "before it writes" else (_truth_files, "_proof")
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *given: (others.append(other()), real(*given))[1])
    truth.fill(noisy, progress=False)
    others[0].join()
    assert truth.verify() == []
    first = truth.outcomes
    assert truth.fill(noisy, progress=False).complete
    np.testing.assert_array_equal(truth.outcomes, first)


def test_who_is_killed_at_a_cell_of_another_harms_nothing(tmp_path, monkeypatch):
    truth = open_truth(tmp_path / "truth")

    def slow(kept, seed):
        if not GroundTruth(truth.path).complete:
            GroundTruth(truth.path).fill(train, progress=False)
        return np.full(truth.shape[2], 0.5)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(_truth_files, "_proof", killed_at(_truth_files._proof, truth.shape[2]))
        truth.fill(slow, progress=False)
    assert truth.verify() == []


def killed_at(proof, queries):
    """Stops whoever proves the slow one's outcome."""

    def stopping(key, cell, measured):
        if np.array_equal(measured, np.full(queries, 0.5)):
            raise KeyboardInterrupt
        return proof(key, cell, measured)

    return stopping


def test_a_removed_outcome_is_done_again_though_its_proof_is_there(truth, monkeypatch):
    """Killed between the two writes, the old proof is not left beside the new outcome."""
    chunk(truth, "outcomes", (2, 1)).unlink()
    proof = _truth_files._proof

    def killed(key, cell, measured):
        if cell == (2, 1) and not np.isnan(measured).any():
            raise KeyboardInterrupt
        return proof(key, cell, measured)

    with monkeypatch.context() as patch:
        patch.setattr(_truth_files, "_proof", killed)
        with pytest.raises(KeyboardInterrupt):
            truth.fill(lambda kept, seed: train(kept, seed) + 1, progress=False)
    assert truth.verify() == []
    assert truth.missing() == [(2, 1)]


def test_a_full_disk_is_named_and_costs_only_what_was_not_written(tmp_path, monkeypatch):
    truth = open_truth(tmp_path / "truth")
    room = itertools.count()
    write = zarr.Array.__setitem__

    def full(array, selection, value):
        if next(room) >= 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(array, selection, value)

    with monkeypatch.context() as patch:
        patch.setattr(zarr.Array, "__setitem__", full)
        with pytest.raises(SourceProjError, match=r"retraining 0 cannot be written .*No space left.*make room"):
            truth.fill(train, progress=False)
    assert truth.verify() == []
    assert len(truth.missing()) == COUNT * RETRAININGS - 3  # two writes each
    assert truth.fill(train, progress=False).complete


def test_no_room_for_the_store_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("source_proj.evaluate.ground_truth.publish", full)
    with pytest.raises(SourceProjError, match=r"truth cannot be made .*No space left"):
        open_truth(tmp_path / "truth")


def metadata(path, change):
    file = path / "zarr.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("entry", ["seed", "settings", "queries", "subsets"])
def test_what_a_store_was_made_for_cannot_be_altered(tmp_path, entry):
    truth = open_truth(tmp_path / "truth")
    metadata(truth.path, lambda content: content["attributes"].update({entry: 5}))
    with pytest.raises(SourceProjError, match="attributes are not those that it was made with"):
        GroundTruth(truth.path)


def test_fewer_or_more_retrainings_than_there_are(tmp_path):
    truth = open_truth(tmp_path / "truth").fill(train, progress=False)
    for name in ("outcomes", "proofs"):
        metadata(truth.path / name, lambda content: content["shape"].__setitem__(1, 3))
    with pytest.raises(SourceProjError, match=r"outcomes/c/\d/3/0 is of none of the retrainings"):
        GroundTruth(truth.path)
    for name in ("outcomes", "proofs"):
        metadata(truth.path / name, lambda content: content["shape"].__setitem__(1, 10**9))
    with pytest.raises(SourceProjError, match="claimed in so small a store"):
        GroundTruth(truth.path)


def test_links_and_pipes_in_a_store_are_refused(tmp_path):
    truth = open_truth(tmp_path / "truth").fill(train, progress=False)
    for make in (lambda path: path.symlink_to("/dev/zero"), os.mkfifo):
        path = truth.path / "outcomes/c/0/0/0"
        path.unlink()
        make(path)
        with pytest.raises(SourceProjError, match="outcomes/c/0/0/0 is neither a file nor a folder"):
            GroundTruth(truth.path)
