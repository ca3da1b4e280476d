import importlib
import json
import pkgutil
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import zarr
from lossy_executor import LossyExecutor
from retrainings import COUNT, QUERIES, RETRAININGS, N, open_truth, train

import source_proj.evaluate
from source_proj._errors import MismatchError, SourceProjError
from source_proj.evaluate import GroundTruth, half_subsets

PROGRAM = Path(__file__).with_name("retrainings.py")


def start(folder, shard=0, shards=1, seconds=0.0):
    return subprocess.Popen([sys.executable, PROGRAM, *map(str, (folder, shard, shards, seconds))])


def naive(seeds=RETRAININGS):
    """What a loop over subsets and retrainings measures."""
    rows = [
        [train(np.flatnonzero(mask), j + 1_000_003 * r) for r in range(seeds)]
        for j, mask in enumerate(half_subsets(N, COUNT))
    ]
    return np.array(rows)


def chunks(folder):
    return sorted(folder.glob("proofs/c/*/*/0"))


def test_equals_a_naive_loop(tmp_path):
    truth = open_truth(tmp_path / "truth")
    assert truth.shape == (COUNT, RETRAININGS, QUERIES)
    assert truth.missing()[:2] == [(0, 0), (1, 0)]
    assert len(truth.missing()) == COUNT * RETRAININGS
    assert truth.fill(train, progress=False) is truth
    assert truth.complete
    np.testing.assert_array_equal(truth.outcomes, naive())
    np.testing.assert_array_equal(truth.masks, half_subsets(N, COUNT))
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "truth" / "outcomes", mode="r")[...], naive())


def test_seeds_are_all_different(tmp_path):
    truth = open_truth(tmp_path / "truth")
    seeds = [seed for subset in range(COUNT) for seed in truth.seeds(subset)]
    assert len(set(seeds)) == COUNT * RETRAININGS


def test_a_killed_fill_goes_on_where_it_was(tmp_path):
    folder = tmp_path / "truth"
    process = start(folder, seconds=0.05)
    while len(chunks(folder)) < 5 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = [tuple(map(int, chunk.parts[-3:-1])) for chunk in chunks(folder)]
    assert 5 <= len(done) < COUNT * RETRAININGS  # killed in the middle
    calls = []
    truth = open_truth(folder)
    assert set(truth.missing()).isdisjoint(done)
    with pytest.raises(SourceProjError, match=f"{len(truth.missing())} of 40 retrainings are missing"):
        _ = truth.outcomes
    truth.fill(lambda kept, seed: calls.append(seed) or train(kept, seed), progress=False)
    assert len(calls) == COUNT * RETRAININGS - len(done)  # nothing twice
    np.testing.assert_array_equal(truth.outcomes, naive())


def test_two_processes_share_the_work(tmp_path):
    folder = tmp_path / "truth"
    processes = [start(folder, shard, 2) for shard in range(2)]  # also a race for who makes the store
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    np.testing.assert_array_equal(open_truth(folder).outcomes, naive())


@pytest.mark.parametrize("shards", [1, 3, 7])
def test_shards_are_disjoint_and_cover_everything(tmp_path, shards):
    calls = []
    for shard in range(shards):
        open_truth(tmp_path / str(shard)).fill(
            lambda kept, seed: calls.append(seed) or train(kept, seed), shard=(shard, shards), progress=False
        )
    assert len(calls) == len(set(calls)) == COUNT * RETRAININGS


@pytest.mark.parametrize("group", [1, 3, 8])
def test_groups_change_nothing(tmp_path, group):
    sizes = []

    def together(kept, seeds):
        sizes.append(len(kept))
        return [train(*pair) for pair in zip(kept, seeds, strict=True)]

    truth = open_truth(tmp_path / "truth").fill(together, group=group, progress=False)
    np.testing.assert_array_equal(truth.outcomes, naive())
    assert max(sizes) == group


@pytest.mark.parametrize("group", [None, 3])
def test_an_executor_changes_nothing(tmp_path, group):
    executor = LossyExecutor(0)
    given = train if group is None else train_together
    truth = open_truth(tmp_path / "truth").fill(given, group=group, executor=executor, progress=False)
    np.testing.assert_array_equal(truth.outcomes, naive())
    assert len(executor.futures) > len(executor.done)  # some were lost


def train_together(kept, seeds):
    return [train(*pair) for pair in zip(kept, seeds, strict=True)]


