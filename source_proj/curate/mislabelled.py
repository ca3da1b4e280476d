"""Examples that are likely mislabelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from source_proj._errors import MismatchError
from source_proj.attribution.features import QueryFeatures, point_key
from source_proj.attribution.hits import checked_count
from source_proj.attribution.query_points import takes_mean
from source_proj.attribution.source import Source
from source_proj.attribution.words import id_word
from source_proj.bank import Bank
from source_proj.bank.examples import Examples
from source_proj.curate.cleaning import Cleaning
from source_proj.curate.labels import Labels, classes_of, named_column
from source_proj.task import Classification, Regression, Task
from source_proj.trajectory import Checkpoint

__all__ = ["mislabelled"]

By = Literal["error", "self_influence", "disagreement"]

_SIGMAS = 3.5
_NORMAL = 1.4826  # standard deviations in a median absolute deviation of normal values


def mislabelled(source: Source, labels: Labels, *, n: int | None = None, by: By = "error") -> Cleaning:
    r"""Training examples whose label is likely wrong, the most suspicious first; needs neither model nor data.

    By ``"error"``: the mean of :math:`|ℓ'|` over the checkpoints, for a classifier :math:`1 - p` of its label. Wrong
    labels are learnt last (Paul et al. 2021, https://arxiv.org/abs/2107.07075). The bank has it, and no attribution is
    needed.

    By ``"self_influence"``: how much each example lowered its own loss,
    :meth:`source_proj.Source.self_influence`. An example that none other supports is fitted by itself alone; so are
    rare ones that are right.

    By ``"disagreement"``: how much each example raised the mean training loss of the other class that it harmed most,
    which may be its own. Of a captured or condensed bank, gradients of these losses are the means over segments.

    Of five small data sets with a fifth of the labels flipped, the error and self-influence found them as well as
    out-of-fold probabilities (cleanlab) do at the price of more training, and dropping as many raised accuracy by .02
    to .09. Where labels are right it takes the rare cases away: a tenth dropped changed accuracy by -.02 to +.01. Guide
    page ``curation`` has the numbers and their intervals. Look at the examples first.

    Args:
        source: SOURCE on the bank.
        labels: label of each training example.
        n: how many to name; default: by the error of a classifier (without smoothing and weights) those whose label was
            on average less probable than halfway from what labels of their class had, p, to what that left to each of
            the K - 1 others, (1 - p) / (K - 1): below 1/2 with two classes. Else those whose value lies beyond 3.5
            robust standard deviations (median and median absolute deviation) of their own class, or of all where labels
            are numbers, as of a regression.
        by: which of the three.

    Raises:
        TypeError: something else is given in the place of SOURCE, such as a bank or another method.
        ValueError: ``by`` is none of them, n is not in 1..N-1, a label is missing (NaN, None) or a row, there is one
            class alone, all errors are the same (as those of language models are), or disagreement is asked of a run of
            several stages, or of labels that are numbers.
        MismatchError: labels are not one for each training example; or an optimizer's metrics differ between
            checkpoints, where disagreement needs ``Source(..., query_gradient="final")``.
    """
    if not isinstance(source, Source):
        raise TypeError(f"mislabelled examples are sought by SOURCE, got a {type(source).__name__}: give Source(bank)")
    if by not in get_args(By):
        raise ValueError(f"by must be one of {list(get_args(By))}, got {by!r}")
    ids = source.banks[0].ids
    names, label = classes_of(labels, len(ids))
    if len(names) < 2:
        raise ValueError(f"all labels are {names[0]!r}: there must be at least two classes")
    numbers = _are_numbers(names, source.banks[0].task_spec)
    if numbers and by == "disagreement":
        raise ValueError("labels are numbers, and no class disagrees: use by='error' or by='self_influence'")
    member = np.zeros_like(label) if numbers else label
    rival: np.ndarray | None = None
    if by == "error":
        suspicion = _mean_error(source)
    elif by == "self_influence":
        suspicion = np.asarray(source.self_influence(), dtype=np.float64)
    else:
        suspicion, rival = _most_harmed(source, member)
    chosen = np.arange(len(ids))
    if n is None:
        is_probability = by == "error" and _tells_probability(source.task)
        chosen = np.flatnonzero(_improbable(suspicion, member)) if is_probability else _outliers(suspicion, member)
    chosen = chosen[np.argsort(-suspicion[chosen], kind="stable")]
    if n is not None:
        chosen = chosen[: checked_count(n, len(ids) - 1, "n")]
    values: dict[str, np.ndarray] = {by: suspicion[chosen]}
    if rival is not None:
        values["rival"] = named_column([names[label] for label in rival[chosen]])
    shown = source.shown().train
    words = [_word(name, None if numbers else shown) for name in names]
    among = "" if numbers else " in its class"
    reasons = [
        f"labelled {words[label[place]]}, {_reason(place, by, suspicion, member, words, rival)}{among}"
        for place in chosen.tolist()
    ]
    what = f"likely mislabelled by {by.replace('_', '-')}"
    return Cleaning(what, [ids[place] for place in chosen], reasons, values, ids, examples=shown)


def _reason(
    place: int, by: By, suspicion: np.ndarray, member: np.ndarray, words: Sequence[str], rival: np.ndarray | None
) -> str:
    """What makes an example suspicious, and how it ranks; ``rival`` is the class that each harmed most."""
    own = suspicion[member == member[place]]
    rank = f"rank {1 + int((own > suspicion[place]).sum())} of {len(own)}"
    if rival is not None:
        return f"it changed the mean loss of class {words[rival[place]]} by {suspicion[place]:+.3g}, {rank}"
    if by == "error":
        return f"its error was {suspicion[place]:.3g} on average over the checkpoints, {rank}"
    return f"it lowered its own loss by {suspicion[place]:.3g}, {rank}"


def _are_numbers(names: Sequence[Any], task: Mapping[str, Any]) -> bool:
    """Whether labels are numbers of a regression, and no classes."""
    own = "class" in task and any(isinstance(name, float) and name % 1 for name in names)
    return own or bool(task["name"] == Regression.name)


def _word(name: Any, shown: Examples | None) -> str:
    """A label as a reason says it."""
    if shown is not None and isinstance(name, int):
        return shown.said(name)
    return f"{name:.4g}" if isinstance(name, float) else str(id_word(name))


def _tells_probability(task: Task) -> bool:
    """Whether |ℓ'| is 1 - p, p the probability of the label."""
    return type(task) is Classification and not (
        task.label_smoothing or task.class_weights is not None or task.sample_weight is not None
    )


def _mean_error(source: Source) -> np.ndarray:
    """Mean of |ℓ'| over the checkpoints of an example's stage, and over the runs, ``(N,)`` float64.

    Raises:
        ValueError: it is the same for all, or not known of rows of whole segments.
    """
    for bank in source.banks:
        if bank.captured:
            raise ValueError(
                f"the rows of {bank.path} are of whole segments of training, and say nothing of errors at checkpoints: "
                "use by='self_influence', or a bank that was built of checkpoints"
            )
    total = np.zeros(source.n_rows)
    for bank in source.banks:
        first = 0
        for stage in bank.stages:
            for checkpoint in range(stage.n_checkpoints):
                errors = torch.cat([block.d1 for block in stage.iter_encoded(checkpoint)]).abs().double().numpy()
                total[first : first + stage.n] += errors / (stage.n_checkpoints * len(source.banks))
            first += stage.n
    if len(total) > 1 and np.ptp(total) == 0:
        raise ValueError(f"the error of all examples is {total[0]:.3g} under this task: use by='self_influence'")
    return total


def _most_harmed(source: Source, member: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much each example raised the mean loss of the other class that it harmed most, and which that is.

    Args:
        source: SOURCE on the bank.
        member: number of each example's class ``(N,)``.

    Returns:
        ``(N,)`` float64, and ``(N,)`` int64.

    Raises:
        ValueError: the run had several stages.
        MismatchError: rows are not there in all metrics.
    """
    classes = int(member.max()) + 1
    mean = source.score([_class_features(bank, source, member, classes) for bank in source.banks]).values  # (C, N)
    harm = -mean.astype(np.float64)  # a score is the change of minus the loss
    harm[member, np.arange(len(member))] = -np.inf
    return harm.max(0), harm.argmax(0)


def _class_features(bank: Bank, source: Source, member: np.ndarray, classes: int) -> QueryFeatures:
    """Gradients of minus the mean training loss of each class, at every checkpoint, from the bank's own rows."""
    if len(bank.stages) > 1:
        raise ValueError(
            f"the run has {len(bank.stages)} stages, whose losses are no one measurement: use by='self_influence'"
        )
    if len(bank.metrics) > 1 and takes_mean(bank, source.query_gradient):
        raise MismatchError(
            f"the bank has rows in {len(bank.metrics)} metrics, all of them at the last checkpoint alone: give "
            "Source(..., query_gradient='final'), or use by='self_influence'"
        )
    (stage,) = bank.stages
    sizes = torch.from_numpy(np.bincount(member, minlength=classes))
    rows: dict[str, Tensor] = {}
    for checkpoint in range(stage.n_checkpoints):
        for metric in {stage.metric(checkpoint), *bank.trajectory.crossed_metrics(0, checkpoint)}:
            total = torch.zeros(classes, bank.sketch.dim, dtype=torch.float32, device="cpu")
            for block in stage.iter_rows(checkpoint, metric=metric):
                own = torch.from_numpy(member[block.start : block.stop])
                total.index_add_(0, own, -block.d1[:, None] * block.rows)
            for point in _points_of(bank, checkpoint):
                rows[point_key(point, bank.metrics.hash(metric))] = total / sizes[:, None]
    return QueryFeatures(rows, list(range(classes)), bank.sketch.spec())


def _points_of(bank: Bank, place: int) -> list[Checkpoint]:
    """Where the gradients are known by a stage's rows at a place: there, or, of mean rows, on average of a segment."""
    point = bank.checkpoint(0, place)
    if not bank.captured:
        return [point]
    ends = [-1, *(end.step for end in bank.trajectory.stages[0].checkpoints)]
    return [point, *(own for own in bank.query_points() if ends[place] < own.step <= ends[place + 1])]


def _improbable(error: np.ndarray, member: np.ndarray) -> np.ndarray:
    """Which labels were less probable than halfway between those of their class and another class, ``(N,)`` bool.

    A fixed 1/2 names whatever a network that is unsure of many classes has not learnt yet: on MNIST and Fashion-MNIST
    after 3 to 40 epochs, with a tenth of the labels changed, 19 % of the examples, and this 12 %.
    """
    sizes = np.bincount(member)
    likely = 1 - np.bincount(member, error) / sizes  # (K,)
    other = (1 - likely) / (len(sizes) - 1)
    named: np.ndarray = 1 - error < (likely + other)[member] / 2
    return named


def _outliers(suspicion: np.ndarray, member: np.ndarray) -> np.ndarray:
    """Positions of the values far above the middle of their own class."""
    outlying = np.zeros(len(suspicion), dtype=bool)
    for label in range(int(member.max()) + 1):
        own = member == label
        middle = np.median(suspicion[own])
        spread = _NORMAL * np.median(np.abs(suspicion[own] - middle))
        outlying[own] = suspicion[own] > middle + _SIGMAS * spread
    return np.flatnonzero(outlying)
