"""The format page: one malformed bank for each MUST that a reader can see broken, made by changing bytes."""

import json
import os
import re
import shutil
import stat
import struct
import warnings

import google_crc32c
import numpy as np
import pytest
import torch
import zarr
from bank_runs import N, make_data, make_run
from hypothesis import given, settings
from hypothesis import strategies as st

from source_proj import bank as banks
from source_proj._errors import BankError
from source_proj.bank.format import VERSION

PART = "stage_0/part_0"
DATA = f"{PART}/checkpoint_1"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A finalized bank with every kind of array, appended rows and copies of weights."""
    torch.set_num_threads(1)
    run = make_run()
    bank = run.build(tmp_path_factory.mktemp("original") / "bank", sampled_fisher=1)
    bank.append(run.model, run.task, make_data(5, seed=1), progress=False)
    assert bank.verify().ok
    return bank.path


@pytest.fixture
def bank(original, tmp_path):
    return shutil.copytree(original, tmp_path / "bank")


def edit(file, change):
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def attribute(node, *keys, to):
    def change(document):
        inner = document["attributes"]
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to

    return lambda bank: edit(bank / node / "zarr.json", change)


def metadata(node, key, to):
    return lambda bank: edit(bank / node / "zarr.json", lambda document: document.update({key: to}))


def without(node, *keys):
    def change(document):
        inner = document["attributes"]
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]

    return lambda bank: edit(bank / node / "zarr.json", change)


def gone(name):
    def change(bank):
        path = bank / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def written(name, content):
    return lambda bank: (bank / name).write_bytes(content)


def truncated(name, keep):
    return lambda bank: (bank / name).write_bytes((bank / name).read_bytes()[:keep])


def flipped(name, place, bit=0):
    def change(bank):
        content = bytearray((bank / name).read_bytes())
        content[place] ^= 1 << bit
        (bank / name).write_bytes(bytes(content))

    return change


def replaced(name, by):
    return lambda bank: shutil.copy(bank / by, bank / name)


def with_checksum(values):
    """The file of an array with one checksummed chunk, made without zarr."""
    content = values.tobytes()
    return content + struct.pack("<I", google_crc32c.value(content))


def doubled_id(bank):
    array = zarr.open_array(bank / PART / "ids", mode="r+")
    array[3] = 4


REFUSED = {
    # 1: name and version
    "another format": (attribute("", "format", to="other"), r"'other', not 'source-proj bank'"),
    "no format": (without("", "format"), r"None, not 'source-proj bank'"),
    "a later version": (
        attribute("", "version", to=VERSION + 1),
        f"format version {VERSION + 1}, and this package reads {VERSION}",
    ),
    "a version in words": (attribute("", "version", to="1"), "format version '1'"),
    "a version that is true": (attribute("", "version", to=True), "format version True"),
    # 2: settings
    "no settings": (without("", "settings"), "settings are None"),
    "a setting missing": (without("", "settings", "storage"), "settings are .* must be .*'storage'"),
    "a setting unknown": (attribute("", "settings", "metric", to="P"), "settings are .*'metric'"),
    "another storage": (attribute("", "settings", "storage", to="int3"), "storage must be one of int1"),
    "negative draws": (attribute("", "settings", "sampled_fisher", to=-1), "sampled_fisher must be"),
    "a sketch in words": (attribute("", "settings", "sketch", to="sparse"), "'sketch' is 'sparse'"),
    "a sketch without dim": (without("", "settings", "sketch", "dim"), "sketch spec has entries"),
    "a sketch of no columns": (attribute("", "settings", "sketch", "dim", to=0), "dim is 0; give a number of columns"),
    "a sketch's dim in words": (attribute("", "settings", "sketch", "dim", to="32"), "dim is '32'; give an integer"),
    "an unknown sketch": (attribute("", "settings", "sketch", "kind", to="magic"), "magic"),
    "a trajectory without stages": (attribute("", "settings", "trajectory", to={}), "trajectory lacks 'stages'"),
    "a trajectory of no stages": (
        attribute("", "settings", "trajectory", "stages", to=[]),
        "stages must be at least one",
    ),
    "notes in words": (attribute("", "versions", to="new"), "versions or checkpoint_paths is 'new'"),
    # 4: whole metadata
    "root metadata cut short": (truncated("zarr.json", 40), "metadata of .* cannot be read"),
    "root metadata of nothing": (written("zarr.json", b"{}"), "not those of a zarr v3 node"),
    "an array as root": (replaced("zarr.json", f"{PART}/ids/zarr.json"), "is a zarr array and must be a group"),
    "other versions after sealing": (
        attribute("", "versions", "torch", to="0"),
        "metadata .* changed since it was sealed",
    ),
    "a stage of another name": (attribute("stage_0", "name", to="x"), "is of stage 'x', and must be of 'train'"),
    "stage metadata cut short": (truncated("stage_0/zarr.json", 30), "metadata of .*stage_0 cannot be read"),
    "checkpoint metadata cut short": (truncated(f"{DATA}/zarr.json", 30), "metadata of .*checkpoint_1 cannot be read"),
    "another step after sealing": (attribute(DATA, "step", to=0), "metadata .* changed since it was sealed"),
    "another seed": (attribute("", "settings", "sketch", "seed", to=6), "changed since it was sealed"),
    # 5: stages and parts
    "no stage": (gone("stage_0"), "stage_0 is missing"),
    "no first part": (gone(PART), "stage_0/part_0 is missing"),
    "a part that is an array": (replaced(f"{PART}/zarr.json", f"{PART}/ids/zarr.json"), "is a zarr array and must be"),
    "an array that is a group": (replaced(f"{DATA}/d1/zarr.json", f"{DATA}/zarr.json"), "group and must be an array"),
    "parts with a gap": (attribute("stage_0/part_1", "start", to=91), "starts at row 91, and 90 rows are before it"),
    "a part without n": (without(PART, "n"), "attributes are .* must be"),
    "a part with n in words": (attribute(PART, "n", to="90"), "must be integers"),
    "a part of no rows": (attribute(PART, "n", to=0), "out of range"),
    "a part of other rows": (attribute(PART, "n", to=91), "is not as the bank's settings want it"),
    # 6 and 7: shards and ids
    "a shard of parts of batches": (attribute(PART, "shard_rows", to=20), "20 is no multiple of its batch_size 8"),
    "ids of another type": (attribute(PART, "id_type", to="float"), "id_type is 'float'"),
    "an id twice": (doubled_id, "an id twice"),
    "ids missing": (gone(f"{PART}/ids"), "part_0/ids is missing"),
    "ids cut short": (truncated(f"{PART}/ids/c.0", 20), r"ids/c\.0 is truncated or altered"),
    # 8 and 9: arrays
    "an array missing": (gone(f"{DATA}/scale"), "checkpoint_1/scale is missing"),
    "a checkpoint missing": (gone(DATA), "checkpoint_1/rows is missing"),
    "another shape": (metadata(f"{DATA}/rows", "shape", [N, 33]), "shape is .*33.* must be .*32"),
    "another type": (metadata(f"{DATA}/d1", "data_type", "float64"), "data_type is 'float64' and must be 'float32'"),
    "another fill value": (metadata(f"{DATA}/d1", "fill_value", 0.0), "fill_value is 0.0 and must be 'NaN'"),
    "no checksum": (
        metadata(f"{DATA}/d1", "codecs", [{"name": "bytes", "configuration": {"endian": "little"}}]),
        "codecs is",
    ),
    "an unknown codec": (metadata(f"{DATA}/d1", "codecs", [{"name": "magic"}]), "cannot be read .*magic"),
    # 12 and 15: marks and seals
    "a mark cut short": (truncated(f"{DATA}/committed/c.2.0.0", 7), r"committed/c\.2\.0\.0 is truncated or altered"),
    "a mark altered": (flipped(f"{DATA}/committed/c.2.0.0", 5), r"committed/c\.2\.0\.0 is truncated or altered"),
    "a mark gone": (gone(f"{DATA}/committed/c.2.0.0"), "marks .* changed since it was sealed"),
    "the mark of another shard": (
        replaced(f"{DATA}/committed/c.2.0.0", f"{DATA}/committed/c.1.0.0"),
        "marks .* changed since it was sealed",
    ),
    "a seal altered": (flipped(f"{PART}/seal/c.0.0", 3), r"seal/c\.0\.0 is truncated or altered"),
    "the seal of another part": (
        replaced(f"{PART}/seal/c.0.0", "stage_0/part_1/seal/c.0.0"),
        "changed since it was sealed",
    ),
    "other ids": (
        lambda bank: zarr.open_array(bank / PART / "ids", mode="r+").__setitem__(3, 777),
        "ids or commit marks .* changed since it was sealed",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_malformed_is_refused_by_name(bank, case):
    change, named = REFUSED[case]
    change(bank)
    with pytest.raises(BankError, match=f"(?s){named}"):
        banks.open(bank)
    assert not banks.verify(bank).ok


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda path: None, "nothing is there; build one"),
        (lambda path: path.write_text("rows"), "is a file, and a bank is a folder"),
        (lambda path: path.mkdir(), "nothing is there; build one"),
        (lambda path: (path.mkdir(), (path / "a.txt").touch()), r"no zarr.json, but \['a.txt'\]"),
        (lambda path: (path.mkdir(), (path / "a").symlink_to("/")), r"no zarr.json, but \['a'\]"),
        (lambda path: zarr.create_group(path, zarr_format=2), "a zarr v2 node"),
        (lambda path: zarr.create_group(path), "format is None"),
        (lambda path: zarr.create_array(path, shape=(3,), dtype="int8"), "is a zarr array and must be a group"),
    ],
)
def test_what_is_no_bank_is_refused_by_name(tmp_path, make, named):
    make(tmp_path / "bank")
    with pytest.raises(BankError, match=named):
        banks.open(tmp_path / "bank")
    (problem,) = banks.verify(tmp_path / "bank").problems
    assert re.search(named, problem)


# What opening does not read: the rows. Reading them does, and verify says where. ---------------------------------

ROWS = f"{DATA}/rows/c.1.0"
PLACE = r"shard 1 \(rows 24 to 47\) of stage 'train' at the checkpoint of step 20"
DAMAGED = {
    "rows missing": (gone(ROWS), rf"c\.1\.0 is missing: {PLACE}"),
    "rows cut short": (truncated(ROWS, -9), rf"c\.1\.0 is truncated or altered .*{PLACE}"),
    "rows cut to nothing": (truncated(ROWS, 0), rf"c\.1\.0 is truncated to nothing: {PLACE}"),
    "a bit of the rows": (flipped(ROWS, 10, 3), rf"c\.1\.0 is truncated or altered .*{PLACE}"),
    "a bit of the shard index": (flipped(ROWS, -8), rf"c\.1\.0 is truncated or altered .*{PLACE}"),
    "a bit of the scales": (flipped(f"{DATA}/scale/c.1", 10), rf"scale/c\.1 is truncated or altered .*{PLACE}"),
    "a bit of the derivatives": (flipped(f"{DATA}/d2/c.1", 0), rf"d2/c\.1 is truncated or altered .*{PLACE}"),
    "sampled rows missing": (gone(f"{DATA}/fisher_rows/c.1.0"), rf"fisher_rows/c\.1\.0 is missing: {PLACE}"),
}
FOREIGN = {
    "rows of another shard": (replaced(ROWS, f"{DATA}/rows/c.0.0"), rf"c\.1\.0 is whole, but not what .*{PLACE}"),
    "rows of another checkpoint": (
        replaced(ROWS, f"{PART}/checkpoint_0/rows/c.1.0"),
        rf"c\.1\.0 is whole, but not what was committed as {PLACE}",
    ),
    "derivatives made elsewhere": (
        written(f"{DATA}/d1/c.1", with_checksum(np.zeros(24, "<f4"))),
        rf"d1/c\.1 is whole, but not what was committed as {PLACE}",
    ),
}
BESIDE = {
    "a shard too many": (written(f"{DATA}/rows/c.4.0", b"shard"), r"c\.4\.0 does not belong"),
    "a file at the root": (written("notes.txt", b""), r"notes\.txt does not belong"),
    "a hash of data": (flipped(f"{DATA}/batch_hashes/c.1.0", 1), r"batch_hashes/c\.1\.0 is truncated or altered"),
}


def read_all(path):
    stage = banks.open(path).stages[0]
    for checkpoint in range(stage.n_checkpoints):
        for what in ("output", "sampled_fisher"):
            list(stage.iter_rows(checkpoint, what))


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_rows_are_refused_when_read(bank, case):
    change, named = DAMAGED[case]
    change(bank)
    with pytest.raises(BankError, match=named):
        read_all(bank)


@pytest.mark.parametrize("case", {**DAMAGED, **FOREIGN, **BESIDE})
def test_verify_says_what_is_wrong_where(bank, case):
    change, named = {**DAMAGED, **FOREIGN, **BESIDE}[case]
    change(bank)
    report = banks.verify(bank)
    assert not report.ok
    assert len(report.problems) == 1
    with pytest.raises(BankError, match=named):
        raise BankError(report.problems[0])


def test_verify_names_the_damaged_weights(bank):
    digest = banks.open(bank).trajectory.stages[0].checkpoints[0].hash
    flipped(f"weights/{digest}/c.0", 200)(bank)
    assert [digest in problem for problem in banks.verify(bank).problems] == [True]
    with pytest.raises(BankError, match=digest):
        banks.open(bank).checkpoint(0, 0)
    assert banks.open(bank).checkpoint(0, 1).step == 20


def test_verify_names_a_mark_and_the_seal_above_it(bank):
    (bank / DATA / "committed/c.2.0.0").unlink()
    problems = banks.verify(bank).problems
    assert problems[0].startswith("not done: shard 2 (rows 48 to 71)")
    assert "changed since it was sealed" in problems[1]


def test_verify_reads_every_byte(original):
    report = banks.verify(original)
    files = [file for file in original.rglob("*") if file.is_file()]
    assert report.ok
    assert report.problems == []
    assert report.files == len(files)
    assert report.bytes_read == sum(file.stat().st_size for file in files)


def test_verify_of_an_unfinished_bank_names_what_is_missing(tmp_path):
    bank = make_run().build(tmp_path / "bank", shard=(0, 2))
    problems = bank.verify().problems
    assert sum(problem.startswith("not done: shard") for problem in problems) == 4
    assert "not sealed" in problems[-1]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    torch.set_num_threads(1)
    return make_run(checkpoints=1, n=9).build(tmp_path_factory.mktemp("small") / "bank").path


@given(st.data())
@settings(max_examples=60)
def test_any_flipped_bit_is_found(small, data):
    file = data.draw(st.sampled_from(sorted(file for file in small.rglob("*") if file.is_file())))
    content = file.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[place] ^= 1 << data.draw(st.integers(0, 7))
    if file.name == "zarr.json" and same_json(content, bytes(changed)):
        return
    try:
        file.write_bytes(bytes(changed))
        assert not banks.verify(small).ok
    finally:
        file.write_bytes(content)


@pytest.mark.parametrize("name", ["rows/c.0.0", "d1/c.0", "committed/c.0.0.0", "batch_hashes/c.0.0"])
def test_any_truncation_is_found(small, name):
    file = small / PART / "checkpoint_0" / name
    content = file.read_bytes()
    part, kind = banks.open(small).parts[0], name.split("/")[0]
    try:
        for length in [*range(0, len(content), max(1, len(content) // 40)), len(content) - 1]:
            file.write_bytes(content[:length])
            with pytest.raises(BankError, match="truncated"):
                banks.open(small) if kind == "committed" else part.read(0, kind, 0)
    finally:
        file.write_bytes(content)


def same_json(one, other):
    """Whether two texts are the same document, as white space is no content."""
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


def test_fits_beside_the_rows_are_no_part_of_the_bank(bank):
    fits = zarr.open_group(bank / "fits", mode="a")
    fits.create_array("B", data=np.ones(10))
    opened = banks.open(bank)
    assert [f"the fit {bank / 'fits/B'} is damaged" in problem for problem in opened.verify().problems] == [True]
    assert opened.nbytes()["fits"] > 80


def test_consolidated_metadata_are_no_damage(bank):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(bank)
    assert banks.open(bank).verify().ok


def test_a_read_only_bank_opens(bank):
    for folder, _, files in os.walk(bank, topdown=False):
        for name in files:
            os.chmod(os.path.join(folder, name), stat.S_IRUSR)
        os.chmod(folder, stat.S_IRUSR | stat.S_IXUSR)
    before = {file: file.stat().st_mtime_ns for file in bank.rglob("*")}
    try:
        opened = banks.open(bank)
        opened.finalize()
        assert opened.verify().ok
        read_all(bank)
        assert opened.final_checkpoint().step == 20
    finally:
        for folder, _, _ in os.walk(bank):
            os.chmod(folder, stat.S_IRWXU)
    assert {file: file.stat().st_mtime_ns for file in bank.rglob("*")} == before
