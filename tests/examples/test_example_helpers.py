import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from source_proj.evaluate import half_subsets, lds
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


def test_arrays_are_computed_once_a_setting(tmp_path):
    from _data import cached_array

    calls = []

    def compute():
        calls.append(1)
        return np.arange(3) * len(calls)

    first = cached_array(tmp_path, {"lr": 0.1}, compute)
    np.testing.assert_array_equal(cached_array(tmp_path, {"lr": 0.1}, compute), first)
    assert len(calls) == 1
    assert not np.array_equal(cached_array(tmp_path, {"lr": 0.2}, compute), first)


def test_margin_is_the_tasks_own():
    from _training import margin

    logits, labels = torch.randn(3, 7, 10), torch.randint(10, (7,))
    expected = [Classification().measurement(lambda _, one=one: one, (torch.zeros(7, 1), labels)) for one in logits]
    torch.testing.assert_close(margin(logits, labels), torch.stack(expected).double(), rtol=1e-5, atol=1e-5)


class Fixed:
    """Scores that are known beforehand, one array for each bank."""

    def __init__(self, banks, table):
        self.found = np.mean([table[bank] for bank in banks], axis=0)

    def score(self, queries):
        return self.found


def test_no_query_has_a_say_in_its_own_setting():
    """One setting is right for even queries, the other for odd ones: each half must get the other half's pick."""
    from _comparison import Candidate, evaluate_methods

    rng = np.random.default_rng(0)
    truth, noise = rng.normal(size=(2, 6, 40))
    masks = half_subsets(32, 30)
    outcomes = (masks @ truth[:, :32].T)[:, None, :] + 0.1 * rng.normal(size=(30, 2, 6))
    even = np.arange(6)[:, None] % 2 == 0
    tables = {"even": [np.where(even, truth, noise)] * 2, "odd": [np.where(even, noise, truth)] * 2}
    found = [
        Candidate("best", "no choice", lambda banks: Fixed(banks, [truth, truth]), [0, 1]),
        *[Candidate("rival", s, lambda banks, t=t: Fixed(banks, t), [0, 1]) for s, t in tables.items()],
    ]
    best, rival = evaluate_methods(found, None, masks, outcomes, columns=slice(0, 32))
    assert best.single.value > 0.9
    assert rival.setting == "odd / even"  # for even queries, then for odd ones
    assert rival.single.value == lds(noise[:, :32], masks, outcomes, bootstrap=0).value
    assert rival.ensemble.value == rival.single.value
    assert rival.behind.value == best.single.value - rival.single.value
