"""CIFAR-10: a small ResNet with group normalisation, trained until it fits its images (SOURCE paper, section 5.1).

    python examples/paper/cifar10.py          # 1,500 of the first 4,000 training images; two cores, minutes
    python examples/paper/cifar10.py --full   # all 50,000 and a ResNet-9, for a GPU

The images come from ``<data>/cifar10/cifar-10-python.tar.gz``, downloaded if need be and checked; for the default size
a file ``cifar10_lossless_train_first4000.npz`` with the first 4,000 of them does as well. Batch normalisation would tie
the examples of a batch to each other, so groups of channels are normalised instead. Models are trained one by one, one
a core: four or two stacked took 1.15 to 1.2 times as long each, and the channels-last layout gained nothing.
"""

import argparse
import hashlib
import io
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import _above  # noqa: F401
import numpy as np
import torch
from _pipeline import run
from _problem import Problem, Sizes, parser, sized
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import source_proj as sp

from _data import download, write_whole  # isort: skip  # (its folder is put on the path by _problem)
from _training import few_threads, margin  # isort: skip

__all__ = ["Training", "load_cifar", "problem", "resnet"]

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
FIRST = "cifar10_lossless_train_first4000.npz"
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the training pixels, by colour
MOMENTUM, DECAY, CHECKPOINTS, WARM_UP = 0.9, 5e-4, 6, 0.15

Images = tuple[np.ndarray, np.ndarray]
"""Pixels ``(n, 32, 32, 3)`` uint8, and classes ``(n,)``."""


def load_cifar(folder: Path, *, full: bool) -> tuple[Images, Images]:
    """Images to train on and images to ask: all 50,000 and the test set, or of the first 4,000 the two parts.

    Raises:
        ValueError: if the archive is not the official one.
    """
    first = folder / FIRST
    if not full and first.exists():
        with np.load(first) as content:
            pixels, labels = content["images"], content["labels"].astype(np.int64)
    else:
        archive = folder / "cifar-10-python.tar.gz"
        if not archive.exists():
            content = download(URL, archive)
            _check(content, URL)
            write_whole(archive, content)
        content = archive.read_bytes()
        _check(content, str(archive))
        names = [f"data_batch_{i}" for i in range(1, 6)]
        if full:
            return _read(content, names), _read(content, ["test_batch"])
        pixels, labels = (one[:4000] for one in _read(content, names[:1]))
    order = np.random.default_rng(0).permutation(len(pixels))
    train, asked = order[:3000], order[3000:]
    return (pixels[train], labels[train]), (pixels[asked], labels[asked])