def test_a_workers_error_reaches_the_caller_and_what_was_done_stays(tmp_path):
    def fails_late(kept, seed):
        if seed >= 3 * 1_000_003:
            raise RuntimeError("out of memory")
        return train(kept, seed)

    truth = open_truth(tmp_path / "truth")
    with ThreadPoolExecutor(2) as executor, pytest.raises(RuntimeError, match="out of memory"):
        truth.fill(fails_late, executor=executor, progress=False)
    assert len(truth.missing()) == COUNT


def test_the_others_of_a_group_are_kept_when_one_diverges(tmp_path):
    def together(kept, seeds):
        return [train(*pair) * (np.nan if pair[1] == 1 else 1) for pair in zip(kept, seeds, strict=True)]

    truth = open_truth(tmp_path / "truth")
    with pytest.raises(ValueError, match="subset 1 with seed 1 measured nan for query 0"):
        truth.fill(together, group=4, progress=False)
    assert truth.missing()[:2] == [(1, 0), (4, 0)]


def test_growing_keeps_what_is_there(tmp_path):
    folder, calls = tmp_path / "truth", []
    open_truth(folder, retrainings=2).fill(train, progress=False)
    grown = open_truth(folder)
    assert len(grown.missing()) == COUNT * (RETRAININGS - 2)
    grown.fill(lambda kept, seed: calls.append(seed) or train(kept, seed), progress=False)
    assert min(calls) >= 2 * 1_000_003
    np.testing.assert_array_equal(grown.outcomes, naive())
    assert open_truth(folder, retrainings=1).shape[1] == RETRAININGS  # never shrinks


def test_leave_one_out_keeps_all_then_drops_one_at_a_time(tmp_path):
    truth = GroundTruth.leave_one_out(tmp_path / "truth", 5, 1, [3, 0])
    assert truth.masks.astype(int).tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 1], [0, 1, 1, 1, 1]]


@pytest.mark.parametrize("examples", [[], [5], [-1], [1, 1], [0.5], [[1]]])
def test_leave_one_out_refuses(tmp_path, examples):
    with pytest.raises(ValueError, match="different positions from 0 to 4"):
        GroundTruth.leave_one_out(tmp_path / "truth", 5, 1, examples)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"epochs": 3, "lr": 0.2, "sizes": (2, 3)}}, r"settings {'lr': 0.1}, now wanted are {'lr': 0.2}"),
        ({"settings": {"epochs": 3, "lr": 0.1}}, r"settings {'sizes': \[2, 3\]}, now wanted are {}"),
        ({"count": 9}, "other subsets"),
        ({"n_queries": 4}, "queries 3, now wanted is 4"),
        ({"n": 13}, "other subsets"),
        ({"seed": 1}, "seed 0, now wanted is 1"),
    ],
)
def test_a_store_for_something_else_is_refused_by_name(tmp_path, changes, message):
    wanted = {"n": N, "n_queries": QUERIES, "count": 8, "settings": {"epochs": 3, "lr": 0.1, "sizes": (2, 3)}}
    GroundTruth.subsets(tmp_path / "truth", **wanted)
    GroundTruth.subsets(tmp_path / "truth", **wanted)  # the same again is welcome
    with pytest.raises(MismatchError, match=message) as caught:
        GroundTruth.subsets(tmp_path / "truth", **{**wanted, **changes})
    assert str(tmp_path) in str(caught.value)


def test_a_missing_folder_is_an_error_and_is_not_made(tmp_path):
    with pytest.raises(SourceProjError, match="nowhere"):
        GroundTruth(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_foreign_folders_are_refused(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("not a store")
    zarr.create_group(tmp_path / "other", attributes={"format": "something else", "version": 1})
    shutil.copytree(open_truth(tmp_path / "newer").path, tmp_path / "older")
    metadata = json.loads((tmp_path / "newer" / "zarr.json").read_text())
    metadata["attributes"]["version"] = 4
    (tmp_path / "newer" / "zarr.json").write_text(json.dumps(metadata))
    for name, message in [("notes", "no ground truth"), ("other", "something else"), ("newer", "version 4")]:
        for how in (GroundTruth, open_truth):
            with pytest.raises(SourceProjError, match=message) as caught:
                how(tmp_path / name)
            assert str(tmp_path / name) in str(caught.value)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-3])


def empty(file):
    file.write_bytes(b"")


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, empty, flip])
def test_a_damaged_outcome_is_named_and_can_be_done_again(tmp_path, damage):
    truth = open_truth(tmp_path / "truth").fill(train, progress=False)
    damaged = tmp_path / "truth" / "outcomes" / "c" / "4" / "2" / "0"
    damage(damaged)
    for read in (lambda: truth.outcomes, truth.missing, lambda: truth.fill(train)):
        with pytest.raises(SourceProjError, match="remove outcomes/c/4/2/0 in it") as caught:
            read()
        assert str(tmp_path / "truth") in str(caught.value)
    damaged.unlink()
    assert truth.missing() == [(4, 2)]
    np.testing.assert_array_equal(truth.fill(train, progress=False).outcomes, naive())


