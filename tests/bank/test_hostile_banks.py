"""Banks from strangers, and places that are no good: refused by name, at once, with little memory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bank_runs import N, make_data, make_run

from source_proj import bank as banks
from source_proj._errors import BankError
from source_proj.bank.build.at_work import at_work
from source_proj.bank.store.local import LocalStore


@pytest.fixture(scope="module")
def run():
    return make_run()


@pytest.fixture(scope="module")
def built(run, tmp_path_factory):
    torch.set_num_threads(1)
    return run.build(tmp_path_factory.mktemp("built") / "bank").path


@pytest.fixture
def bank(built, tmp_path):
    return shutil.copytree(built, tmp_path / "bank")


def replaced(value, before, after):
    if isinstance(value, dict):
        return {key: replaced(entry, before, after) for key, entry in value.items()}
    if isinstance(value, list):
        return [replaced(entry, before, after) for entry in value]
    return after if value == before and not isinstance(value, bool) else value


BOUNDED = """
import os, resource, sys, traceback
import source_proj.bank as banks
from source_proj._errors import BankError

def judge(path):
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (200 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
    print(banks.verify(path).problems)
    try:
        list(banks.open(path).stages[0].iter_rows(0))
    except BankError as error:
        print("refused:", error)

for path in sys.argv[1:]:
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        continue
    with open(path + ".txt", "w") as sys.stdout:
        try:
            judge(path)
        except BaseException:
            traceback.print_exc(file=sys.stdout)
    os._exit(0)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_small_bank_that_claims_much_is_refused_in_little_memory(built, tmp_path):
    """Each in a fork of one process, which imports once."""
    claims = [(N, 10**8), (N, 10**15), (32, 10**9), (24, 10**8)]
    paths = []
    for sealed in (True, False):
        for before, after in claims:
            path = shutil.copytree(built, tmp_path / f"{before}_is_{after}_{'sealed' if sealed else 'open'}")
            for file in path.rglob("zarr.json"):
                file.write_text(json.dumps(replaced(json.loads(file.read_text()), before, after)))
            if not sealed:
                (path / "stage_0/part_0/seal/c.0.0").unlink()
            paths.append(str(path))
    environment = {**os.environ, "PYTHONPATH": str(Path(banks.__file__).parents[2])}
    command = [sys.executable, "-c", BOUNDED, *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    for path in paths:
        said = Path(f"{path}.txt").read_text()
        assert "refused:" in said, f"{path}: {said}"
        assert path in said


@pytest.mark.parametrize("name", ["fits", "stage_0", "weights", "stage_0/part_0/checkpoint_0/rows/c.0.0"])
def test_a_link_in_a_bank_is_refused(bank, tmp_path, name):
    path = bank / name
    if path.exists():
        path.rename(tmp_path / "moved")
    else:
        (tmp_path / "moved").mkdir()
    path.symlink_to(tmp_path / "moved")
    with pytest.raises(BankError, match=f"{name} is a link, and a bank must not hold any"):
        banks.open(bank)
    assert ["is a link" in problem for problem in banks.verify(bank).problems] == [True]


def test_what_cannot_be_read_is_not_called_altered(bank, monkeypatch):
    real, closed = LocalStore.get, bank / "stage_0/part_0/checkpoint_1/d1/c.2"

    def refusing(self, key):
        if self.location(key) == str(closed):
            raise PermissionError(13, "Permission denied", str(closed))
        return real(self, key)

    monkeypatch.setattr(LocalStore, "get", refusing)
    (problem,) = banks.verify(bank).problems
    assert str(closed) in problem
    assert "cannot be read" in problem
    assert "Permission denied" in problem
    with pytest.raises(BankError, match=r"d1/c\.2 cannot be read \(.*Permission denied"):
        list(banks.open(bank).stages[0].iter_rows(1))


def test_a_folder_that_cannot_be_listed_is_named(bank, monkeypatch):
    real = os.scandir

    def refusing(path):
        if str(path).endswith("checkpoint_1"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(BankError, match="Permission denied"):
        banks.open(bank)
    assert ["Permission denied" in problem for problem in banks.verify(bank).problems] == [True]


def test_a_relative_path_outlives_a_change_of_directory(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bank = run.build("bank")
    opened = banks.open("bank")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for each in (bank, opened):
        assert len(list(each.stages[0].iter_rows(0))) == 4
        assert each.verify().ok
        assert each.final_checkpoint().step == 20


@pytest.mark.parametrize("name", ["b" * 213, "b" * 255, "é" * 127])
def test_a_bank_may_have_any_name_that_a_folder_may(run, tmp_path, name):
    bank = run.build(tmp_path / name)
    assert banks.open(bank.path).verify().ok
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_a_name_that_is_too_long_is_said_to_be(run, tmp_path):
    with pytest.raises(BankError, match=r"cannot write the bank .*too long.*give another path"):
        run.build(tmp_path / ("b" * 256))
    with pytest.raises(BankError, match="too long"):
        banks.open(tmp_path / ("b" * 256))
    assert len(banks.verify(tmp_path / ("b" * 256)).problems) == 1


def test_ids_that_no_text_can_hold_are_refused(run, tmp_path):
    ids = [str(i) for i in range(N - 1)]
    with pytest.raises(ValueError, match=r"id 'a\\ud800' of stage 'train' holds half a surrogate pair"):
        run.build(tmp_path / "bank", ids=[*ids, "a\ud800"])
    assert not (tmp_path / "bank").exists()
    odd = [*ids, "\x00\x1b[2J\U0001f600 e\u0301"]
    assert run.build(tmp_path / "bank", ids=odd).ids == odd
    assert banks.open(tmp_path / "bank").ids == odd


# A beginning that was not finished -------------------------------------------------------------------------------


def test_what_a_killed_build_began_is_gone_on_with_or_gives_way(run, built, tmp_path):
    path = shutil.copytree(built, tmp_path / "bank")
    (path / "zarr.json").unlink()
    for file in path.rglob("c.*"):
        if "checkpoint_" in str(file) or "seal" in str(file):
            file.unlink()
    shutil.copytree(path, tmp_path / "other")
    with pytest.raises(BankError, match=r"is no bank: it has no zarr.json, but \['stage_0', 'weights'\]"):
        banks.open(path)
    assert run.build(path).fingerprint == banks.open(built).fingerprint
    with pytest.raises(BankError, match="resume=False begins a new bank"):
        run.build(tmp_path / "other", resume=False)
    assert not (tmp_path / "other/zarr.json").exists()
    with at_work(LocalStore(tmp_path / "other")) as process:
        process.share()
        with pytest.raises(BankError, match=r"was begun by a call with other arguments: .* remove"):
            run.build(tmp_path / "other", storage="float16")
    assert run.build(tmp_path / "other", storage="float16").finalized  # nobody is at work there any more


def test_an_append_without_its_group_is_no_part(run, built, tmp_path):
    path = shutil.copytree(built, tmp_path / "bank")
    beginning = path / "stage_0/part_1/seal/zarr.json"
    beginning.parent.mkdir(parents=True)
    shutil.copy(path / "stage_0/part_0/seal/zarr.json", beginning)
    report = banks.verify(path)
    assert report.ok
    assert report.leftovers == [beginning]
    assert banks.open(path).n_rows == N


@pytest.mark.parametrize("lost", ["part_1/zarr.json", "part_1"])
def test_an_appended_part_that_lost_its_file_is_no_leftover(run, bank, lost):
    """Its rows went unseen otherwise, and were removed by the next finalize."""
    for seed in (7, 8):
        banks.open(bank).append(run.model, run.task, make_data(8, seed), batch_size=8, progress=False)
    there = bank / "stage_0" / lost
    shutil.rmtree(there) if there.is_dir() else there.unlink()
    with pytest.raises(
        BankError, match=r"stage_0/part_1 has no zarr\.json, and was finished once: bring the file back"
    ):
        banks.open(bank)
    assert not banks.verify(bank).ok
    assert (bank / "stage_0/part_2/zarr.json").exists()
