"""Products of banked factors, streamed over shards: Ĥ = (1/N) Σ_i a_i a_iᵀ, and the moments between two metrics.

Each is a pure function of a block of rows, whose results are added up in a fixed order, within groups of shards and
then over the groups: products in float32, sums in float64, so that the error of a sum over all rows stays that of one
block. Of a symmetric product only the blocks on and above the diagonal are computed, half of the operations. Where a
sketch is taken as several (`columns`), all of them are made in one pass over the rows.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from source_proj._io.executors import Executor
from source_proj.attribution.curvature import (
    Factors,
    check_curvature,
    count_factors,
    iter_factors,
    iter_stored_factors,
)
from source_proj.attribution.gram_hessian import gram_spectrum
from source_proj.attribution.shards import ShardGroup, map_shards, shard_groups
from source_proj.attribution.spectral import Spectrum
from source_proj.bank import StageBank
from source_proj.kernels.gram import HEIGHT, gram_panels, mirrored, panel_count, upper_panels
from source_proj.sketch.columns import Columns, blocks_of

__all__ = [
    "add_up",
    "cross_moments",
    "decomposed",
    "factor_rows",
    "mean_hessian",
    "mean_panels",
    "spectrum",
    "takes_gram",
    "takes_spectrum",
]

Route = Literal["auto", "primal", "dual"]

_LARGEST, _APART = 16, 100  # of how many rows the largest is set apart, and how much larger it is than the next ones
_SMALL = 1024  # up to this k an eigendecomposition takes a fraction of a second


def takes_spectrum(dim: int) -> bool:
    """Whether Ĥ's eigenvectors are computed at once."""
    return dim <= _SMALL


def takes_gram(dim: int, count: int) -> bool:
    """Whether the Gram matrix of the factors ``(n, n)`` stands in for Ĥ.

    That is k n² + n³/3 operations for a Cholesky factor instead of k² n + k³/3, and for each query 4 k n + 2 n²
    instead of 2 k². Rows captured in training have no factors.
    """
    return 4 * count <= 3 * dim


def mean_hessian(
    stage: StageBank,
    checkpoints: Sequence[int],
    dim: int,
    curvature: Factors = "empirical_fisher",
    *,
    device: torch.device | str = "cpu",
    executor: Executor | None = None,
) -> Tensor:
    """The mean Hessian Ĥ of some checkpoints of a stage, ``(k, k)`` float64; see :func:`mean_panels`."""
    (panels,) = mean_panels(stage, checkpoints, blocks_of(dim, 1), curvature, device=device, executor=executor)
    return mirrored([panel.double() for panel in panels])


def mean_panels(
    stage: StageBank,
    checkpoints: Sequence[int],
    blocks: Sequence[Columns],
    curvature: Factors = "empirical_fisher",
    *,
    device: torch.device | str = "cpu",
    executor: Executor | None = None,
) -> list[list[Tensor]]:
    """The upper part of the mean Hessian Ĥ of some checkpoints, or what was captured of a segment, in panels.

    Args:
        stage: the stage's rows.
        checkpoints: which of its checkpoints are averaged.
        blocks: the columns that are taken, each as a sketch of its own; see `columns`.
        curvature: which factors (see `curvature`).
        device: where the products are computed.
        executor: computes them; None for this process.

    Returns:
        For each block, panels as of :func:`~source_proj.kernels.gram.gram_panels`: float64 sums, or float32 as they
        were captured.

    Raises:
        ValueError: for a curvature that the bank's rows do not offer, or several segments that were captured apart.
    """
    if stage.captured:
        return [upper_panels(own.to(device)) for own in _captured(stage, checkpoints, curvature, blocks)]
    check_curvature(stage, curvature)
    summed = iter(_summed(executor, partial(_panels, stage, curvature, device, blocks), stage, checkpoints, blocks))
    count = max(1, count_factors(stage, checkpoints, curvature))
    found = []
    for columns in blocks:
        panels = list(islice(summed, panel_count(columns.width)))
        made = [panel.to(device).double().mul_(columns.scale / count) for panel in panels]
        found.append(made or _nothing(columns.width, device))
    return found


