"""Hessians in the sketched space, from banked rows.

For a segment, ``Ĥ = (1/N) Σ_i a_i a_iᵀ`` (mean over its checkpoints) with factors from banked rows φ:

* ``empirical_fisher``: a = √(1/w) ℓ'φ, the loss gradient, w what a label's log-likelihood counts for in the loss: the
  mean over T tokens has H = T · E[ḡ ḡᵀ], see :meth:`source_proj.task.Task.fisher_weight`;
* ``gauss_newton``: a = √ℓ'' φ;
* ``sampled_fisher``: a = gradient of the log-likelihood of a label drawn from the model, a bank option.

A matrix function f(Ĥ) needs Ĥ's spectrum. It is taken from Ĥ itself (k x k), or, where the rows are fewer than k,
from their Gram matrix: both give the same function, because f(Ĥ) = f(0) I + U (f(σ) - f(0)) Uᵀ on any orthonormal
basis U of the range.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from source_proj.attribution.spectral import Spectrum
from source_proj.bank import RowBlock, StageBank

__all__ = [
    "Curvature",
    "Damping",
    "check_damping",
    "cross_moment",
    "damping_value",
    "default_curvature",
    "noise_floor",
    "spectrum",
]

Curvature = Literal["empirical_fisher", "sampled_fisher", "gauss_newton"]
Factors = Literal["empirical_fisher", "sampled_fisher", "gauss_newton", "features"]
"""A curvature, or ``features``: a = φ itself, TRAK's kernel."""
Damping = float | Literal["noise"] | None
Route = Literal["auto", "primal", "dual"]


def default_curvature(task: Mapping[str, Any], *, captured: bool = False) -> Curvature:
    """The curvature for a bank's task, by its description: Gauss-Newton for regression, else empirical Fisher.

    Rows that were captured in training have the empirical Fisher that was captured with them.

    The squared error's ℓ'' is the same for every example, while the empirical Fisher weighs each by its squared
    residual, which says nothing of the loss's curvature: on all four regression tasks of examples/paper retraining is
    predicted better without it. For classification the order is the reverse (examples/paper/LABORATORY.md, study b).
    """
    if captured:
        return "empirical_fisher"
    return "gauss_newton" if task["name"] == "regression" and "class" not in task else "empirical_fisher"


def noise_floor(trace: float, dim: int, *, is_exact: bool) -> float:
    """ρ = tr(Ĥ)/k, the size of the sketch's own noise in Ĥ's eigenvalues; 0 where the sketch is exact."""
    return 0.0 if is_exact else trace / dim


def check_damping(damping: Damping) -> None:
    """Refuse what is no damping.

    Raises:
        ValueError: unless damping is ``"noise"``, None, or a number >= 0.
    """
    valid = damping == "noise" if isinstance(damping, str) else damping is None or 0 <= damping < math.inf
    if not valid:
        raise ValueError(f"damping must be 'noise', None or a number >= 0, got {damping!r}")


def damping_value(damping: Damping, trace: float, dim: int, *, is_exact: bool) -> float:
    """Resolve a damping setting to the number that is added to the eigenvalues."""
    if damping is None:
        return 0.0
    if isinstance(damping, str):
        return noise_floor(trace, dim, is_exact=is_exact)
    return float(damping)


def spectrum(
    stage: StageBank,
    checkpoints: Sequence[int],
    dim: int,
    curvature: Factors = "empirical_fisher",
    *,
    route: Route = "auto",
    device: torch.device | str = "cpu",
) -> Spectrum:
    """Compute the spectrum of the mean Hessian of some checkpoints of a stage, from banked rows in fixed order.

    Args:
        stage: the stage's rows.
        checkpoints: which of its checkpoints are averaged.
        dim: the sketch's dimension k.
        curvature: which factors (see the module's text).
        route: ``"primal"`` decomposes Ĥ (k x k), ``"dual"`` the Gram matrix of all factors (n x n), ``"auto"`` the
            smaller of the two.
        device: where the products and the decomposition are computed.

    Raises:
        ValueError: for a curvature that the bank's rows do not offer.
    """
    _check(stage, curvature)
    if stage.captured:
        return _captured(stage, checkpoints)
    draws = stage.draws if curvature == "sampled_fisher" else 1
    count = stage.n * draws * len(checkpoints)
    if route == "dual" or (route == "auto" and count < dim):
        return _dual(_factors(stage, checkpoints, curvature, device), count)
    return _primal(_factors(stage, checkpoints, curvature, device), count, dim)


