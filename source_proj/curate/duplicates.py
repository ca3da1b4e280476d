"""Examples that teach the model the same: near-duplicates by the angle between their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from source_proj._errors import MismatchError
from source_proj._io.numbers import plain_numbers
from source_proj._io.progress import Progress, progress_bar
from source_proj.attribution.operands import unit_rows
from source_proj.attribution.words import id_word
from source_proj.bank import Bank, StageBank
from source_proj.curate.cleaning import Cleaning

__all__ = ["near_duplicates"]

_BLOCK = 1024  # rows whose cosines with as many others are held at once
_ROUNDING = 1e-6  # of a cosine in float32: that of two equal rows comes out up to so much below 1


def near_duplicates(
    bank: Bank,
    *,
    threshold: float = 0.98,
    checkpoints: Sequence[int] | None = None,
    prefer: Sequence[float] | np.ndarray | None = None,
    progress: Progress = True,
) -> Cleaning:
    r"""Clusters of examples whose gradients point the same way, and all of each but one to drop.

    The likeness of two examples is the cosine of their losses' gradients, :math:`\cos(ℓ'_i φ_i, ℓ'_j φ_j)` of banked
    rows φ, averaged over checkpoints; examples at least ``threshold`` alike are joined, and what hangs together is a
    cluster (single linkage). Equal inputs with equal labels have cosine 1 up to the rounding of banked rows (.9999 in
    int8), and inputs that the model cannot tell apart come near it. A sketch of dimension k blurs a cosine by about
    :math:`1/\sqrt{k}` where it is small, and by less the nearer it is to 1.

    Equal inputs with different labels are none: they teach different things. Of a regression the side of the prediction
    on which the targets lie tells them apart: the cosine is -1 on opposite sides, and 1 on the same one whatever the
    targets. Where :math:`ℓ'` is 0, as the prediction meets the target or the example has no weight, an example is like
    others without ℓ' alone, by their φ.

    Rows are of the network's own gradients: what counts as alike is what this model cannot tell apart, which a
    converged one of few parameters says of many examples. Raise the threshold until the clusters are right by eye.
    Dropping copies saves time, and stops them from counting double; it seldom changes accuracy.

    Takes a pass over the bank, N · k numbers of memory and N² · k products for each stage.

    Args:
        bank: a finalized bank.
        threshold: least cosine, in (0, 1].
        checkpoints: indices of each stage's checkpoints that the cosines are averaged over; default: all.
        prefer: number of each training example; of a cluster the one with the highest is kept; default: the first.
        progress: show a progress bar.

    Returns:
        The copies, cluster by cluster, the largest cluster first; ``values`` hold the ``cluster``'s number, its
        ``size``, and the ``cosine`` with the most alike example.

    Raises:
        ValueError: the threshold is out of range, checkpoints are none, or ``prefer`` is not finite.
        TypeError: something else is given in the place of a bank, or checkpoints is no list.
        MismatchError: ``prefer`` has not one number for each training example.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is a cosine in (0, 1], got {threshold}")
    if not isinstance(bank, Bank):
        raise TypeError(f"near-duplicates are sought in a bank, such as source.banks[0], got {type(bank).__name__}")
    preferred = np.zeros(bank.n_rows) if prefer is None else np.asarray(plain_numbers(prefer), dtype=np.float64)
    if preferred.shape != (bank.n_rows,):
        raise MismatchError(f"got prefer of shape {preferred.shape} for {bank.n_rows} training examples: give one each")
    if not np.isfinite(preferred).all():
        place = int(np.flatnonzero(~np.isfinite(preferred))[0])
        raise ValueError(f"prefer must hold finite numbers, got {preferred[place]} at place {place}")
    clusters: list[np.ndarray] = []
    nearest = np.full(bank.n_rows, -1.0)
    partner = np.zeros(bank.n_rows, dtype=np.int64)
    first = 0
    for stage in bank.stages:
        span = slice(first, first + stage.n)
        parts = [_directions(stage, c) for c in _chosen(stage, checkpoints)]
        own, nearest[span], partner[span] = _linked(parts, threshold, progress)
        clusters += [first + members for members in own]
        partner[span] += first
        first += stage.n
    clusters.sort(key=lambda members: (-len(members), members[0]))
    return _cleaning(bank, clusters, preferred, nearest, partner)


