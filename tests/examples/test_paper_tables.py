"""Tables of numbers: the columns that are taken, and what is standardised."""

import argparse
import hashlib
import io
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest

PAPER = Path(__file__).parents[2] / "examples" / "paper"
FILE = "uci_parkinsons/parkinsons_updrs.data"


@pytest.fixture(autouse=True)
def _examples_importable(monkeypatch):
    for folder in (PAPER.parent, PAPER):
        monkeypatch.syspath_prepend(str(folder))


@pytest.fixture
def recordings(monkeypatch):
    """Rows of 22 numbers, told as the known file; and how the file is written."""
    import _tables

    rows = np.random.default_rng(0).normal(size=(320, 22)).round(4)
    content = "\n".join([",".join(f"c{i}" for i in range(22)), *(",".join(map(str, row)) for row in rows)]).encode()
    monkeypatch.setitem(_tables.FILES, FILE, (_tables.FILES[FILE][0], hashlib.sha256(content).hexdigest()))
    return rows, content


def test_parkinsons_leaves_out_patient_and_motor_score(tmp_path, recordings):
    from parkinsons import problem

    rows, content = recordings
    path = tmp_path / FILE
    path.parent.mkdir()
    path.write_bytes(content)
    options = argparse.Namespace(data=tmp_path, full=False, quick=True, device="cpu")
    task = problem(options)
    x, y = task.train_sets["train"].tensors
    assert x.shape == (200, 19)
    assert len(task.queries) == 100
    order = np.random.default_rng(0).permutation(320)[:200]
    for column, own in enumerate([1, 2, 3, *range(6, 22)]):
        taken = rows[order, own]
        np.testing.assert_allclose(x[:, column], (taken - taken.mean()) / taken.std(), rtol=1e-4, atol=1e-4)
    total = rows[order, 5]
    np.testing.assert_allclose(y, (total - total.mean()) / total.std(), rtol=1e-4, atol=1e-4)
    assert task.make_model()(x).shape == (200, 1)
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="not the known uci_parkinsons"):
        problem(options)


def test_parkinsons_is_taken_out_of_its_archive(tmp_path, monkeypatch, recordings):
    import _tables

    _, content = recordings
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr("parkinsons_updrs.names", "about it")
        files.writestr("parkinsons_updrs.data", content)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: io.BytesIO(archive.getvalue()))
    assert _tables.parkinsons(argparse.Namespace(data=tmp_path)).shape == (320, 20)
    assert (tmp_path / FILE).read_bytes() == content
