"""What is on the disk when, as far as this can be seen without pulling the plug."""

from pathlib import Path

import pytest
from bank_runs import make_run

from source_proj._io import files


@pytest.fixture
def events(monkeypatch):
    """What is flushed and renamed, in order."""
    found = []
    sync_one, replace = files._sync_one, Path.replace

    def syncing(path):
        sync_one(path)
        found.append(("sync", path))

    def replacing(self, target):
        found.append(("rename", self, target))
        return replace(self, target)

    monkeypatch.setattr(files, "_sync_one", syncing)
    monkeypatch.setattr(Path, "replace", replacing)
    return found


def test_a_file_is_flushed_before_it_gets_its_name_and_its_name_before_the_return(tmp_path, events):
    files.write_files({tmp_path / "a": b"one", tmp_path / "b": b"two"})
    assert (tmp_path / "a").read_bytes() == b"one"
    assert [kind for kind, *_ in events] == ["sync", "sync", "rename", "rename", "sync"]
    assert {event[1] for event in events[:2]} == {event[1] for event in events[2:4]}
    assert events[4] == ("sync", tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "b"]


def test_a_mark_is_written_when_its_shard_is_on_the_disk(tmp_path, events):
    bank = make_run(checkpoints=1, n=10).build(tmp_path / "bank")
    part = bank.parts[0]
    mark = part.file(0, "committed", 0)
    (written,) = (i for i, event in enumerate(events) if event[0] == "rename" and event[2] == mark)
    synced = {event[1] for event in events[:written] if event[0] == "sync"}
    for name in part.data(0):
        file = part.file(0, name, 0)
        (renamed,) = (i for i, event in enumerate(events) if event[0] == "rename" and event[2] == file)
        assert events[renamed][1] in {event[1] for event in events[:renamed] if event[0] == "sync"}
        assert ("sync", file.parent) in events[renamed:written]
    assert bank.path / "zarr.json" not in synced  # it got there under its temporary name
    assert any(path.name == "zarr.json" for path in synced)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"old")

    def failing(paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_sync", failing)
    with pytest.raises(OSError, match="No space"):
        files.write_files({tmp_path / "a": b"new", tmp_path / "b": b"new"})
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_folder_is_published_whole_by_the_first(tmp_path):
    path = tmp_path / "deep" / "folder"

    def fill(content):
        def write(folder):
            assert not path.exists() or content == "second"
            (folder / "content").write_text(content)
            (folder / "inner").mkdir()

        return write

    assert files.publish(path, fill("first"), beside=path)
    assert not files.publish(path, fill("second"), beside=path)
    assert (path / "content").read_text() == "first"
    assert [entry.name for entry in path.parent.iterdir()] == ["folder"]


def test_one_who_loses_the_race_halfway_gives_way(tmp_path):
    path = tmp_path / "folder"

    def overtaken(folder):
        assert files.publish(path, lambda other: (other / "content").write_text("winner"), beside=path)
        (folder / "content").write_text("loser")  # the winner has removed this folder

    assert not files.publish(path, overtaken, beside=path)
    assert (path / "content").read_text() == "winner"
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_a_failure_is_no_race(tmp_path):
    def failing(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        files.publish(tmp_path / "folder", failing, beside=tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_only_what_is_left_of_the_named_folder_is_removed(tmp_path):
    names = [f".bank.{'0' * 32}.creating", f".bank.stage_0.part_1.{'0' * 32}.creating", f".bank2.{'0' * 32}.creating"]
    for name in names:
        (tmp_path / name).mkdir()
    files.remove_unpublished(tmp_path / "bank")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(names[1:])
    files.remove_unpublished(files.beside_part(tmp_path / "bank", tmp_path / "bank" / "stage_0" / "part_1"))
    assert [entry.name for entry in tmp_path.iterdir()] == names[2:]
