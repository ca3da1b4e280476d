"""A peer: EK-FAC influence functions by kronfluence (https://github.com/pomonam/kronfluence), at recorded checkpoints.

    score(q, z) = -(1/C) Σ_c (1/N) ∇m(q)ᵀ (H_c + ρ)⁻¹ g_c(z)        all gradients at checkpoint c (Grosse et al. 2023,
                                                                      https://arxiv.org/abs/2308.03296, at each of them)

Averaged over the C checkpoints of a run they are the most accurate method on raw gradients that we know of, and so are
what a sketch has to be compared with. The library's own part is all that matters: factors of sampled labels, and every
product. It covers ``nn.Linear`` and ``nn.Conv2d``, also with several tokens; embeddings and norms are left out.

Needs the extra ``kronecker``: pip install "source-proj[kronecker]".
"""

import copy
import gc
import hashlib
import io
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, get_args
from unittest.mock import patch

import _above  # noqa: F401
import numpy as np
import torch
from _data import write_whole
from _kronecker import Fisher, sampled_likelihood, training_loss
from torch import Tensor, nn

import source_proj as sp
from source_proj.evaluate import Candidate

__all__ = ["DAMPINGS", "DEFAULT", "HEURISTIC", "Damping", "Influence", "ekfac_influence", "installed", "peers"]

_BATCH = 256
_NAME = "EK-FAC influence functions"


class Damping(NamedTuple):
    """ρ, added to the eigenvalues.

    Attributes:
        value: the number itself, or how many times each layer's mean eigenvalue.
        relative: whether it is times the mean eigenvalue.
    """

    value: float
    relative: bool = True

    def __str__(self) -> str:
        return f"damping {self.value:g}{' mean eigenvalue' if self.relative else ''}"


DEFAULT = Damping(1e-8, relative=False)  # what kronfluence takes where it is told nothing
HEURISTIC = Damping(0.1)  # what it calls its heuristic, and Grosse et al. have
DAMPINGS = [DEFAULT, HEURISTIC, *map(Damping, (0.001, 0.01, 1.0, 10.0, 100.0, 1000.0))]


class Influence(NamedTuple):
    """Scores at one damping.

    Attributes:
        averaged: mean over the checkpoints, ``(Q, N)`` float32.
        final: at the last checkpoint alone, ``(Q, N)`` float32.
    """

    averaged: np.ndarray
    final: np.ndarray


def installed() -> bool:
    """Whether kronfluence is there."""
    return find_spec("kronfluence") is not None


def peers(
    make_model: Callable[[], nn.Module],
    task: sp.Task,
    trajectories: Sequence[sp.Trajectory],
    train_set: Any,
    queries: Any,
    dampings: Sequence[Damping] = DAMPINGS,
    *,
    folder: Path | None = None,
) -> list[Candidate]:
    """At the last checkpoint, and averaged over all, at their best damping; averaged also at the library's two own.

    Args:
        make_model: builds the architecture.
        task: gives loss and measurement.
        trajectories: the runs, of one stage each.
        train_set: map-style data set, N examples.
        queries: map-style data set, Q examples.
        dampings: the library's default and heuristic, then what else competes.
        folder: where what a checkpoint has taken is kept, for the next time; of these data sets alone.
    """

    @cache
    def run(index: int) -> list[Influence]:
        """By damping: the factors are the same for all."""
        checkpoints = trajectories[index].stages[0].checkpoints
        return ekfac_influence(make_model(), task, checkpoints, train_set, queries, dampings=dampings, folder=folder)

    def scores(kind: str, number: int) -> list[np.ndarray]:
        return [getattr(run(index)[number], kind) for index in range(len(trajectories))]

    averaged = f"{_NAME}, averaged"
    told = [(averaged, "averaged"), (_NAME, "final")]
    own = [(f"{averaged}, default damping", 0), (f"{averaged}, heuristic damping", 1)]
    return [
        *(
            Candidate(method, str(damping), partial(scores, kind, number))
            for method, kind in told
            for number, damping in enumerate(dampings)
        ),
        *(Candidate(method, str(dampings[number]), partial(scores, "averaged", number)) for method, number in own),
    ]


def ekfac_influence(
    model: nn.Module,
    task: sp.Task,
    checkpoints: Sequence[sp.Checkpoint],
    train_set: Any,
    queries: Any,
    *,
    dampings: Sequence[Damping] = (DEFAULT,),
    fisher: Fisher = "sampled",
    batch_size: int = _BATCH,
    seed: int = 0,
    progress: bool = False,
    folder: Path | None = None,
) -> list[Influence]:
    """EK-FAC influence functions at each checkpoint, their mean and the last one's.

    Args:
        model: the architecture; the weights are the checkpoints'.
        task: gives loss and measurement.
        checkpoints: C of them, in order.
        train_set: map-style data set, N examples.
        queries: map-style data set, Q examples.
        dampings: values of ρ; the factors are the same for all.
        fisher: where the factors' labels come from: drawn from the model's prediction, or the data's own.
        batch_size: examples a pass.
        seed: of the sampled labels; a checkpoint's is the seed plus its number.
        progress: show the library's progress bars.
        folder: where a checkpoint's scores are kept, and found by its weights and the numbers above; it tells neither
            tasks nor data sets apart.

    Returns:
        For each damping the scores, in the measurement's unit; positive where the example raises it.

    Raises:
        ImportError: without kronfluence.
        ValueError: no layer is covered, or an argument is out of range.
    """
    _check(model, checkpoints, fisher, dampings)
    totals: list[np.ndarray] = []
    for number, checkpoint in enumerate(checkpoints):
        state = checkpoint.load()
        told = [checkpoint.hash(), list(map(tuple, dampings)), fisher, batch_size, seed + number]
        name = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
        here = _kept(
            folder and folder / f"{name}.npy",
            partial(
                _at_checkpoint, model, task, state, train_set, queries, dampings, fisher, batch_size, seed + number,
                progress,
            ),
        )  # fmt: skip
        totals = here if not totals else [total + scores for total, scores in zip(totals, here, strict=True)]
    return [Influence(total / np.float32(len(checkpoints)), last) for total, last in zip(totals, here, strict=True)]