def _nothing(dim: int, device: torch.device | str) -> list[Tensor]:
    """The panels of no rows' Hessian."""
    return upper_panels(torch.zeros(dim, dim, device=device, dtype=torch.float32))


def _captured(
    stage: StageBank, segments: Sequence[int], curvature: Factors, blocks: Sequence[Columns]
) -> Iterator[Tensor]:
    """Ĥ of each block, which is one of those that were captured, or a part of one."""
    check_curvature(stage, curvature)
    if len(segments) != 1:
        raise ValueError(
            f"the rows of stage {stage.name!r} are of whole segments of training, and {list(segments)} can't be "
            "joined afterwards: leave segments= out, or record (segment_ends=) or condense (segments=) with others"
        )
    wholes = zip(stage.captured_blocks, stage.captured_curvature(segments[0]), strict=True)
    there, whole = next(wholes)
    for columns in blocks:
        while columns.start >= there.stop:
            there, whole = next(wholes)
        own = slice(columns.start - there.start, columns.stop - there.start)
        yield whole[own, own] * columns.scale if len(blocks) > 1 else whole


def _summed(
    executor: Executor | None,
    function: Callable[[ShardGroup], list[Tensor]],
    stage: StageBank,
    checkpoints: Sequence[int],
    blocks: Sequence[Columns],
) -> list[Tensor]:
    """The sum of the matrices that a function makes of each group of shards."""
    groups = shard_groups(stage, checkpoints)
    nbytes = torch.float64.itemsize * sum(columns.width**2 for columns in blocks)
    return add_up(map_shards(executor, function, stage, groups, nbytes=nbytes))


def _panels(
    stage: StageBank, curvature: Factors, device: torch.device | str, blocks: Sequence[Columns], shards: ShardGroup
) -> list[Tensor]:
    return add_up(
        [panel for columns in blocks for panel in _of_rows(rows[:, columns.slice], weights)]
        for rows, weights in iter_stored_factors(stage, shards, curvature, device)
    )


def _of_rows(rows: Tensor, weights: Tensor | None) -> list[Tensor]:
    """The panels of some rows' sum, the largest rows' in float64 where eigenvalues are to be told from rounding.

    One example whose gradient is a thousand times as large as all others' would leave of these what float32 resolves of
    a millionfold, and functions without damping ask for just that.
    """
    if not takes_spectrum(rows.shape[1]):
        return gram_panels(rows, weights)
    sizes = rows.float().square().sum(1) * (1 if weights is None else weights.square())
    count = len(sizes) // _LARGEST
    largest, where = sizes.topk(count + 1)
    if not count or bool(largest[0] <= _APART * largest[-1]):
        return gram_panels(rows, weights)
    where, others = where[:count], sizes.new_ones(len(sizes)) if weights is None else weights.clone()
    exact = rows[where].double().mul_(others[where].double()[:, None])
    others[where] = 0
    starts = range(0, rows.shape[1], HEIGHT)
    return [
        panel.double().add_(exact[:, start : start + HEIGHT].T @ exact[:, start:])
        for start, panel in zip(starts, gram_panels(rows, others), strict=True)
    ]