def _check(content: bytes, origin: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise ValueError(f"{origin} is not the known archive: sha256 {found}, expected {SHA256}; delete the file")


class _Arrays(pickle.Unpickler):
    """Unpickles arrays and plain values, nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"a CIFAR-10 batch holds arrays and plain values only, not {module}.{name}")
        return known[module, name]


def _read(archive: bytes, names: list[str]) -> Images:
    pixels, labels = [], []
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for name in names:
            member = files.extractfile(f"cifar-10-batches-py/{name}")
            assert member is not None
            batch = _Arrays(member, encoding="bytes").load()
            pixels.append(batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            labels.append(np.asarray(batch[b"labels"], dtype=np.int64))
    return np.concatenate(pixels), np.concatenate(labels)


class Residual(nn.Module):
    """``shortcut(x) + conv(relu(norm(conv(relu(norm(x))))))``."""

    def __init__(self, inner: int, outer: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_activated(inner), nn.Conv2d(inner, outer, 3, stride, 1, bias=False),
            *_activated(outer), nn.Conv2d(outer, outer, 3, 1, 1, bias=False),
        )  # fmt: skip
        same = inner == outer and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inner, outer, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.shortcut(x) + self.body(x)
        return y


def _activated(channels: int) -> tuple[nn.Module, nn.Module]:
    return nn.GroupNorm(4, channels), nn.ReLU()


def resnet(a: int, b: int, c: int) -> nn.Module:
    """Three stages of one block each, on maps of 16, 8 and 4 pixels a side; the last is averaged to 2 × 2."""
    return nn.Sequential(
        nn.Conv2d(3, a, 4, 2, 1), Residual(a, a), Residual(a, b, 2), Residual(b, c, 2),
        *_activated(c), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4 * c, 10),
    )  # fmt: skip


def resnet9() -> nn.Module:
    """64-128-256-512 channels, two residual blocks."""

    def block(inner: int, outer: int) -> list[nn.Module]:
        return [nn.Conv2d(inner, outer, 3, 1, 1, bias=False), *_activated(outer), nn.MaxPool2d(2)]

    return nn.Sequential(
        nn.Conv2d(3, 64, 3, 1, 1), *block(64, 128), Residual(128, 128), *block(128, 256), *block(256, 512),
        Residual(512, 512), *_activated(512), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


@dataclass(frozen=True)
class Training:
    """SGD whose learning rate rises for the first steps, then falls to zero in a line.

    Attributes:
        make_model: builds a freshly initialised model.
        data: the training set.
        queries: what is asked.
        epochs: passes over the training set.
        batch: batch size.
        lr: highest learning rate.
        device: where models are trained.
        checkpoints: how many are recorded, at equal distances.
    """

    make_model: Callable[[], nn.Module]
    data: TensorDataset
    queries: TensorDataset
    epochs: int
    batch: int
    lr: float
    device: str
    checkpoints: int = CHECKPOINTS

    def retrain(self, kept: list[np.ndarray], seeds: list[int]) -> np.ndarray:
        """Margins ``(M, Q)`` of the queries after training on subsets."""
        return margin(self._logits(kept, seeds), self.queries.tensors[1]).numpy()

    def predict(self, kept: list[np.ndarray], seeds: list[int]) -> np.ndarray:
        """Predicted classes ``(M, Q)``."""
        return self._logits(kept, seeds).argmax(-1).numpy()

    def record(self, seed: int, folder: Path) -> sp.Trajectory:
        """Train on everything, recording checkpoints; a killed run goes on where it was."""
        _, recorder = self._train(np.arange(len(self.data)), seed, folder)
        assert recorder is not None
        return recorder.trajectory()

    def record_more(self, seed: int, folder: Path, checkpoints: int) -> sp.Trajectory:
        """Record the same run with another number of checkpoints."""
        return replace(self, checkpoints=checkpoints).record(seed, folder)

    def accuracy(self, seed: int, folder: Path) -> str:
        """How well the recorded run does, for the notes."""
        model = self.make_model().to(self.device)
        model.load_state_dict(self.record(seed, folder).final.load())
        known, asked = (
            f"{(self._ask(model, inputs).argmax(1) == targets).float().mean():.1%}"
            for inputs, targets in (self.data.tensors, self.queries.tensors)
        )
        return f"{known} of the training images and {asked} of the queries right"

    def _logits(self, kept: list[np.ndarray], seeds: list[int]) -> Tensor:
        models = (self._train(one, seed)[0] for one, seed in zip(kept, seeds, strict=True))
        return torch.stack([self._ask(model, self.queries.tensors[0]) for model in models])

    def _ask(self, model: nn.Module, inputs: Tensor) -> Tensor:
        model.eval()
        with torch.no_grad():
            return torch.cat([model(part.to(self.device)).cpu() for part in inputs.split(500)])

    def _train(self, kept: np.ndarray, seed: int, folder: Path | None = None) -> tuple[nn.Module, sp.Recorder | None]:
        inputs, targets = (tensor.to(self.device) for tensor in self.data.tensors)
        torch.manual_seed(seed)
        model = self.make_model().to(self.device).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=self.lr, momentum=MOMENTUM, weight_decay=DECAY)
        generator = torch.Generator().manual_seed(seed)
        indices = torch.from_numpy(kept)
        orders = [indices[torch.randperm(len(kept), generator=generator)] for _ in range(self.epochs)]
        batches = [batch.to(self.device) for order in orders for batch in order.split(self.batch)]
        steps, recorder = len(batches), None
        if folder is not None:
            at = [round(steps * (i + 1) / self.checkpoints) for i in range(self.checkpoints)]
            recorder = sp.Recorder(model, optimizer, folder, at=at)
        with few_threads(0):  # a second thread gains little at this size, and the other core has a model of its own
            for step in range(recorder.restore() if recorder else 0, steps):
                optimizer.param_groups[0]["lr"] = self._rate(step, steps)
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(inputs[batches[step]]), targets[batches[step]])
                torch.autograd.backward(loss)
                optimizer.step()
                if recorder:
                    recorder.step()
        return model.eval(), recorder

    def _rate(self, step: int, steps: int) -> float:
        return self.lr * min((step + 1) / (WARM_UP * steps), 1.0) * (1 - step / steps)


def problem(options: argparse.Namespace) -> Problem:
    """Make the task."""
    n, n_queries = sized(options, (50_000, 500), (1_500, 150), (200, 20))
    (pixels, labels), (asked, asked_labels) = load_cifar(options.data / "cifar10", full=options.full)
    pixels, labels, asked, asked_labels = pixels[:n], labels[:n], asked[:n_queries], asked_labels[:n_queries]
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    make = sized(options, resnet9, partial(resnet, 16, 32, 64), partial(resnet, 8, 8, 8))
    epochs, batch, lr = sized(options, (15, 128, 0.1), (15, 32, 0.05), (3, 32, 0.05))
    training = Training(make, _tensors(pixels, labels), _tensors(asked, asked_labels), epochs, batch, lr, device)
    shown = {"train": (pixels, labels), "queries": (asked, asked_labels)}

    def show(which: str, index: int) -> tuple[np.ndarray, str]:
        images, classes = shown[which]
        return images[index], NAMES[int(classes[index])]

    width = "ResNet-9" if options.full else "ResNet of three stages"
    return Problem(
        name="cifar10", title="CIFAR-10", task=sp.Classification(), make_model=make,
        train_sets={"train": training.data}, queries=training.queries,
        record=training.record, retrain=training.retrain, predict=training.predict, group=1,
        settings={
            "task": "cifar10", "n": n, "queries": n_queries, "model": repr(make()), "epochs": epochs, "batch": batch,
            "lr": lr, "momentum": MOMENTUM, "decay": DECAY, "warm_up": WARM_UP, "checkpoints": CHECKPOINTS,
        },
        sizes=sized(
            options,
            Sizes(100, 5, 5, 8192, (2048,)), Sizes(100, 2, 3), Sizes(6, 2, 2, 128, (64,)),
        ),
        notes=(
            f"{n:,} training images and {n_queries} others as queries; {width} with group instead of batch "
            f"normalisation, SGD with a learning rate that falls in a line, {epochs} epochs, no augmentation.",
        ),
        peers=not options.full, cheap=False, panel="image", show=show,
        extra={"accuracy": training.accuracy, "record_more": training.record_more, "workers": 1 if options.full else 2},
    )  # fmt: skip


def _tensors(pixels: np.ndarray, labels: np.ndarray) -> TensorDataset:
    """Normalised images ``(n, 3, 32, 32)`` and labels."""
    mean, deviation = np.array(MEAN, np.float32), np.array(DEVIATION, np.float32)
    scaled = (pixels.astype(np.float32) / 255 - mean) / deviation
    return TensorDataset(torch.from_numpy(np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))), torch.from_numpy(labels))


if __name__ == "__main__":
    run(problem, parser(__doc__))
