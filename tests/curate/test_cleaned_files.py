"""Where a cleaned data set may be written: never into its own source, nor around it."""

import os

import numpy as np
import pytest

from source_proj.curate import Cleaning

N = 5
CLEANING = Cleaning("test", [1], ["r"], {"value": np.zeros(1)}, list(range(N)))


@pytest.fixture
def saved(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs datasets: install source-proj[datasets]")
    data = datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(N)]})
    (tmp_path / "outer").mkdir()
    data.save_to_disk(str(tmp_path / "outer" / "ds"))
    (tmp_path / "link").symlink_to(tmp_path / "outer" / "ds")
    return tmp_path


def content(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


WITHIN = [
    ("outer/ds", "outer/ds/in"),
    ("outer/ds", "outer/ds/deep/er/in"),
    ("outer/ds", "outer/../outer/ds/in"),
    ("outer/ds", "link/in"),
    ("link", "outer/ds/in"),
    ("link", "link/in.arrow"),
    ("outer/ds", "outer"),
    ("link", "outer"),
    ("outer/ds", "."),
]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(("source", "out"), WITHIN)
def test_a_folder_is_not_written_into_its_source_nor_around_it(saved, monkeypatch, source, out, overwrite):
    monkeypatch.chdir(saved)
    before = content(saved)
    with pytest.raises(ValueError, match="lie one within the other: give a path apart"):
        CLEANING.write(source, out, overwrite=overwrite)
    assert content(saved) == before
    assert not os.path.lexists("outer/ds/in")
    assert not os.path.lexists("outer/ds/deep")


def test_a_folder_that_only_begins_alike_and_the_source_itself_are_written(saved):
    datasets = pytest.importorskip("datasets")
    left = ["t0", "t2", "t3", "t4"]
    for out in ("outer/ds2", "outer/d"):
        CLEANING.write(saved / "outer/ds", saved / out)
        assert datasets.load_from_disk(str(saved / out))["text"][:] == left
    CLEANING.write(saved / "outer/ds", saved / "outer/ds", overwrite=True)
    assert datasets.load_from_disk(str(saved / "outer/ds"))["text"][:] == left


def test_a_file_is_no_folder_to_write_into(tmp_path):
    (tmp_path / "data.csv").write_text("a\n" + "1\n" * N)
    with pytest.raises(ValueError, match="lie one within the other"):
        CLEANING.write(tmp_path / "data.csv", tmp_path / "data.csv" / "out.csv")