def add_up(parts: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """Sum parts in order, in float64; one part alone as it is, and an empty list for none."""
    totals: list[Tensor] = []
    for part in parts:
        totals = [
            total.double().add_(more) for total, more in zip(totals, part, strict=True)
        ] if totals else list(part)  # fmt: skip
    return totals


def cross_moments(
    stage: StageBank,
    checkpoints: Sequence[int],
    blocks: Sequence[Columns],
    metric: int,
    curvature: Factors,
    *,
    device: torch.device | str = "cpu",
    executor: Executor | None = None,
) -> list[Tensor]:
    """C = (1/N) Σ_i (R P_m^½ a_i)(R P_l^½ a_i)ᵀ of each block, float64: the mean over checkpoints in the metric l.

    Args:
        stage: the stage's rows.
        checkpoints: which of its checkpoints are averaged.
        blocks: the columns that are taken, each as a sketch of its own.
        metric: the metric m of earlier checkpoints.
        curvature: which factors.
        device: where the products are computed.
        executor: computes them; None for this process.

    Raises:
        ValueError: for a curvature or a metric that the bank's rows do not offer.
    """
    check_curvature(stage, curvature)
    function = partial(_crossed, stage, curvature, device, metric, blocks)
    products = _summed(executor, function, stage, checkpoints, blocks)
    if not products:
        raise ValueError("a segment needs at least one checkpoint")
    count = count_factors(stage, checkpoints, curvature)
    pairs = zip(products, blocks, strict=True)
    return [product.to(device).double().mul_(columns.scale / count) for product, columns in pairs]


def _crossed(
    stage: StageBank,
    curvature: Factors,
    device: torch.device | str,
    metric: int,
    blocks: Sequence[Columns],
    shards: ShardGroup,
) -> list[Tensor]:
    there, here = (iter_factors(stage, shards, curvature, device, m) for m in (metric, None))
    return add_up(
        [a[:, columns.slice].T @ b[:, columns.slice] for columns in blocks] for a, b in zip(there, here, strict=True)
    )


def spectrum(
    stage: StageBank,
    checkpoints: Sequence[int],
    dim: int,
    curvature: Factors = "empirical_fisher",
    *,
    route: Route = "auto",
    device: torch.device | str = "cpu",
    executor: Executor | None = None,
) -> Spectrum:
    """Ĥ's spectrum: arguments and errors as for :func:`mean_hessian`.

    Args:
        stage: the stage's rows.
        checkpoints: which of its checkpoints are averaged.
        dim: the sketch's dimension k.
        curvature: which factors.
        route: ``"primal"`` decomposes Ĥ (k x k), ``"dual"`` the Gram matrix of its factors (n x n), ``"auto"`` what
            costs less. Both give the same functions, as f(Ĥ) = f(0) I + U (f(σ) - f(0)) Uᵀ on any orthonormal basis
            U of the range.
        device: where products and decomposition are computed.
        executor: computes the products; None for this process. The few rows of the dual route are read here.
    """
    dual = route == "dual"
    if route == "auto":
        count = count_factors(stage, checkpoints, curvature)
        dual = not stage.captured and (count < dim if takes_spectrum(dim) else takes_gram(dim, count))
    if not dual:
        return decomposed(mean_hessian(stage, checkpoints, dim, curvature, device=device, executor=executor))
    (rows,) = factor_rows(stage, checkpoints, curvature, blocks_of(dim, 1), device=device)
    return gram_spectrum(rows.double())


def factor_rows(
    stage: StageBank,
    checkpoints: Sequence[int],
    curvature: Factors,
    blocks: Sequence[Columns],
    *,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """For each block, rows A ``(n, k)`` float32 of which its Ĥ is AᵀA: all factors, over the root of their number."""
    (shards,) = shard_groups(stage, checkpoints, 1)
    pieces: list[list[Tensor]] = [[] for _ in blocks]
    for rows in iter_factors(stage, shards, curvature, device):
        for own, columns in zip(pieces, blocks, strict=True):
            own.append(rows[:, columns.slice].clone() if len(blocks) > 1 else rows)
    made = []
    for own, columns in zip(pieces, blocks, strict=True):
        joined = torch.cat(own)
        own.clear()  # a block's alone are in memory twice
        made.append(joined.mul_((columns.scale / max(1, len(joined))) ** 0.5))
    return made


def decomposed(hessian: Tensor) -> Spectrum:
    """The spectrum of Ĥ ``(k, k)``."""
    values, vectors = torch.linalg.eigh(hessian.double())
    return Spectrum(values.clamp_(min=0), vectors)
