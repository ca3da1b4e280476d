"""Examples that harm a validation set."""

from __future__ import annotations

from typing import Any

import numpy as np

from source_proj.attribution.hits import checked_count
from source_proj.attribution.words import mean_effect
from source_proj.curate.aggregates import Aggregate
from source_proj.curate.chance import beyond_chance, pooled_freedom
from source_proj.curate.cleaning import Cleaning
from source_proj.curate.labels import Labels, classes_of

__all__ = ["class_quotas", "drop_worst", "harmful", "within_quotas"]


def harmful(aggregated: Aggregate, *, false_share: float = 0.05) -> Cleaning:
    """The training examples that worsened a validation set on average, beyond what its size leaves to chance.

    An example is named if its mean score over the queries is on the harmful side by more than the queries' spread
    explains, by Student's t: few queries tell little of their spread. The threshold keeps the expected share of false
    namings at ``false_share`` (Benjamini and Hochberg 1995, https://doi.org/10.1111/j.2517-6161.1995.tb02031.x). Groups
    count alike, whatever their sizes. Chance here is the draw of the validation set: what another run of the training
    would have said differently is not counted.

    It names few: on five small data sets, dropping them changed accuracy by -.02 to +.03 where a fifth of the labels
    were flipped, and by .00 to .01 where labels were right, nowhere beyond chance (guide page ``curation``). An example
    that harms these queries may be what others need: judge by :func:`source_proj.curate.verify`, on examples other than
    the validation set.

    Args:
        aggregated: what :func:`source_proj.curate.aggregate` returned for the validation set.
        false_share: expected share of the named examples that are named by chance, in (0, 1).

    Raises:
        TypeError: something else is given, such as the method itself.
        ValueError: the share is out of range, a group has one query alone, which has no spread, or a mean is not
            finite.
    """
    _require_aggregate(aggregated)
    if not 0 < false_share < 1:
        raise ValueError(f"false_share must lie strictly between 0 and 1, got {false_share}")
    if (aggregated.sizes < 2).any():
        alone = aggregated.groups[int(aggregated.sizes.argmin())]
        raise ValueError(f"group {alone!r} has one query, whose spread is unknown: give at least two, or drop_worst")
    benefit, error, _ = _over_groups(aggregated)
    freedom = aggregated.sizes - 1.0 if aggregated.freedom is None else aggregated.freedom
    named = beyond_chance(benefit, error, pooled_freedom(aggregated.error, freedom), false_share)
    return _named("harmful for the validation set", aggregated, named[np.argsort(benefit[named], kind="stable")])


def drop_worst(aggregated: Aggregate, n: int, *, labels: Labels | None = None) -> Cleaning:
    """The n training examples that worsened a validation set most (or bettered it least).

    The number is yours, and nothing says that all n do harm: :func:`harmful` leaves the number to the data. On five
    small data sets with a fifth of the labels flipped, as many dropped raised accuracy by .03 to .08; a tenth dropped
    where labels were right changed it by -.014 to +.006 (guide page ``curation``).

    Args:
        aggregated: what :func:`source_proj.curate.aggregate` returned for the validation set.
        n: how many to drop.
        labels: label of each training example; each class then loses its own share of the n, so that the classes keep
            their sizes to each other. Where one class is labelled worse than others, leave it out.

    Raises:
        TypeError: something else is given, such as the method itself.
        ValueError: n is not in 1..N-1, a label is missing or a row, or a mean is not finite.
        MismatchError: labels are not one for each training example.
    """
    _require_aggregate(aggregated)
    count = checked_count(n, len(aggregated.train_ids) - 1, "n")
    benefit, _, _ = _over_groups(aggregated)
    order = np.argsort(benefit, kind="stable")
    chosen = order[:count]
    if labels is not None:
        chosen = within_quotas(order, *class_quotas(labels, len(order), count))
    return _named("worst for the validation set", aggregated, chosen)


def class_quotas(labels: Labels, total: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Number of each example's class ``(N,)``, and each class's share of n by largest remainders ``(C,)``.

    Raises:
        MismatchError: labels are not one for each of ``total`` examples.
        ValueError: one is missing, or a row.

    Example:
        >>> class_quotas(["a", "a", "b", "a", "a"], 5, 3)
        (array([0, 0, 1, 0, 0]), array([2, 1]))
    """
    names, member = classes_of(labels, total)
    sizes = np.bincount(member, minlength=len(names))
    exact = n * sizes / total
    quota = np.floor(exact).astype(np.int64)
    quota[np.argsort(quota - exact, kind="stable")[: n - quota.sum()]] += 1
    return member, quota


def within_quotas(order: np.ndarray, member: np.ndarray, quota: np.ndarray) -> np.ndarray:
    """The examples of an order that are among the first of their class, as many as its quota."""
    rank = np.empty(len(order), dtype=np.int64)  # of each place of the order within its class
    for label in range(len(quota)):
        own = member[order] == label
        rank[own] = np.arange(own.sum())
    return np.asarray(order[rank < quota[member[order]]])


def _require_aggregate(given: Any) -> None:
    if not isinstance(given, Aggregate):
        raise TypeError(
            f"scores summed up over a validation set are needed, got a {type(given).__name__}: give "
            "source_proj.curate.aggregate(source, queries)"
        )
    bad = np.argwhere(~np.isfinite(given.mean))
    if len(bad):
        group, place = bad[0]
        raise ValueError(
            f"the mean score of {given.train_ids[place]!r} in group {given.groups[group]!r} is "
            f"{given.mean[group, place]}: sum finite scores up"
        )


def _over_groups(aggregated: Aggregate) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Benefit, its error and the share worsened of each example ``(N,)``, the groups counted alike."""
    groups = len(aggregated.groups)
    error = np.sqrt((aggregated.error**2).sum(0)) / groups
    return aggregated.benefit.mean(0), error, aggregated.worsened.mean(0)


def _named(what: str, aggregated: Aggregate, chosen: np.ndarray) -> Cleaning:
    benefit, error, worsened = (column[chosen] for column in _over_groups(aggregated))
    score = benefit if aggregated.higher_is_better else -benefit
    queries, additive = int(aggregated.sizes.sum()), aggregated.additive
    verdict = "and worsened {:.0%} of them" if additive else "on the harmful side for {:.0%} of them"
    reasons = [
        mean_effect(
            aggregated.unit,
            queries,
            f"{mean:+.3g}{'' if np.isnan(spread) else f' ± {spread:.2g}'}",
            additive=additive,
            groups=len(aggregated.groups),
        )
        + ", "
        + verdict.format(share)
        for mean, spread, share in zip(score, error, worsened, strict=True)
    ]
    return Cleaning(
        what,
        [aggregated.train_ids[place] for place in chosen],
        reasons,
        {"score": score, "error": error, "worsened": worsened},
        aggregated.train_ids,
        examples=aggregated.examples,
    )
