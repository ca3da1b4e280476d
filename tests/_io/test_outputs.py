"""Outputs are whole or as they were, whatever happens, and one rule holds for what is there already."""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from torch import nn

import source_proj as sp
from source_proj._io.outputs import write_output_folder, write_outputs
from source_proj.attribution.score_files import FACTS, is_scores_array
from source_proj.attribution.streaming import checked_out
from source_proj.integrations import RecorderCallback
from source_proj.report import Page, write_report

OLD, NEW = np.full((3, 5), 1, np.float32), np.full((3, 5), 2, np.float32)


def scores(values):
    return sp.Scores(values, [0, 1, 2], list("abcde"), unit="logit margin")


def as_zarr(path, values, **options):
    scores(values).to_zarr(path, **options)


def as_page(path, values, **options):
    write_report(Page(title=str(values[0, 0]), summary="", sections=(), unit="nats"), path, **options)


def as_two_files(path, values, overwrite=False):
    write_outputs({path: values.tobytes(), path.with_name(f"{path.name}.json"): b"{}"}, overwrite=overwrite)


def content(path):
    if path.is_dir():
        return zarr.open_array(path, mode="r")[...].tobytes()
    return path.read_bytes()


EVENTS = {"open", "os.rename", "os.mkdir", "os.link", "os.remove", "os.rmdir", "shutil.rmtree"}
WRITERS = [as_zarr, as_page, as_two_files]


@pytest.fixture(params=WRITERS, ids=lambda writer: writer.__name__)
def write(request):
    return request.param


def test_nothing_is_overwritten_unless_it_is_said(tmp_path, write):
    path = tmp_path / "output"
    write(path, OLD)
    before = content(path)
    with pytest.raises(FileExistsError, match=r"output.* exists: remove it, give another path, or say overwrite=True"):
        write(path, NEW)
    assert content(path) == before
    write(path, NEW, overwrite=True)
    assert content(path) != before
    assert {entry.name for entry in tmp_path.iterdir()} <= {"output", "output.json"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("there", ["file", "folder", "link", "dangling link"])
def test_whatever_is_there_counts(tmp_path, write, there, overwrite):
    if (there, overwrite) == ("file", True) and write is not as_zarr:
        pytest.skip("a file in place of a file is what overwriting means")
    path, elsewhere = tmp_path / "output", tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    if there == "file":
        path.write_text("mine")
    elif there == "folder":
        (path / "inner").mkdir(parents=True)
    else:
        path.symlink_to(elsewhere if there == "link" else tmp_path / "nowhere")
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match="output exists"):
        write(path, NEW, overwrite=overwrite)
    assert tree(tmp_path) == before


def tree(root):
    """All that is below a folder: links by where they lead, files by their bytes."""
    return {
        path.relative_to(root): path.readlink() if path.is_symlink() else path.is_dir() or path.read_bytes()
        for path in root.rglob("*")
    }


def with_a_note(path):
    as_zarr(path, OLD)
    (path / "note.txt").write_text("mine")


def with_an_empty_folder(path):
    as_zarr(path, OLD)
    (path / "c" / "mine").mkdir()


def with_a_link(path):
    as_zarr(path, OLD)
    (path / "c" / "7").symlink_to(path.parent)


def foreign_array(path):
    zarr.create_array(store=str(path), data=OLD, attributes={"unit": "logit margin"})


def group(path):
    facts = dict.fromkeys(FACTS, "")
    zarr.open_group(path, mode="w", attributes=facts)


def broken(path):
    path.mkdir()
    (path / "zarr.json").write_text("[]")


def linked_array(path):
    as_zarr(path.with_name("target"), OLD)
    path.symlink_to(path.with_name("target"))


KINDS = [with_a_note, with_an_empty_folder, with_a_link, foreign_array, group, broken, linked_array]


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_only_an_array_of_scores_is_replaced_by_one(tmp_path, make):
    make(tmp_path / "output")
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match=r"output exists and is a .* never replaced"):
        as_zarr(tmp_path / "output", NEW, overwrite=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (1, 0), (2, 3000)])
def test_every_array_of_scores_is_replaced(tmp_path, shape):
    def write(fill, **options):
        values = np.full(shape, fill, np.float32)
        array = sp.Scores(values, list(range(shape[0])), list(range(shape[1])), unit="loss").to_zarr(
            tmp_path / "output", **options
        )
        np.testing.assert_array_equal(array[...], values)

    for fill in (0, 1, 2):  # zarr writes no chunk of zeros
        write(fill, overwrite=fill > 0)


def test_what_came_while_the_folder_was_filled_stays(tmp_path):
    as_zarr(tmp_path / "output", OLD)

    def slow(folder):
        (folder / "file").write_text("")
        (tmp_path / "output" / "mine").write_text("mine")

    with pytest.raises(FileExistsError, match="output exists"):
        write_output_folder(tmp_path / "output", slow, overwrite=True, replaceable=is_scores_array)
    assert (tmp_path / "output" / "mine").read_text() == "mine"
    assert [entry.name for entry in tmp_path.iterdir()] == ["output"]