def _kept(path: Path | None, compute: Callable[[], list[np.ndarray]]) -> list[np.ndarray]:
    """What the file holds; else what is computed, which it holds from then on."""
    if path is None:
        return compute()
    if not path.exists():
        content = io.BytesIO()
        np.save(content, np.stack(compute()))
        write_whole(path, content.getvalue())
    return list(np.load(path))


def _at_checkpoint(
    model: nn.Module, task: sp.Task, state: Mapping[str, Tensor], train_set: Any, queries: Any,
    dampings: Sequence[Damping], fisher: Fisher, batch_size: int, seed: int, progress: bool,
) -> list[np.ndarray]:  # fmt: skip
    """Scores ``(Q, N)`` by damping."""
    try:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
        from kronfluence.task import Task
    except ImportError as error:
        raise ImportError('ekfac_influence needs kronfluence: pip install "source-proj[kronecker]"') from error
    loss, fisher_loss = training_loss(task), _fisher_loss(task, fisher, seed)

    class Adapter(Task):  # type: ignore[misc]  # kronfluence has no types
        """The task as kronfluence asks for it: summed over a batch."""

        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return (fisher_loss if sample else loss)(model, batch).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return task.measurement(model, batch).sum()

    own, adapter = copy.deepcopy(model), Adapter()  # kronfluence wraps a model's layers in place
    own.load_state_dict(dict(state))
    # A layer that is itself the whole model would be wrapped around itself.
    own = prepare_model(nn.Sequential(own) if isinstance(own, nn.Linear) else own, adapter)
    on_cpu = next(own.parameters()).device.type == "cpu"
    by_damping = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), _quick_collections():
        # What a newer torch calls deprecated in the library; nothing to act upon here.
        warnings.filterwarnings("ignore", message=r".*torch\.cuda\.amp", category=FutureWarning)
        analyzer = Analyzer("ekfac", own, adapter, cpu=on_cpu, disable_tqdm=not progress, output_dir=folder)
        analyzer.fit_all_factors(
            "factors", train_set, per_device_batch_size=batch_size, factor_args=FactorArguments(strategy="ekfac")
        )
        for number, damping in enumerate(dampings):
            with _heuristic(damping):
                analyzer.compute_pairwise_scores(
                    f"scores-{number}", "factors", queries, train_set,
                    score_args=ScoreArguments(damping_factor=None if damping.relative else damping.value),
                    per_device_query_batch_size=min(len(queries), batch_size), per_device_train_batch_size=batch_size,
                )  # fmt: skip
            scores = analyzer.load_pairwise_scores(f"scores-{number}")["all_modules"]  # (Q, N) ∇mᵀ (H + ρ)⁻¹ g
            by_damping.append(-scores.float().cpu().numpy() / np.float32(len(train_set)))
    return by_damping


@contextmanager
def _heuristic(damping: Damping) -> Iterator[None]:
    """Let the library's heuristic be another multiple of each layer's mean eigenvalue: it has no argument for that."""
    with patch("kronfluence.factor.config.HEURISTIC_DAMPING_SCALE", damping.value):
        yield


@contextmanager
def _quick_collections() -> Iterator[None]:
    """Spare all that is there: the library collects garbage after every pass, at up to half a second each time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _fisher_loss(task: sp.Task, fisher: Fisher, seed: int) -> Callable[[nn.Module, Any], Tensor]:
    """A function of (model, batch) to (B,) whose gradients' mean outer product is the Fisher: see ``fisher_weight``."""
    if fisher == "sampled":
        return sampled_likelihood(task, torch.Generator().manual_seed(seed))
    loss = training_loss(task)

    def empirical(model: nn.Module, batch: Any) -> Tensor:
        weight = task.fisher_weight(batch)
        return loss(model, batch) * (1.0 if weight is None else weight)

    return empirical


def _check(model: nn.Module, checkpoints: Sequence[sp.Checkpoint], fisher: str, dampings: Sequence[Damping]) -> None:
    if not any(isinstance(module, nn.Linear | nn.Conv2d) for module in model.modules()):
        raise ValueError(f"EK-FAC covers nn.Linear and nn.Conv2d, and {type(model).__name__} has neither")
    if not checkpoints:
        raise ValueError("EK-FAC influence functions need at least one checkpoint, got none")
    if fisher not in get_args(Fisher):
        raise ValueError(f"fisher must be one of {get_args(Fisher)}, got {fisher!r}")
    wrong = [damping for damping in dampings if not 0 <= damping.value < float("inf")]
    if wrong or not dampings:
        raise ValueError(f"dampings must be one or more numbers >= 0, got {list(dampings)}")
