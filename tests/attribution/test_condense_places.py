"""Where a condensed bank can and cannot be written: said in words, and before any work where that can be known."""

import errno

import pytest
from problems import classification

import source_proj as sp
from source_proj._errors import BankError
from source_proj.attribution import condense as module
from source_proj.bank.store.local import LocalStore

QUIET = {"progress": False}


@pytest.fixture
def bank(tmp_path) -> sp.Bank:
    return classification().build(tmp_path / "bank")


@pytest.mark.parametrize("name", ["file", "file/below", "file/far/below", "n" * 300])
def test_a_place_where_no_bank_can_be_is_refused_before_the_work(tmp_path, bank, monkeypatch, name):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(module, "mean_panels", None)  # the first work that is done
    with pytest.raises(BankError, match="file is a file, and a bank is a folder" if "file" in name else "too long"):
        sp.condense(bank, tmp_path / name, **QUIET)


@pytest.mark.parametrize("name", ["put", "put_if_absent"])
def test_a_full_disk_is_said_and_the_call_goes_on_when_it_is_repeated(tmp_path, bank, monkeypatch, name):
    place = tmp_path / "condensed"
    write, calls = getattr(LocalStore, name), []

    def fails_once(store, contents):
        if store.root == place and not calls:
            calls.append(contents)
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(store, contents)

    monkeypatch.setattr(LocalStore, name, fails_once)
    with pytest.raises(BankError, match=r"cannot write .*condensed: .*No space.*make room"):
        sp.condense(bank, place, **QUIET)
    assert calls
    again = sp.condense(bank, place, **QUIET)
    monkeypatch.undo()
    assert again.fingerprint == sp.condense(bank, tmp_path / "other", **QUIET).fingerprint
