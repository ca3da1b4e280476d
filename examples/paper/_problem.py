"""What a task of the paper's evaluation is: data, model, training, and what is measured of the queries.

Every file of this folder that is named after a task has a function ``problem(options) -> Problem``; the pipeline
(``_pipeline.py``) does everything else: retrains for the ground truth, records the runs that are attributed, builds
banks, scores them by every method, and writes table, figure and panels.
"""

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import _above  # noqa: F401
import numpy as np
from torch import nn

import source_proj as sp

__all__ = ["Examples", "Problem", "Sizes", "parser", "sized"]


class Examples(Protocol):
    """A map-style data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
        subsets: random subsets of the training set that are retrained, M.
        retrainings: models trained on each, R.
        runs: training runs that are attributed; the multiple-run column averages over them.
        dim: sketch dimension k; the library's default, where the machine allows it.
        smaller: other dimensions that TRAK may choose from.
        sketches: sketch seeds for each run.
    """

    subsets: int = 100
    retrainings: int = 3
    runs: int = 3
    dim: int = 4096
    smaller: tuple[int, ...] = (512,)
    sketches: int = 1


@dataclass(frozen=True)
class Problem:
    """One task of the evaluation.

    Attributes:
        name: of files, such as ``"fashion_mnist"``.
        title: for people, such as ``"Fashion-MNIST"``.
        task: what the model is trained for and what is measured.
        make_model: builds a freshly initialised model (or one from pretrained weights).
        train_sets: by stage, in order of training; the first one is attributed.
        queries: what is asked of the final model.
        record: ``record(seed, folder)`` trains on everything and returns the recorded trajectory, resuming a run that
            was killed in that folder; other seeds, other runs.
        retrain: ``retrain(kept, seeds)`` trains one model for each pair on a subset of the first stage's set (and on
            all of the later stages'), and returns the queries' measurements ``(len(kept), Q)``.
        group: how many models ``retrain`` likes to get at once.
        settings: everything that decides the outcomes, JSON-able: it names the cache.
        sizes: how much of everything.
        notes: sentences for the table's head, such as what differs from the paper.
        predict: ``predict(kept, seeds)`` like ``retrain``, but returns predicted classes; for subset removal.
        layer: name of the module whose input is the last hidden layer, for RepSim; None for the last Linear.
        noisy: which training examples had their label flipped or replaced, bool ``(N,)``; None where none had.
        panel: how to show an example: ``"image"``, ``"text"``, or None.
        show: ``show(stage_or_"queries", index)`` gives an image ``(H, W[, 3])`` or a string, and its label's name.
        kronecker: whether to compute EK-FAC SOURCE, for small models of linear layers.
        peers: whether to compute kronfluence's EK-FAC influence functions: for small models, trained in one stage.
        cheap: whether retraining is so cheap that empirical influence gets retrainings of its own.
        extra: further facts, by name: "workers", processes that retrain; "accuracy", ``accuracy(seed, folder)`` says
            how good a recorded run is; "record_more", ``record_more(seed, folder, checkpoints)`` records the same run
            with another number of checkpoints a stage, for the laboratory.
    """

    name: str
    title: str
    task: sp.Task
    make_model: Callable[[], nn.Module]
    train_sets: Mapping[str, Examples]
    queries: Examples
    record: Callable[[int, Path], sp.Trajectory]
    retrain: Callable[[list[np.ndarray], list[int]], np.ndarray]
    group: int
    settings: Mapping[str, Any]
    sizes: Sizes = Sizes()
    notes: tuple[str, ...] = ()
    predict: Callable[[list[np.ndarray], list[int]], np.ndarray] | None = None
    layer: str | None = None
    noisy: np.ndarray | None = None
    panel: str | None = None
    show: Callable[[str, int], tuple[Any, str]] | None = None
    kronecker: bool = False
    peers: bool = False
    cheap: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Number of training examples that are attributed: those of the first stage."""
        return len(next(iter(self.train_sets.values())))


def parser(description: str) -> argparse.ArgumentParser:
    """Options that all tasks share."""
    from _data import add_data_option

    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_option(found)
    cache = os.environ.get("SOURCE_PROJ_CACHE", "cache/paper")
    found.add_argument("--cache", type=Path, default=Path(cache), help="runs, banks and retrainings, kept between runs")
    found.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="tables and figures")
    found.add_argument("--full", action="store_true", help="the paper's size, for a GPU or much patience")
    found.add_argument("--quick", action="store_true", help="a miniature, to see it work; not kept with the results")
    found.add_argument("--methods", help="only those that begin so: their rows go into the table that is there")
    found.add_argument("--device", help="where models are trained and scored; default: a GPU where there is one")
    return found


def sized(options: argparse.Namespace, full: Any, default: Any, quick: Any) -> Any:
    """Pick a size by the options."""
    return full if options.full else quick if options.quick else default
