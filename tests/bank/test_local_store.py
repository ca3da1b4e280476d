import errno
from pathlib import Path

import pytest
from store_contract import StoreContract

from source_proj._errors import BankError
from source_proj._io import files
from source_proj.bank.store import LocalStore, open_store


class TestLocalStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path):
        return LocalStore(tmp_path / "bank")

    def place(self, store, key, content):
        path = Path(store.location()) / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def fetch(self, store, key):
        path = Path(store.location()) / key
        return path.read_bytes() if path.is_file() else None

    def twin(self, store):
        return LocalStore(store.root)


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "bank")


def test_a_relative_folder_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = LocalStore("bank")
    store.put({"a/b": b"x"})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert store.get("a/b") == b"x"


def test_links_are_refused_wherever_they_stand(store, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/a").write_bytes(b"secret")
    store.put({"zarr.json": b"x"})
    (store.root / "fits").symlink_to(tmp_path / "outside")
    (store.root / "rows").symlink_to(tmp_path / "outside/a")
    (store.root / "broken").symlink_to(tmp_path / "nowhere")
    for key in ("fits/a", "fits/new", "rows", "broken"):
        for call in (store.get, store.stat, store.delete, *(lambda key, p=p: p({key: b"x"}) for p in puts(store))):
            with pytest.raises(BankError, match="is a link"):
                call(key)
    for prefix in ("", "fits"):
        with pytest.raises(BankError, match="is a link"):
            store.list(prefix)
    assert [entry.name for entry in (tmp_path / "outside").iterdir()] == ["a"]
    assert (tmp_path / "outside/a").read_bytes() == b"secret"


def puts(store):
    return store.put, store.put_if_absent


def test_the_folder_itself_may_be_a_link(tmp_path):
    LocalStore(tmp_path / "there").put({"a": b"x"})
    (tmp_path / "link").symlink_to(tmp_path / "there")
    assert LocalStore(tmp_path / "link").get("a") == b"x"


@pytest.mark.parametrize("links", [True, False])
def test_copies_need_no_second_names(store, monkeypatch, links):
    if not links:

        def refusing(source, target):
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(files.os, "link", refusing)
    store.put({"a": b"first", "b": b"second"})
    store.copy({"b": "a"})
    store.copy({"b": "a"})
    assert store.get("b") == b"first"
    assert sorted(store.keys()) == ["a", "b"]


def test_new_folders_are_on_the_disk_before_a_put_returns(store, monkeypatch):
    synced = []
    real = files._sync_path
    monkeypatch.setattr(files, "_sync_path", lambda path: (synced.append(path), real(path)))
    store.put({"a/b/c": b"x"})
    assert {store.root.parent, store.root, store.root / "a", store.root / "a/b"} <= set(synced)


def test_a_full_disk_leaves_nothing_half(store, monkeypatch):
    store.put({"a": b"first"})

    def failing(paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_sync", failing)
    for put in puts(store):
        with pytest.raises(OSError, match="No space"):
            put({"a": b"second", "b": b"second"} if put == store.put else {"b": b"second"})
    assert list(store.list()) == ["a"]
    assert list(store.leftovers()) == []
    assert store.get("a") == b"first"


@pytest.mark.parametrize("place", [None, 3, b"bank", ["bank"]])
def test_what_names_no_place_is_refused(place):
    with pytest.raises(TypeError, match="a bank is named by a folder or a URL"):
        open_store(place)


def test_an_empty_name_is_not_the_working_directory():
    with pytest.raises(BankError, match="the name of a bank is empty"):
        open_store("")
