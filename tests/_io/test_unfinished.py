"""An output in the making: what a killed process left is gone on with, what is someone else's is left alone."""

import pytest

from source_proj._io.unfinished import Unfinished

ABOUT = {"of": "this test"}


class Killed(BaseException):
    """What nobody handles."""


def kill(*_, **__):
    raise Killed


STEPS = {
    "the folder is made": "source_proj._io.locks.FolderLock.acquire",
    "the lock is held": "source_proj._io.unfinished.Unfinished._begun",
    "it is described": "source_proj._io.unfinished.write_file",
}


@pytest.mark.parametrize("step", STEPS)
def test_one_that_was_stopped_while_it_began_is_gone_on_with(tmp_path, monkeypatch, step):
    with monkeypatch.context() as patched:
        patched.setattr(STEPS[step], kill)
        with pytest.raises(Killed):
            Unfinished(tmp_path / "x", ABOUT).__enter__()
    with Unfinished(tmp_path / "x", ABOUT) as unfinished:
        assert unfinished.folder.is_dir()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_was_about_to_rename_goes(tmp_path):
    killed = Unfinished(tmp_path / "x", ABOUT)
    (killed.__enter__().content / "c").mkdir(parents=True)
    for name in ("zarr.json", "zarr.0123.partial", "c/0", "c/0.4567.partial"):
        (killed.content / name).write_bytes(b"")
    killed.__exit__(Killed, Killed(), None)
    with Unfinished(tmp_path / "x", ABOUT) as unfinished:
        assert sorted(path.name for path in unfinished.content.rglob("*")) == ["0", "c", "zarr.json"]


@pytest.mark.parametrize("what", ["a file", "a folder with a file"])
def test_what_is_no_output_in_the_making_is_left_alone(tmp_path, what):
    place = tmp_path / ".x.unfinished"
    if what == "a file":
        place.write_bytes(b"mine")
    else:
        place.mkdir()
        (place / "mine").write_bytes(b"mine")
    with (
        pytest.raises(FileExistsError, match="in the way, and no output in the making"),
        Unfinished(tmp_path / "x", ABOUT),
    ):
        pass
    assert (place if what == "a file" else place / "mine").read_bytes() == b"mine"
