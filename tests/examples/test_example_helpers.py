import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from source_proj.task import Classification

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _examples_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def write_idx(folder, name, split, images, labels):
    folder = folder / name
    folder.mkdir(parents=True)
    sums = {}
    for kind, content in [
        ("images-idx3", struct.pack(">4i", 2051, len(images), 28, 28) + images.tobytes()),
        ("labels-idx1", struct.pack(">2i", 2049, len(labels)) + labels.tobytes()),
    ]:
        file = f"{split}-{kind}-ubyte"
        (folder / f"{file}.gz").write_bytes(gzip.compress(content))
        sums[f"{name}/{file}"] = hashlib.sha256(content).hexdigest()
    return sums


def test_idx_files_are_read_and_foreign_ones_refused(tmp_path, monkeypatch):
    import _data

    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (5, 784), dtype=np.uint8), rng.integers(0, 10, 5, dtype=np.uint8)
    sums = write_idx(tmp_path, "mnist", "t10k", images, labels)
    with pytest.raises(ValueError, match="not the known mnist/t10k-images"):
        _data.load_images(tmp_path, "mnist", "t10k")
    monkeypatch.setattr(_data, "SHA256", sums)
    x, y = _data.load_images(tmp_path, "mnist", "t10k")
    np.testing.assert_allclose(x.numpy(), (images / 255 - 0.1307) / 0.3081, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(y.numpy(), labels)


def test_margin_is_the_tasks_own():
    from _training import margin

    logits, labels = torch.randn(3, 7, 10), torch.randint(10, (7,))
    expected = [Classification().measurement(lambda _, one=one: one, (torch.zeros(7, 1), labels)) for one in logits]
    torch.testing.assert_close(margin(logits, labels), torch.stack(expected).double(), rtol=1e-5, atol=1e-5)
