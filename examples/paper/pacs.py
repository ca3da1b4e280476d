"""PACS: photographs, paintings and cartoons first, then sketches; attributed to the first (SOURCE paper, section 5.1).

    python examples/paper/pacs.py

A small ResNet learns seven kinds of things in three manners of drawing, then goes on with sketches. Queries are other
sketches, asked of the final network; attributed are the pictures of the first stage. The images come from
``<data>/pacs/PACS.zip`` with its folders ``<manner>/<kind>/``, which is downloaded if need be.
"""

import argparse
import io
import zipfile
from functools import partial
from pathlib import Path

import _above  # noqa: F401
import numpy as np
import torch
from _data import download, write_whole
from _pipeline import run
from _problem import Problem, Sizes, parser, sized
from _stacked import HEAVY_BALL, StackedRun, StageSetting, margin
from cifar10 import resnet
from torch.utils.data import TensorDataset

import source_proj as sp

__all__ = ["load_pacs", "problem"]

URL = "https://drive.usercontent.google.com/download?id=1JFr8f805nMUelQWWmfnJR3y4_SYoN5Pd&export=download&confirm=t"
KNOWN = {"photo": 1670, "art_painting": 2048, "cartoon": 2344, "sketch": 3929}  # pictures of each manner
KINDS = ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"]
SIDE = 32

Pictures = tuple[np.ndarray, np.ndarray]
"""Pixels ``(n, side, side, 3)`` uint8, and kinds ``(n,)``."""


def load_pacs(folder: Path, side: int = SIDE) -> dict[str, Pictures]:
    """All pictures by manner, in the order of their names, shrunk to ``side`` pixels a side.

    Raises:
        ModuleNotFoundError: without pillow.
        ValueError: the archive is none, or has other pictures than the known one.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ModuleNotFoundError("PACS needs pillow: pip install 'source-proj[demo]'") from error
    archive = folder / "pacs" / "PACS.zip"
    if not archive.exists():
        content = download(URL, archive)
        _named(content, URL)
        write_whole(archive, content)
    content = archive.read_bytes()
    names = _named(content, str(archive))
    pictures = {}
    with zipfile.ZipFile(io.BytesIO(content)) as files:
        for manner, own in names.items():
            pixels = []
            for name, _ in own:
                with Image.open(io.BytesIO(files.read(name))) as image:
                    pixels.append(np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BOX)))
            pictures[manner] = np.stack(pixels), np.array([kind for _, kind in own])
    return pictures


def _named(content: bytes, origin: str) -> dict[str, list[tuple[str, int]]]:
    """Each manner's files and their kinds."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        raise ValueError(f"{origin} is no zip archive, but begins with {content[:40]!r}; put PACS.zip in its place")
    names: dict[str, list[tuple[str, int]]] = {manner: [] for manner in KNOWN}
    with zipfile.ZipFile(io.BytesIO(content)) as files:
        for name in sorted(files.namelist()):
            place = name.split("/")[-3:]
            if len(place) == 3 and place[0] in names and place[1] in KINDS and place[2]:
                names[place[0]].append((name, KINDS.index(place[1])))
    counts = {manner: len(own) for manner, own in names.items()}
    if counts != KNOWN:
        raise ValueError(f"{origin} is not the known PACS: it has {counts} pictures, expected {KNOWN}")
    return names


def problem(options: argparse.Namespace) -> Problem:
    """Make the task."""
    n, n_sketches, n_queries = sized(options, (6000, 3400, 500), (1500, 600, 150), (60, 24, 8))
    pictures = load_pacs(options.data)
    sketches = _drawn([pictures.pop("sketch")], n_sketches + n_queries)
    drawn = {
        "pictures": _drawn(list(pictures.values()), n),
        "sketches": _part(sketches, slice(0, n_sketches)),
        "queries": _part(sketches, slice(n_sketches, None)),
    }
    data = {name: _tensors(own) for name, own in drawn.items()}
    queries = data.pop("queries")
    epochs = sized(options, (30, 15), (20, 10), (4, 4))
    stages = {
        "pictures": StageSetting(data["pictures"], epochs=epochs[0], batch=32, lr=0.02, checkpoints=4),
        "sketches": StageSetting(data["sketches"], epochs=epochs[1], batch=32, lr=0.01, checkpoints=4),
    }
    make = partial(resnet, *sized(options, (64, 128, 256), (16, 32, 64), (8, 8, 8)))
    trained = StackedRun(make, stages, queries, margin, HEAVY_BALL, group=1)

    def show(which: str, index: int) -> tuple[np.ndarray, str]:
        pixels, kinds = drawn[which]
        return pixels[index], KINDS[int(kinds[index])]

    return Problem(
        name="pacs", title="PACS", task=sp.Classification(), make_model=make, train_sets=data, queries=queries,
        record=trained.record, retrain=trained.retrain, predict=trained.predict, group=1,
        settings={"task": "pacs", "side": SIDE, **trained.settings()},
        sizes=sized(options, Sizes(100, 5, 5, 8192), Sizes(100, 2, 3), Sizes(4, 2, 2, 64, (32,))),
        notes=(
            f"{n:,} photographs, paintings and cartoons (attributed), then {n_sketches:,} sketches, all of {SIDE} "
            "pixels a side; a ResNet of three stages from scratch, where the paper has a larger one.",
        ),
        cheap=False, panel="image", show=show, extra={"accuracy": trained.accuracy, "workers": 2},
    )  # fmt: skip


def _drawn(parts: list[Pictures], count: int) -> Pictures:
    """Some of all, in random order."""
    pixels, kinds = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if count > len(pixels):
        raise ValueError(f"there are {len(pixels)} pictures, but {count} are wanted")
    order = np.random.default_rng(0).permutation(len(pixels))[:count]
    return pixels[order], kinds[order]


def _part(pictures: Pictures, part: slice) -> Pictures:
    return pictures[0][part], pictures[1][part]


def _tensors(pictures: Pictures) -> TensorDataset:
    """Images ``(n, 3, side, side)`` from -1 to 1, and kinds."""
    pixels, kinds = (torch.from_numpy(array) for array in pictures)
    return TensorDataset(pixels.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1, kinds)


if __name__ == "__main__":
    run(problem, parser(__doc__ or ""))
