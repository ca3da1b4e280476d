"""What the format asks of any store; a store's test class inherits this and says how to reach the bytes without it."""

from __future__ import annotations

import threading
from abc import abstractmethod

import pytest

from source_proj.bank.store import Store

KEYS = ["zarr.json", "part/rows/c.0.0", "part/rows/c.10.0", "part/rows/c.2.0", "part.x/zarr.json", "name with space/é"]


class StoreContract:
    """Laws of a store."""

    @pytest.fixture
    @abstractmethod
    def store(self, tmp_path) -> Store:
        """An empty store."""

    @abstractmethod
    def place(self, store: Store, key: str, content: bytes) -> None:
        """Put bytes there without the store."""

    @abstractmethod
    def fetch(self, store: Store, key: str) -> bytes | None:
        """Get bytes from there without the store; None where there are none."""

    @abstractmethod
    def twin(self, store: Store) -> Store:
        """Another store of the same place, as another process has it."""

    def test_an_empty_store_is_empty(self, store):
        assert list(store.list()) == []
        assert list(store.list("part")) == []
        assert list(store.leftovers()) == []
        assert store.stat("zarr.json") is None

    @pytest.mark.parametrize("key", KEYS)
    @pytest.mark.parametrize("content", [b"", b"content", bytes(range(256)) * 4096])
    def test_what_was_put_is_there_whole(self, store, key, content):
        store.put({key: content})
        assert self.fetch(store, key) == content
        assert store.get(key) == content
        assert self.twin(store).get(key) == content
        assert store.exists(key)
        assert store.stat(key).size == len(content)

    def test_what_lies_there_is_found(self, store):
        self.place(store, "part/rows/c.0", b"content")
        assert store.get("part/rows/c.0") == b"content"
        assert list(store.list()) == ["part/rows/c.0"]

    def test_put_replaces(self, store):
        store.put({"a": b"first, and longer", "b/c": b"first"})
        before = store.stat("a")
        store.put({"a": b"second"})
        assert self.fetch(store, "a") == b"second"
        assert self.fetch(store, "b/c") == b"first"
        assert store.stat("a").version != before.version

    def test_a_version_changes_with_the_object_even_where_its_size_stays(self, store):
        store.put({"a": b"abc", "b": b"xyz"})
        seen = {store.stat("a").version, store.stat("b").version}
        self.place(store, "a", b"xyz")
        seen.add(store.stat("a").version)
        store.put({"a": b"abd"})
        seen.add(store.stat("a").version)
        assert len(seen) == 4

    def test_put_if_absent_never_replaces(self, store):
        self.place(store, "part/a", b"first")
        assert store.put_if_absent({"part/a": b"second", "part/b": b"second"}) == {"part/a"}
        assert self.fetch(store, "part/a") == b"first"
        assert self.fetch(store, "part/b") == b"second"
        assert store.put_if_absent({"part/a": b"third", "part/b": b"third"}) == {"part/a", "part/b"}

    def test_of_many_writers_of_an_absent_object_just_one_is_first(self, store):
        barrier, taken = threading.Barrier(8), {}

        def write(number):
            mine = self.twin(store)
            barrier.wait()
            taken[number] = mine.put_if_absent({"part/a": str(number).encode()})

        threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = [number for number, keys in taken.items() if not keys]
        assert self.fetch(store, "part/a") == str(winner).encode()
        assert list(store.list()) == ["part/a"]

    def test_a_reader_sees_one_whole_object_or_another(self, store):
        contents = [bytes([value]) * 300_000 for value in (0, 1)]
        store.put({"a": contents[0]})
        done = threading.Event()

        def write():
            for turn in range(60):
                store.put({"a": contents[turn % 2]})
            done.set()

        thread = threading.Thread(target=write)
        thread.start()
        seen = [self.twin(store).get("a")]  # writes to memory may be over at once
        while not done.is_set():
            seen.append(self.twin(store).get("a"))
        thread.join()
        assert all(content in contents for content in seen)

    def test_lists_are_in_order_and_of_whole_names(self, store):
        store.put(dict.fromkeys(KEYS, b"x"))
        assert list(store.list()) == sorted(KEYS)
        assert list(store.list("part")) == sorted(key for key in KEYS if key.startswith("part/"))
        assert list(store.list("part/rows")) == sorted(key for key in KEYS if key.startswith("part/rows/"))
        assert list(store.list("par")) == []
        assert list(store.list("zarr.json/x")) == []

    def test_deleted_objects_are_gone_and_no_others(self, store):
        store.put({"part/a": b"x", "part/b": b"x"})
        store.delete("part/a")
        store.delete("part/a")
        store.delete("never/there")
        assert self.fetch(store, "part/a") is None
        assert list(store.list()) == ["part/b"]
        store.delete("part/b")
        assert list(store.list()) == []
        store.put({"part/a": b"again"})
        assert store.get("part/a") == b"again"

    def test_what_is_not_there_is_said_so(self, store):
        store.put({"part/a": b"x"})
        for key in ("b", "part", "part/b", "other/a"):
            assert store.stat(key) is None
            assert not store.exists(key)
            with pytest.raises(OSError, match=r".+"):
                store.get(key)
        with pytest.raises(FileNotFoundError):
            store.get("part/b")

    @pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../../b", ".", "a/./b", "a\\b", "a\0b"])
    def test_what_leads_elsewhere_is_no_key(self, store, key):
        for call in (store.get, store.stat, store.delete, lambda key: store.put({key: b"x"})):
            with pytest.raises(ValueError, match="is no key"):
                call(key)
        assert list(store.list()) == []

    def test_a_copy_is_whole_and_its_source_stays(self, store):
        store.put({"part/a": b"first", "b": b"second", "c": b"x"})
        store.copy({"c": "part/a", "new/d": "b"})
        assert [self.fetch(store, key) for key in ("part/a", "b", "c", "new/d")] == [b"first", b"second"] * 2
        store.copy({"c": "part/a"})  # once more
        store.put({"c": b"third"})
        store.delete("b")
        assert [self.fetch(store, key) for key in ("part/a", "c", "new/d")] == [b"first", b"third", b"second"]
        assert list(store.list()) == ["c", "new/d", "part/a"]
        assert list(store.leftovers()) == []
        with pytest.raises(FileNotFoundError):
            store.copy({"c": "never/there"})
        assert self.fetch(store, "c") == b"third"

    def test_temporary_objects_are_listed_apart(self, store):
        store.put({"part/a": b"x"})
        assert store.put_if_absent({"part/a.0123.partial": b"half", "b.partial": b"half"}) == set()
        self.place(store, "part/rows/c.0.partial", b"half")
        assert list(store.list()) == list(store.list("part")) == ["part/a"]
        assert list(store.leftovers()) == ["b.partial", "part/a.0123.partial", "part/rows/c.0.partial"]
        assert list(store.leftovers("part/rows")) == ["part/rows/c.0.partial"]
        assert store.get("part/a.0123.partial") == b"half"
        for key in store.leftovers():
            store.delete(key)
        assert sorted(store.keys()) == ["part/a"]

    def test_a_location_names_the_object(self, store):
        assert store.location("part/a").endswith("part/a")
        assert store.location("part/a").startswith(store.location())