def _cleaning(
    bank: Bank, clusters: list[np.ndarray], preferred: np.ndarray, nearest: np.ndarray, partner: np.ndarray
) -> Cleaning:
    """All of each cluster but the preferred one."""
    copies: list[int] = []
    number: list[int] = []
    reasons: list[str] = []
    ids, sizes = bank.ids, []
    for cluster, members in enumerate(clusters):
        stays = members[int(preferred[members].argmax())]
        for copy in members[members != stays].tolist():
            copies.append(copy)
            number.append(cluster)
            sizes.append(len(members))
            reasons.append(
                f"its gradient has cosine {nearest[copy]:.4f} with that of {id_word(ids[partner[copy]])}; of this "
                f"cluster of {len(members)}, {id_word(ids[stays])} is kept"
            )
    values = {"cluster": np.array(number, np.int64), "size": np.array(sizes, np.int64), "cosine": nearest[copies]}
    found = f" in {len(clusters)} clusters, the largest of {len(clusters[0])}" if clusters else ""
    return Cleaning(
        "near-duplicates" + found, [ids[copy] for copy in copies], reasons, values, ids, examples=bank.examples
    )


def _chosen(stage: StageBank, checkpoints: Sequence[int] | None) -> Sequence[int]:
    if checkpoints is None:
        return range(stage.n_checkpoints)
    if isinstance(checkpoints, int):
        raise TypeError(f"checkpoints is a list of indices, got {checkpoints}: give [{checkpoints}]")
    if not len(checkpoints):
        raise ValueError("checkpoints is empty: name at least one, or leave it out for all")
    return checkpoints


class _Directions(NamedTuple):
    """Which way the losses' gradients point at a checkpoint.

    Attributes:
        rows: φ ``(N, k)`` of length 1; those of zeros stay, and are like nothing.
        signs: of ℓ' ``(N,)``: -1, 0 or 1.
    """

    rows: Tensor
    signs: Tensor

    def cosines(self, i: int, j: int) -> Tensor:
        """Of the block of rows from i on with that from j on, ``(b, b)``."""
        one, other = slice(i, i + _BLOCK), slice(j, j + _BLOCK)
        signs = torch.outer(self.signs[one], self.signs[other])
        signs += torch.outer(self.signs[one] == 0, self.signs[other] == 0)
        return (self.rows[one] @ self.rows[other].T).mul_(signs)


def _directions(stage: StageBank, checkpoint: int) -> _Directions:
    blocks = [(unit_rows(block.rows), block.d1.sign()) for block in stage.iter_rows(checkpoint)]
    rows, signs = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return _Directions(rows, signs)


def _linked(
    parts: list[_Directions], threshold: float, progress: Progress
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Clusters of at least two, and each row's highest cosine with another one, and with which.

    Args:
        parts: directions of N rows at each checkpoint.
        threshold: least mean cosine of two rows that are joined.
        progress: of its bar.
    """
    n = len(parts[0].signs)
    root = np.arange(n)
    nearest = torch.full((n,), -2.0, dtype=torch.float32, device="cpu")
    partner = torch.zeros(n, dtype=torch.long, device="cpu")
    blocks = [(i, j) for i in range(0, n, _BLOCK) for j in range(i, n, _BLOCK)]
    with progress_bar(progress, "cosines", len(blocks), "blocks") as bar:
        for i, j in blocks:
            cosines = torch.stack([part.cosines(i, j) for part in parts]).mean(0)
            if i == j:
                cosines.fill_diagonal_(-2.0)
            _raise_to(nearest, partner, cosines.max(1), i, j)
            _raise_to(nearest, partner, cosines.max(0), j, i)
            for a, b in (cosines >= threshold - _ROUNDING).nonzero().tolist():
                _join(root, i + a, j + b)
            bar.update()
    roots = np.array([_root(root, place) for place in range(n)])
    order = np.argsort(roots, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(roots[order])) + 1)
    return [group for group in groups if len(group) > 1], nearest.numpy(), partner.numpy()


def _raise_to(nearest: Tensor, partner: Tensor, highest: torch.return_types.max, first: int, other: int) -> None:
    """Take a block's highest cosines where they are higher: of rows from ``first`` on, with rows from ``other`` on."""
    span = slice(first, first + len(highest.values))
    better = highest.values > nearest[span]
    partner[span] = torch.where(better, highest.indices + other, partner[span])
    nearest[span] = torch.where(better, highest.values, nearest[span])


def _root(root: np.ndarray, place: int) -> int:
    while root[place] != place:
        root[place] = root[root[place]]
        place = root[place]
    return int(place)


def _join(root: np.ndarray, one: int, other: int) -> None:
    low, high = sorted((_root(root, one), _root(root, other)))
    root[high] = low