def killed_at(event_number, write, path, **options):
    """Run a writer in a child that is killed at its n-th file event below the folder; whether it was."""
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event, arguments):
            nonlocal count
            if event in EVENTS and str(path.parent) in str(arguments[0]):
                count += 1
                if count > event_number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        write(path, NEW, **options)
        os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("begun", ["afresh", "over an old one"])
def test_a_kill_leaves_the_old_the_new_or_nothing(tmp_path, write, begun):
    write(tmp_path / "old", OLD)
    write(tmp_path / "new", NEW)
    whole = {content(tmp_path / "old"), content(tmp_path / "new")}
    number = 0
    while True:
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / "output"
        if begun == "over an old one":
            write(path, OLD)
        killed = killed_at(number, write, path, overwrite=begun == "over an old one")
        assert not path.exists() or content(path) in whole
        if not killed:
            assert content(path) == content(tmp_path / "new")
            break
        number += 1
    assert number > 3


def test_a_folder_that_cannot_be_filled_leaves_the_old_one(tmp_path):
    as_zarr(tmp_path / "output", OLD)

    def failing(folder):
        (folder / "half").write_text("")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_output_folder(tmp_path / "output", failing, overwrite=True, replaceable=is_scores_array)
    assert content(tmp_path / "output") == OLD.tobytes()
    assert [entry.name for entry in tmp_path.iterdir()] == ["output"]


def test_nothing_is_written_into_a_store(tmp_path):
    """A bank with a foreign file in it is no longer what its proof says."""
    zarr.open_group(tmp_path / "store", mode="w").create_group("inner")
    before = {path for path in (tmp_path / "store").rglob("*") if path.is_file()}
    for place in ("scores.csv", "inner/scores.csv", "new/scores.csv"):
        for overwrite in (False, True):
            with pytest.raises(FileExistsError, match="lies within the store"):
                write_outputs({tmp_path / "store" / place: b"1"}, overwrite=overwrite)
    assert {path for path in (tmp_path / "store").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("url", ["s3://bucket/run", "memory://run", "hf://datasets/run"])
@pytest.mark.parametrize("kind", [str, Path])
def test_what_is_not_a_bank_is_not_written_to_a_folder_named_like_a_url(tmp_path, monkeypatch, url, kind):
    monkeypatch.chdir(tmp_path)
    network = nn.Linear(2, 2)
    optimizer, sketch = torch.optim.SGD(network.parameters(), 0.1), sp.Sketch(4)
    for write in (
        lambda: as_zarr(kind(f"{url}.zarr"), NEW),
        lambda: as_page(kind(f"{url}.html"), NEW),
        lambda: checked_out(kind(f"{url}.zarr"), "scores", overwrite=False),
        lambda: scores(NEW).to_parquet(kind(f"{url}.parquet")),
        lambda: sp.Recorder(network, optimizer, kind(url), every=1),
        lambda: sp.Recorder(network, optimizer, kind(url), every=1, capture=sketch, task=sp.Classification()),
        lambda: RecorderCallback(kind(url), every=1),
        lambda: sp.evaluate.GroundTruth.subsets(kind(url), 4, 1, count=2),
    ):
        with pytest.raises(ValueError, match=r"is a URL, and only banks lie there: give a path of this machine"):
            write()
    assert not list(tmp_path.iterdir())


def test_a_tilde_is_the_users_own_folder(tmp_path, monkeypatch):
    """As a shell says, which quotation marks keep from saying so; a folder called "~" would be a trap to remove."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = torch.utils.data.TensorDataset(torch.randn(6, 3), torch.randint(2, (6,)))
    recorder = sp.Recorder(model, optimizer, "~/run", every=1)
    nn.functional.cross_entropy(model(data.tensors[0]), data.tensors[1]).backward()
    optimizer.step()
    recorder.step()
    trajectory = sp.Trajectory.from_recorder("~/run")
    bank = sp.build(model, sp.Classification(), trajectory, data, Path("~/bank"), sketch=sp.Sketch(8), progress=False)
    assert bank.path == tmp_path / "bank"
    assert sp.open("~/bank").fingerprint == bank.fingerprint
    source = sp.Source(bank, model=model, progress=False)
    source.sketch(data).save("~/features.safetensors")
    features = sp.QueryFeatures.load("~/features.safetensors")
    source.score(features, out="~/scores.zarr").to_zarr("~/copy.zarr")
    assert sp.HitsFile(source.top_k(features, 2, out="~/hits.zarr").path).path == tmp_path / "hits.zarr"
    names = {"run", "bank", "features.safetensors", "scores.zarr", "copy.zarr", "hits.zarr"}
    assert names <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "~").exists()
