"""What the examples share: image data sets in idx files.

Images are read from ``<folder>/fashion_mnist/*.gz`` and ``<folder>/mnist/*.gz``, where folder is given by ``--data`` or
the environment variable ``SOURCE_PROJ_DATA``. Files that are not there are downloaded from the data sets' public
sources into that folder (default: the user's cache folder) and checked against known SHA-256 sums.
"""

import argparse
import gzip
import hashlib
import os
import urllib.request
from pathlib import Path

import numpy as np
import platformdirs
import torch
from torch import Tensor

__all__ = ["add_data_option", "load_images", "write_whole"]

SOURCES = {  # https://github.com/zalandoresearch/fashion-mnist#get-the-data; the MNIST mirror is torchvision's
    "fashion_mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
}
NORMALISATION = {"fashion_mnist": (0.2860, 0.3530), "mnist": (0.1307, 0.3081)}  # mean and deviation of the pixels
SHA256 = {  # of the uncompressed content: gzip headers differ between mirrors
    "fashion_mnist/train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "fashion_mnist/train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "fashion_mnist/t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "fashion_mnist/t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    "mnist/train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "mnist/train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "mnist/t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "mnist/t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


def add_data_option(parser: argparse.ArgumentParser) -> None:
    default = os.environ.get("SOURCE_PROJ_DATA") or platformdirs.user_cache_path("source-proj") / "data"
    parser.add_argument(
        "--data", type=Path, default=Path(default), metavar="DIR",
        help="folder that holds (or will hold) the data sets; default: $SOURCE_PROJ_DATA, or the user's cache folder",
    )  # fmt: skip


def load_images(folder: Path, name: str, split: str) -> tuple[Tensor, Tensor]:
    """Read one split ("train" or "t10k"): images ``(n, 784)`` float32, normalised, and labels ``(n,)``."""
    pixels = _read(folder / name, name, f"{split}-images-idx3-ubyte", header=16)
    labels = _read(folder / name, name, f"{split}-labels-idx1-ubyte", header=8)
    mean, deviation = NORMALISATION[name]
    images = (torch.from_numpy(pixels.reshape(-1, 784).copy()).float() / 255 - mean) / deviation
    return images, torch.from_numpy(labels.copy()).long()


def _read(folder: Path, name: str, file: str, header: int) -> np.ndarray:
    path = folder / f"{file}.gz"
    if not path.exists():
        url = SOURCES[name] + path.name
        print(f"downloading {url} to {folder}")
        with urllib.request.urlopen(url, timeout=60) as response:
            compressed = response.read()
        _check(gzip.decompress(compressed), name, file, url)
        write_whole(path, compressed)
    content = gzip.decompress(path.read_bytes())
    _check(content, name, file, str(path))
    return np.frombuffer(content, np.uint8, offset=header)


def _check(content: bytes, name: str, file: str, origin: str) -> None:
    found, known = hashlib.sha256(content).hexdigest(), SHA256[f"{name}/{file}"]
    if found != known:
        raise ValueError(f"{origin} is not the known {name}/{file}: sha256 {found}, expected {known}; delete the file")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that nobody ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
