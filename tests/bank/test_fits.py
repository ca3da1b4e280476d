"""Fits are whole and what was written, or made again; nothing that a kill, an append or a setting leaves lasts."""

import os
import shutil
import signal
import warnings
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import source_proj as sp
from source_proj._errors import BankError
from source_proj._io.printable import bytes_in_words
from source_proj.bank import verify

SHAPE = (5, 3)
_NOBODY = 65534


def data(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(n, SHAPE[0], generator=generator), torch.randint(0, SHAPE[1], (n,), generator=generator)
    )


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(*SHAPE)


def trajectory():
    """Adam in a metric per segment, so that there are cross moments too."""
    points = []
    for step in (5, 10):
        network = model(step)
        optimizer = torch.optim.Adam(network.parameters())
        nn.functional.cross_entropy(network(data(8)[:][0]), data(8)[:][1]).backward()
        optimizer.step()
        points.append(sp.Checkpoint(network.state_dict(), step, lr=0.01, optimizer_state=optimizer.state_dict()))
    return sp.Trajectory(points, optimizer=sp.Adam(), segments=2, preconditioner="per_segment")


@pytest.fixture
def bank(tmp_path):
    options = {"sketch": sp.Sketch(12), "batch_size": 8, "shard_rows": 16, "progress": False}
    return sp.build(model(), sp.Classification(), trajectory(), data(40), tmp_path / "bank", **options)


def scores(bank, **options):
    return sp.Source(sp.open(bank.path), model=model(), progress=False, **options).score(data(4, seed=1)).to_numpy()


def entries(bank, kind=""):
    return sorted(path for path in (bank.path / "fits").iterdir() if path.name.startswith(kind) and path.is_dir())


def chunks(entry):
    return [path for path in sorted(entry.rglob("*")) if path.is_file() and path.name != "zarr.json"]


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def of_another_fit(entry):
    """The content of another entry of the same kind, whole in itself."""
    (other,) = [path for path in entries_beside(entry) if path != entry][:1] or [None]
    shutil.rmtree(entry)
    shutil.copytree(other, entry)


def entries_beside(entry):
    kind = entry.name.split("-")[0]
    return sorted(path for path in entry.parent.iterdir() if path.name.startswith(f"{kind}-"))


def linked(entry):
    elsewhere = entry.with_name("elsewhere")
    entry.rename(elsewhere)
    entry.symlink_to(elsewhere)


DAMAGES = {
    "a chunk is missing": lambda entry: chunks(entry)[0].unlink(),
    "every chunk is missing": lambda entry: [chunk.unlink() for chunk in chunks(entry)],
    "a chunk is empty": lambda entry: chunks(entry)[0].write_bytes(b""),
    "a chunk is zeros": lambda entry: chunks(entry)[0].write_bytes(bytes(chunks(entry)[0].stat().st_size)),
    "a chunk is cut short": lambda entry: chunks(entry)[0].write_bytes(chunks(entry)[0].read_bytes()[:-3]),
    "a bit is flipped": lambda entry: flipped(chunks(entry)[-1]),
    "an array is missing": lambda entry: shutil.rmtree(next(path for path in entry.iterdir() if path.is_dir())),
    "the metadata are missing": lambda entry: (entry / "zarr.json").unlink(),
    "the metadata are no JSON": lambda entry: (entry / "zarr.json").write_text("{"),
    "it is a file": lambda entry: (shutil.rmtree(entry), entry.write_text("x")),
    "it is another fit": of_another_fit,
}


