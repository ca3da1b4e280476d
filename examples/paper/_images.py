"""MLPs on images of 28 x 28: what MNIST, Fashion-MNIST and their variants share."""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import _above  # noqa: F401
import numpy as np
import torch
from _data import load_images
from _problem import Problem, Sizes
from _stacked import HEAVY_BALL, StackedRun, StageSetting, margin, mlp
from torch import Tensor
from torch.utils.data import TensorDataset

import source_proj as sp

__all__ = ["draw", "image_problem", "replace_labels", "shower"]

NAMES = {
    "mnist": [str(digit) for digit in range(10)],
    "fashion_mnist": ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"],
}


def draw(options: argparse.Namespace, dataset: str, count: int, queries: int) -> tuple[TensorDataset, TensorDataset]:
    """Draw training images and queries."""
    inputs, targets = load_images(options.data, dataset, "train")
    test_inputs, test_targets = load_images(options.data, dataset, "t10k")
    chosen = np.random.default_rng(0).permutation(len(inputs))[:count]
    asked = np.random.default_rng(1).permutation(len(test_inputs))[:queries]
    return TensorDataset(inputs[chosen], targets[chosen]), TensorDataset(test_inputs[asked], test_targets[asked])


def replace_labels(data: TensorDataset, share: float, seed: int = 0) -> tuple[TensorDataset, np.ndarray]:
    """Give a share of the examples another label, drawn among the wrong ones; also say which."""
    inputs, targets = data.tensors
    rng = np.random.default_rng(seed)
    noisy = np.zeros(len(targets), dtype=bool)
    noisy[rng.permutation(len(targets))[: round(share * len(targets))]] = True
    count = int(targets.max()) + 1
    shift = torch.from_numpy(rng.integers(1, count, size=len(targets)))
    return TensorDataset(inputs, torch.where(torch.from_numpy(noisy), (targets + shift) % count, targets)), noisy


def shower(sets: Mapping[str, TensorDataset], names: list[str]) -> Callable[[str, int], tuple[Any, str]]:
    """``show`` of a problem: the picture as ``(28, 28)`` in [0, 1], and its label's name."""

    def show(which: str, index: int) -> tuple[Any, str]:
        image, label = sets[which][index]
        pixels: Tensor = image.reshape(28, 28)
        return ((pixels - pixels.min()) / (pixels.max() - pixels.min())).numpy(), names[int(label)]

    return show


def image_problem(
    name: str,
    title: str,
    dataset: str,
    stages: Mapping[str, StageSetting],
    queries: TensorDataset,
    *,
    widths: tuple[int, ...],
    optimizer: partial[Any] = HEAVY_BALL,
    sizes: Sizes,
    notes: tuple[str, ...] = (),
    noisy: np.ndarray | None = None,
    kronecker: bool = False,
    cheap: bool = True,
    panel: str | None = "image",
) -> Problem:
    """Assemble a problem from its stages; ``panel=None`` where another task has panels of the same images."""
    run = StackedRun(mlp(784, *widths, 10), stages, queries, margin, optimizer)
    sets = {stage: setting.data for stage, setting in stages.items()}
    extra: dict[str, Any] = {
        "accuracy": run.accuracy,
        "record_more": run.record_more,
        "captured": partial(run.captured, sp.Classification()),
        "workers": 2,
    }
    return Problem(
        name=name,
        title=title,
        task=sp.Classification(),
        make_model=run.make_model,
        train_sets=sets,
        queries=queries,
        record=run.record,
        retrain=run.retrain,
        predict=run.predict,
        group=24,
        settings={"task": name, **run.settings()},
        sizes=sizes,
        notes=notes,
        noisy=noisy,
        panel=panel,
        show=shower({**sets, "queries": queries}, NAMES[dataset]),
        kronecker=kronecker,
        peers=len(sets) == 1,
        cheap=cheap,
        extra=extra,
    )