def cross_moment(
    stage: StageBank,
    checkpoints: Sequence[int],
    metric: int,
    curvature: Factors = "empirical_fisher",
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """C = (1/N) Σ_i (R P_m^½ a_i)(R P_l^½ a_i)ᵀ, ``(k, k)`` float64: the mean over some checkpoints in the metric l.

    Args:
        stage: the stage's rows.
        checkpoints: which of its checkpoints are averaged.
        metric: the metric m of earlier checkpoints.
        curvature: which factors.
        device: where the products are computed.

    Raises:
        ValueError: for a curvature or a metric that the bank's rows do not offer.
    """
    _check(stage, curvature)
    total: Tensor | None = None
    count = 0
    pairs = (_factors(stage, checkpoints, curvature, device, m) for m in (metric, None))
    for there, here in zip(*pairs, strict=True):
        product = (there.T @ here).double()
        total = product if total is None else total.add_(product)
        count += len(here)
    if total is None:
        raise ValueError("a segment needs at least one checkpoint")
    return total.div_(count)


def _check(stage: StageBank, curvature: Factors) -> None:
    if curvature not in get_args(Factors):
        raise ValueError(f"unknown curvature {curvature!r}; choose one of {', '.join(get_args(Curvature))}")
    if stage.captured and curvature != "empirical_fisher":
        raise ValueError(
            f"curvature {curvature!r} can't be had of rows captured in training, which sum loss gradients over a "
            "segment: take 'empirical_fisher', which was captured with them, or build the bank from checkpoints"
        )
    if curvature == "sampled_fisher" and stage.draws == 0:
        raise ValueError(
            "curvature 'sampled_fisher' needs rows of sampled labels, and this bank has none: "
            "build it with sampled_fisher=1 (or more draws), or choose 'empirical_fisher'"
        )


def _captured(stage: StageBank, segments: Sequence[int]) -> Spectrum:
    """The spectrum of the empirical Fisher that was captured in a segment."""
    if len(segments) != 1:
        raise ValueError(
            f"the rows of stage {stage.name!r} were captured by segments, and the segments {list(segments)} can't be "
            "joined afterwards: leave segments= out, or record with other segment_ends="
        )
    values, vectors = torch.linalg.eigh(stage.captured_curvature(segments[0]).double())
    return Spectrum(values.clamp_(min=0), vectors)


def _factors(
    stage: StageBank,
    checkpoints: Sequence[int],
    curvature: Factors,
    device: torch.device | str,
    metric: int | None = None,
) -> Iterator[Tensor]:
    """Yield the factors a_i as rows, ``(n, k)`` float32, block by block."""
    what: Literal["output", "sampled_fisher"] = "sampled_fisher" if curvature == "sampled_fisher" else "output"
    for checkpoint in checkpoints:
        # Named only where it is another than the checkpoint's own.
        other = {} if metric is None else {"metric": metric}
        for block in stage.iter_rows(checkpoint, what, **other):
            rows = block.rows.to(device)
            yield rows if curvature == "sampled_fisher" else rows.mul_(_weights(block, curvature).to(device)[:, None])


def _weights(block: RowBlock, curvature: Factors) -> Tensor:
    if curvature == "empirical_fisher":
        return block.d1 if block.fisher_weight is None else block.d1 * block.fisher_weight
    if curvature == "features":
        return torch.ones_like(block.d1)
    if block.d2 is None:
        raise ValueError(
            "curvature 'gauss_newton' needs the second derivative of the loss in the output, and this bank's task has "
            "none (its loss is no function of one scalar): choose 'empirical_fisher', or 'sampled_fisher'"
        )
    if bool((block.d2 < 0).any()):
        raise ValueError(
            f"curvature 'gauss_newton' needs ℓ'' >= 0, got {float(block.d2.min())} among training rows {block.start} "
            f"to {block.stop}: choose 'empirical_fisher'"
        )
    return block.d2.sqrt()


def _primal(factors: Iterator[Tensor], count: int, dim: int) -> Spectrum:
    total: Tensor | None = None
    for rows in factors:
        # One float32 product a block, added up in float64: the error of a sum over all N rows stays that of one block.
        product = (rows.T @ rows).double()
        total = product if total is None else total.add_(product)
    if total is None:
        total = torch.zeros(dim, dim, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(total.div_(count))
    return Spectrum(values.clamp_(min=0), vectors)


def _dual(factors: Iterator[Tensor], count: int) -> Spectrum:
    rows = torch.cat(list(factors)).double()  # (n, k), n < k
    gram = rows @ rows.T / count
    values, vectors = torch.linalg.eigh(gram)
    # Eigenvalues at rounding level belong to the null space; dividing by their roots would blow up noise.
    kept = values > values[-1].clamp(min=0) * len(values) * torch.finfo(torch.float64).eps
    values, vectors = values[kept], vectors[:, kept]
    basis = rows.T @ (vectors / (values * count).sqrt())
    return Spectrum(values, basis)