@pytest.mark.parametrize(("damage", "kind"), list(zip(DAMAGES, cycle(["spectrum", "crossing"]), strict=False)))
def test_a_damaged_fit_is_named_and_made_again(bank, kind, damage):
    expected = scores(bank)
    scores(bank, segments=2, damping=None)
    scores(bank, curvature="gauss_newton")  # a second fit of each kind
    of_default = entries(bank, kind)
    assert verify(bank.path).ok
    for entry in of_default[:1] if damage == "it is another fit" else of_default:
        DAMAGES[damage](entry)
    report = verify(bank.path)
    assert any("the fit" in problem and kind in problem for problem in report.problems), report.problems
    with pytest.warns(UserWarning, match=rf"the fit .*{kind}-\w+ is damaged .* computed anew"):
        made_again = [scores(bank, **options) for options in ({}, {"damping": None}, {"curvature": "gauss_newton"})]
    np.testing.assert_array_equal(made_again[0], expected)
    assert verify(bank.path).ok
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(scores(bank), expected)


def test_a_chunk_of_zeros_in_the_metadata_claims_no_memory(bank):
    """A fit that claims 10^12 numbers is refused before they are made."""
    expected = scores(bank)
    entry = entries(bank, "spectrum")[0]
    metadata = entry / "vectors" / "zarr.json"
    metadata.write_text(metadata.read_text().replace('"shape": [\n    12,', '"shape": [\n    1000000000000,'))
    assert "1000000000000" in metadata.read_text()
    with pytest.warns(UserWarning, match="chunks are missing"):
        np.testing.assert_array_equal(scores(bank), expected)


@pytest.mark.parametrize("place", ["fits", "an entry", "a file of an entry"])
def test_links_are_refused(bank, tmp_path, place):
    scores(bank)
    entry = entries(bank, "spectrum")[0]
    path = {"fits": bank.path / "fits", "an entry": entry, "a file of an entry": chunks(entry)[0]}[place]
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(BankError, match="is a link"):
        scores(bank)
    assert not verify(bank.path).ok
    if place == "fits":
        with pytest.raises(BankError, match="is a link"):
            bank.clear_fits()
        assert list(elsewhere.iterdir())


def killed_while_fitting(bank, **options):
    """Fork, and kill the child as it opens the first chunk of its fit."""
    child = os.fork()
    if child == 0:
        import sys

        def hook(event, arguments):
            if event == "open" and ".creating" in str(arguments[0]) and "/c/" in str(arguments[0]):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        scores(bank, **options)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_what_a_killed_fit_left_goes_with_the_next_finalize(bank):
    killed_while_fitting(bank)
    (left,) = [path for path in entries(bank) if path.name.endswith(".creating")] or [None]
    if left is None:
        left = next(path for path in (bank.path / "fits").iterdir() if path.name.endswith(".creating"))
    assert left in verify(bank.path).leftovers
    assert verify(bank.path).ok
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores(bank, damping=0.5)
    bank.finalize()
    assert not left.exists()
    assert not verify(bank.path).leftovers


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_what_a_killed_fit_left_goes_with_a_later_fit(bank):
    killed_while_fitting(bank)
    (left,) = [path for path in (bank.path / "fits").iterdir() if path.name.endswith(".creating")]
    for path in [left, *left.rglob("*")]:
        os.utime(path, (0, 0))  # long ago
    scores(bank, damping=0.5)
    assert not left.exists()


def test_an_append_drops_the_fits_of_before(bank):
    for round in range(3):
        scores(bank)
        count = len(entries(bank))
        assert count == len(entries(bank, "spectrum")) + len(entries(bank, "crossing")) > 0
        bank.append(model(), sp.Classification(), data(16, seed=round), batch_size=8, progress=False)
        assert entries(bank) == []
        assert not verify(bank.path).leftovers


def test_fits_of_another_bank_are_leftovers(bank, tmp_path):
    scores(bank)
    other = sp.build(
        model(), sp.Classification(), trajectory(), data(24), tmp_path / "other",
        sketch=sp.Sketch(12), batch_size=8, progress=False,
    )  # fmt: skip
    shutil.copytree(bank.path / "fits", other.path / "fits")
    report = verify(other.path)
    assert report.ok
    assert report.leftovers == entries(other)
    other.finalize()
    assert entries(other) == []


