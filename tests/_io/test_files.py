"""What is on the disk when, as far as this can be seen without pulling the plug."""

import errno
import threading
from pathlib import Path

import pytest

from source_proj._io import files


@pytest.fixture
def events(monkeypatch):
    """What is flushed and renamed, in order."""
    log = []
    sync_path, replace = files._sync_path, Path.replace

    def syncing(path):
        sync_path(path)
        log.append(("sync", path))

    def replacing(self, target):
        log.append(("rename", self, target))
        return replace(self, target)

    monkeypatch.setattr(files, "_sync_path", syncing)
    monkeypatch.setattr(Path, "replace", replacing)
    return log


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_is_flushed_before_it_gets_its_name_and_its_name_before_the_return(tmp_path, events):
    files.write_files({tmp_path / "a": b"first", tmp_path / "b": lambda file: file.write(b"second")})
    assert (tmp_path / "a").read_bytes() == b"first"
    assert (tmp_path / "b").read_bytes() == b"second"
    assert [kind for kind, *_ in events] == ["sync", "sync", "rename", "rename", "sync"]
    assert {event[1] for event in events[:2]} == {event[1] for event in events[2:4]}
    assert events[4] == ("sync", tmp_path)
    assert names(tmp_path) == ["a", "b"]


def test_a_written_file_replaces_what_was_there(tmp_path):
    (tmp_path / "a").write_bytes(b"old, and longer")
    files.write_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize("write", [files.write_files, files.write_new_files])
@pytest.mark.parametrize("fails", ["_sync", "content"])
def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch, write, fails):
    (tmp_path / "a").write_bytes(b"old")

    def failing(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if fails == "_sync":
        monkeypatch.setattr(files, "_sync", failing)
    content = failing if fails == "content" else b"new"
    with pytest.raises(OSError, match="No space"):
        write({tmp_path / "a": b"new", tmp_path / "b": content})
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_never_replaces_another(tmp_path, monkeypatch, links):
    if not links:

        def refusing(source, target):
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(files.os, "link", refusing)
    (tmp_path / "a").write_bytes(b"first")
    assert files.write_new_files({tmp_path / "a": b"second", tmp_path / "b": b"second"}) == {tmp_path / "a"}
    assert (tmp_path / "a").read_bytes() == b"first"
    assert (tmp_path / "b").read_bytes() == b"second"
    assert names(tmp_path) == ["a", "b"]


def test_of_many_writers_of_a_new_file_just_one_is_first(tmp_path):
    barrier, taken = threading.Barrier(8), {}

    def write(number):
        barrier.wait()
        taken[number] = files.write_new_files({tmp_path / "a": str(number).encode()})

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [number for number, paths in taken.items() if not paths]
    assert (tmp_path / "a").read_bytes() == str(winner).encode()
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["a" * 255, "é" * 127])
def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path, name):
    files.write_file(tmp_path / name, b"content")
    assert files.write_new_files({tmp_path / name: b"other"}) == {tmp_path / name}
    (tmp_path / name).unlink()
    assert files.publish(tmp_path / name, lambda folder: (folder / "content").touch())
    assert names(tmp_path) == [name]


def test_a_folder_is_published_whole_by_the_first(tmp_path):
    path = tmp_path / "deep" / "folder"

    def fill(content):
        def write(folder):
            assert not path.exists() or content == "second"
            (folder / "content").write_text(content)
            (folder / "inner").mkdir()

        return write

    assert files.publish(path, fill("first"))
    assert not files.publish(path, fill("second"))
    assert (path / "content").read_text() == "first"
    assert names(path.parent) == ["folder"]


def test_one_who_loses_the_race_halfway_gives_way(tmp_path):
    path = tmp_path / "folder"

    def overtaken(folder):
        assert files.publish(path, lambda other: (other / "content").write_text("winner"))
        (folder / "content").write_text("loser")  # the winner has removed this folder

    assert not files.publish(path, overtaken)
    assert (path / "content").read_text() == "winner"
    assert names(tmp_path) == ["folder"]


def test_a_failure_is_no_race(tmp_path):
    def failing(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        files.publish(tmp_path / "folder", failing)
    assert names(tmp_path) == []


def test_only_what_is_left_of_the_named_folder_is_removed(tmp_path):
    left = [f".folder.{'0' * 32}.creating", f".folder2.{'0' * 32}.creating"]
    for name in left:
        (tmp_path / name).mkdir()
    assert files.publish(tmp_path / "folder", lambda folder: (folder / "content").touch())
    assert names(tmp_path) == sorted(["folder", left[1]])