@pytest.mark.parametrize("damage", [truncate, empty, flip])
def test_damaged_masks_are_named(tmp_path, damage):
    open_truth(tmp_path / "truth")
    (chunk,) = (tmp_path / "truth" / "masks" / "c").rglob("0/0")
    damage(chunk)
    with pytest.raises(SourceProjError, match=r"masks(/c/0/0 has \d+ bytes| cannot be read)") as caught:
        GroundTruth(tmp_path / "truth")
    assert str(tmp_path / "truth") in str(caught.value)


def test_lost_masks_are_not_taken_for_empty_ones(tmp_path):
    open_truth(tmp_path / "truth")
    shutil.rmtree(tmp_path / "truth" / "masks" / "c")
    with pytest.raises(SourceProjError, match="masks/c/0/0 has 0 bytes"):
        GroundTruth(tmp_path / "truth")


@pytest.mark.parametrize("array", ["", "masks", "outcomes"])
@pytest.mark.parametrize("damage", [truncate, empty, Path.unlink])
def test_damaged_metadata_are_named(tmp_path, array, damage):
    open_truth(tmp_path / "truth")
    damage(tmp_path / "truth" / array / "zarr.json")
    with pytest.raises(SourceProjError) as caught:
        GroundTruth(tmp_path / "truth").missing()
    assert str(tmp_path / "truth") in str(caught.value)


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_diverged_model_is_named_and_not_kept(tmp_path, threads, value):
    def diverges(kept, seed):
        measured = train(kept, seed)
        if seed == 1_000_003 + 4:
            measured[1] = value
        return measured

    truth = open_truth(tmp_path / "truth")
    with (
        ThreadPoolExecutor(threads) if threads else nullcontext() as executor,
        pytest.raises(ValueError, match=f"subset 4 with seed 1000007 measured {value} for query 1"),
    ):
        truth.fill(diverges, executor=executor, progress=False)
    assert (4, 1) in truth.missing()
    assert len(truth.missing()) < COUNT * RETRAININGS


@pytest.mark.parametrize("measured", [0.0, [1.0, 2.0], [[1.0, 2.0, 3.0]]])
def test_the_wrong_shape_is_refused(tmp_path, measured):
    with pytest.raises(MismatchError, match=r"1 model\(s\) and 3 queries"):
        open_truth(tmp_path / "truth").fill(lambda kept, seed: measured, progress=False)
    with pytest.raises(MismatchError, match=r"4 model\(s\) and 3 queries"):
        open_truth(tmp_path / "truth").fill(lambda kept, seeds: measured, group=4, progress=False)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"masks": np.ones((3, 4))}, TypeError, "boolean"),
        ({"masks": np.ones(4, bool)}, ValueError, "shape"),
        ({"masks": np.ones((0, 4), bool)}, ValueError, "shape"),
        ({"masks": np.eye(3, 4, dtype=bool)[[0, 1, 1]] & [True, False, True, True]}, ValueError, r"\[1, 2\] keep no"),
        ({"n_queries": 0}, ValueError, "at least 1, got 0 and 1"),
        ({"retrainings": 0}, ValueError, "at least 1, got 2 and 0"),
        ({"settings": {"model": object()}}, TypeError, "settings must be"),
    ],
)
def test_bad_arguments_make_no_store(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        GroundTruth.of_masks(tmp_path / "truth", **{"masks": np.ones((3, 4), bool), "n_queries": 2, **arguments})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("choice", [{"shard": (2, 2)}, {"shard": (-1, 2)}, {"group": 0}])
def test_fill_refuses(tmp_path, choice):
    with pytest.raises(ValueError, match=r"shard must be|at least 1"):
        open_truth(tmp_path / "truth").fill(train, **choice)


def test_everything_public_is_exported():
    """Names of the public modules, helpers of other rooms of the package excepted, are those of the package."""
    inner = {"Paired", "TrainMany", "TrainOne", "calibrate", "rank_replicates", "split_half"}
    found = set()
    for module in pkgutil.iter_modules(source_proj.evaluate.__path__):
        if not module.name.startswith("_"):
            found |= set(importlib.import_module(f"source_proj.evaluate.{module.name}").__all__)
    assert found - inner == set(source_proj.evaluate.__all__)
    assert all(getattr(source_proj.evaluate, name).__doc__ for name in source_proj.evaluate.__all__)