def test_clearing_frees_what_it_says(bank):
    before = sum(bank.nbytes().values())
    scores(bank)
    kept = bank.nbytes()["fits"]
    assert kept > 0
    assert f"{bytes_in_words(kept)} of fits on disk" in repr(sp.Source(bank, model=model()))
    assert bank.clear_fits() == kept
    assert sum(bank.nbytes().values()) == before
    assert bank.clear_fits() == 0


def test_what_cannot_be_deleted_frees_nothing(bank, monkeypatch):
    scores(bank)
    kept = bank.nbytes()["fits"]
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # all that it does to a disk that is only read
    assert bank.clear_fits() == 0
    assert bank.nbytes()["fits"] == kept


def test_a_fit_that_cannot_be_kept_costs_a_warning(bank, monkeypatch):
    expected = scores(bank)
    bank.clear_fits()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("source_proj.bank.fits.publish", full)
    with pytest.warns(UserWarning, match="could not be kept .* No space left"):
        np.testing.assert_array_equal(scores(bank), expected)


@pytest.mark.parametrize("place", ["fits", "entry", "array", "chunk"])
@pytest.mark.parametrize("odd", ["bytes", "pipe", "hole"])
def test_whatever_stands_where_a_fit_was(bank, place, odd):
    """Nothing waits, nothing fills the memory: the fit is made again, and the next one is read."""
    right = scores(bank)
    (entry, *_) = entries(bank, "spectrum")
    array = next(path.parent for path in entry.rglob("zarr.json") if path.parent != entry)
    file = {"fits": bank.path / "fits/zarr.json", "entry": entry / "zarr.json", "array": array / "zarr.json"}
    path = file.get(place) or chunks(entry)[0]
    before = path.read_bytes()
    path.unlink()
    if odd == "pipe":
        os.mkfifo(path)
    elif odd == "bytes":
        path.write_bytes(b"\x89" * 7)
    else:
        path.write_bytes(before)
        os.truncate(path, 100 << 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shutil.rmtree(entries(bank, "crossing")[0])  # so that one is made anew, and the folder of the fits is written
        np.testing.assert_array_equal(scores(bank), right)
    assert verify(bank.path).ok


def test_the_rest_of_a_killed_writer_is_no_fit(bank):
    right = scores(bank)
    rest = bank.path / "fits" / "zarr.json.0123.partial"
    rest.write_bytes(b"{")
    report = verify(bank.path)
    assert report.ok
    assert report.leftovers == [rest]
    np.testing.assert_array_equal(scores(bank), right)
    sp.open(bank.path).finalize()
    assert not rest.exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can be somebody else")
def test_fits_that_somebody_keeps_private_are_no_hindrance(bank, monkeypatch):
    expected = scores(bank)
    with TemporaryDirectory() as folder:  # where others may go
        place, cache = Path(folder) / "bank", Path(folder) / "cache"
        shutil.copytree(bank.path, place)
        cache.mkdir()
        for path, mode in ((Path(folder), 0o755), (place / "fits", 0o700), (cache, 0o777)):
            path.chmod(mode)
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        child = os.fork()
        if not child:
            code = 1
            try:
                os.setgid(_NOBODY)
                os.setuid(_NOBODY)
                opened = sp.open(place)
                same = np.array_equal(scores(opened), expected) and verify(place).ok
                code = 0 if same and opened.nbytes()["fits"] == 0 < opened.fits.nbytes() else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_folder_that_goes_while_it_is_filled_is_no_fit(bank):
    """As where another process was first with the same fit; zarr makes the folder anew, and says nothing."""
    folder = bank.fits.folder
    arrays = {"values": np.ones((4, 4)), "vectors": np.ones((2, 2))}

    class Going(dict):
        def items(self):
            for name, values in super().items():
                if name == "vectors":
                    for temporary in folder.glob(".spectrum-*"):
                        shutil.rmtree(temporary)
                yield name, values

    with pytest.warns(UserWarning, match="could not be kept"):
        bank.fits.get("spectrum", {"of": "nothing"}, lambda: Going(arrays))
    assert not list(folder.glob("spectrum-*"))
    assert bank.verify().ok
