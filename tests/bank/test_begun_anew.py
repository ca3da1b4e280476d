"""What failed before its first row gives way to the next build, unless somebody is at work on it."""

import sys

import pytest
import torch
from bank_runs import BATCH, N, make_data, make_run
from torch.utils.data import TensorDataset

from source_proj._errors import BankError, GradientError, MismatchError
from source_proj.bank.build.at_work import AT_WORK, at_work
from source_proj.bank.store import LocalStore
from source_proj.sketch import Sketch
from source_proj.task import Task


def broken(output, batch):
    return torch.full_like(output, torch.nan), None


def failed(run, path, data=None):
    """A build whose first batch fails, of other settings and examples."""
    data = data or make_data(BATCH)
    with pytest.raises(GradientError, match="not finite"):
        run.build(path, data=data, task=Task(lambda model, batch: model(batch[0])[:, 0], broken), sketch=Sketch(dim=32))


@pytest.fixture
def run():
    return make_run(checkpoints=2)


def content(path):
    return {key: LocalStore(path).get(key) for key in LocalStore(path).list()}


def test_a_failed_build_gives_way(run, tmp_path):
    failed(run, tmp_path / "bank")
    assert (tmp_path / "bank/zarr.json").exists()
    assert not LocalStore(tmp_path / "bank").leftovers()
    (tmp_path / "bank/stage_0/part_0/checkpoint_0/committed/c.0.0.0.choice.partial").write_bytes(b"a dead writer's")
    assert run.build(tmp_path / "bank").finalized
    run.build(tmp_path / "afresh")
    assert content(tmp_path / "bank") == content(tmp_path / "afresh")


def test_nothing_gives_way_to_a_build_that_begins_a_new_bank(run, tmp_path):
    failed(run, tmp_path / "bank")
    with pytest.raises(BankError, match="resume=False"):
        run.build(tmp_path / "bank", resume=False)


def test_what_others_are_at_work_on_stays(run, tmp_path):
    failed(run, tmp_path / "bank")
    before = content(tmp_path / "bank")
    with at_work(LocalStore(tmp_path / "bank")) as other:
        other.share()
        with pytest.raises(MismatchError, match=rf"the bank {tmp_path}/bank was begun with other settings.*remove it"):
            run.build(tmp_path / "bank")
    assert content(tmp_path / "bank") == before
    assert run.build(tmp_path / "bank").finalized


def test_who_was_stopped_while_it_replaced_a_bank_is_not_waited_for_without_end(run, tmp_path, monkeypatch):
    failed(run, tmp_path / "bank")
    monkeypatch.setattr(sys.modules["source_proj.bank.build.at_work"], "_WAIT", 0.1)
    with (
        at_work(LocalStore(tmp_path / "bank")),
        pytest.raises(BankError, match=r"about to replace the bank .*: end it"),
    ):
        run.build(tmp_path / "bank")  # the other one never shares
    assert run.build(tmp_path / "bank").finalized


def test_the_lock_that_a_killed_builder_left_goes_with_the_next_call(run, tmp_path):
    bank = run.build(tmp_path / "bank")
    for again in (lambda: run.build(tmp_path / "bank"), bank.finalize):
        (tmp_path / "bank" / AT_WORK).touch()
        again()
        assert not bank.store.leftovers()


def test_a_bank_with_rows_stays_and_is_named(run, tmp_path):
    run.build(tmp_path / "bank", shard=(0, 2))
    before = content(tmp_path / "bank")
    with pytest.raises(MismatchError, match=rf"the bank {tmp_path}/bank holds .*begun with {N} examples, got {BATCH}.*"
                       "remove it to begin anew, or give another path"):  # fmt: skip
        run.build(tmp_path / "bank", data=make_data(BATCH))
    assert content(tmp_path / "bank") == before


def test_a_removal_that_is_killed_is_gone_on_with(run, tmp_path, monkeypatch):
    delete, left = LocalStore.delete, 0

    def killed(store, key):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        delete(store, key)

    for number in (0, 1, 5, 20, 60):
        path, left = tmp_path / f"{number}", number
        failed(run, path)
        with monkeypatch.context() as patch:
            patch.setattr(LocalStore, "delete", killed)
            with pytest.raises(KeyboardInterrupt):
                run.build(path)
        assert run.build(path).finalized


def test_what_is_no_banks_stays(run, tmp_path):
    (tmp_path / "stage_0").mkdir()
    for name in ("stage_0/model.pt", "stage_0/zarr.json"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(BankError, match="is no bank"):
        run.build(tmp_path)
    assert (tmp_path / "stage_0/model.pt").read_text() == (tmp_path / "stage_0/zarr.json").read_text() == "mine"


def test_a_build_that_never_begins_leaves_no_folder(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["source_proj.bank.build.build"], "known_space", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.build(tmp_path / "above/bank")
    assert not (tmp_path / "above").exists()


def test_a_failed_append_gives_way(run, tmp_path):
    bank = run.build(tmp_path / "bank")
    x, y = make_data(BATCH, seed=3).tensors
    spoiled = torch.where(torch.arange(BATCH)[:, None] == 3, torch.nan, x)
    with pytest.raises(GradientError):
        bank.append(run.model, run.task, TensorDataset(spoiled, y))
    more = make_data(2 * BATCH, seed=4)
    with at_work(bank.store) as other:
        other.share()
        with pytest.raises(MismatchError, match="begun by another append"):
            bank.append(run.model, run.task, more)
    assert bank.append(run.model, run.task, more) == 2 * BATCH
    assert bank.finalized
    assert bank.verify().ok
    assert AT_WORK not in bank.store.leftovers()
