import argparse
import ast
import gzip
import hashlib
import struct
import urllib.error
import urllib.request
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from source_proj.task import Classification

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _examples_importable(monkeypatch):
    for folder in (EXAMPLES, EXAMPLES / "paper"):
        monkeypatch.syspath_prepend(str(folder))


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


LOADERS = {
    "fashion_mnist/train-images-idx3-ubyte.gz": (
        "_data",
        lambda m, data: m.load_images(data, "fashion_mnist", "train"),
    ),
    "mnist/t10k-images-idx3-ubyte.gz": ("_data", lambda m, data: m.load_images(data, "mnist", "t10k")),
    "glue_sst2/train.tsv.gz": ("_data", lambda m, data: m.load_sentences(data, "train")),
    "tiny_shakespeare/input.txt": ("_data", lambda m, data: m.load_shakespeare(data)),
    "uci_concrete/concrete.data": ("_tables", lambda m, data: m.concrete(argparse.Namespace(data=data))),
    "pima_diabetes/pima-indians-diabetes.csv": ("_tables", lambda m, data: m.pima(argparse.Namespace(data=data))),
    "cifar10/cifar-10-python.tar.gz": ("cifar10", lambda m, data: m.load_cifar(data / "cifar10", full=True)),
    "uci_parkinsons/parkinsons_updrs.data": ("_tables", lambda m, data: m.parkinsons(argparse.Namespace(data=data))),
    "pacs/PACS.zip": ("pacs", lambda m, data: m.load_pacs(data)),
    "glue_rte/dev.tsv": ("rte", lambda m, data: m.load_pairs(data, "dev", m.RTE)),
    "glue_qnli/train.tsv": ("qnli", lambda m, data: import_module("rte").load_pairs(data, "train", m.QNLI)),
    "wikitext2/valid.txt": ("wikitext2", lambda m, data: m.load_words(data, "valid")),
}


@pytest.mark.parametrize("file", LOADERS)
@pytest.mark.parametrize("failure", [urllib.error.URLError("no route"), TimeoutError("timed out")], ids=["url", "time"])
def test_without_a_network_the_error_names_file_and_flag(tmp_path, monkeypatch, file, failure):
    def refuse(*_, **__):
        raise failure

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    module, load = LOADERS[file]
    with pytest.raises(FileNotFoundError, match="--data FOLDER or the environment variable SOURCE_PROJ_DATA") as caught:
        load(import_module(module), tmp_path)
    assert str(tmp_path / file) in str(caught.value)
    assert not list(tmp_path.rglob("*.*"))


def names_of(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {getattr(node, "attr", getattr(node, "id", None)) for node in ast.walk(tree)}


def test_one_place_downloads_and_gives_the_flag():
    scripts = [path for path in EXAMPLES.rglob("*.py") if path.name != "_data.py"]
    assert not [path.name for path in scripts if "urlopen" in names_of(path)]
    assert not [path.name for path in scripts if 'add_argument("--data"' in path.read_text(encoding="utf-8")]
    assert len(LOADERS) >= sum("download" in names_of(path) for path in [*scripts, EXAMPLES / "_data.py"])


@pytest.mark.parametrize("given", ["flag", "variable"])
def test_folder_of_data_is_given_by_flag_or_variable(tmp_path, monkeypatch, given):
    import _data

    monkeypatch.setenv("SOURCE_PROJ_DATA", str(tmp_path / "variable"))
    parser = argparse.ArgumentParser()
    _data.add_data_option(parser)
    arguments = ["--data", str(tmp_path / "flag")] if given == "flag" else []
    assert parser.parse_args(arguments).data == tmp_path / given
