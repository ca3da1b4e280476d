"""Hessians in the sketched space, from banked rows.

For a segment, ``Ĥ = (1/N) Σ_i a_i a_iᵀ`` (mean over its checkpoints) with factors from banked rows φ:

* ``empirical_fisher``: a = √(1/w) ℓ'φ, the loss gradient, w what a label's log-likelihood counts for in the loss: the
  mean over T tokens has H = T · E[ḡ ḡᵀ], see :meth:`source_proj.task.Task.fisher_weight`;
* ``gauss_newton``: a = √ℓ'' φ;
* ``sampled_fisher``: a = gradient of the log-likelihood of a label drawn from the model, a bank option.

The products of these factors are in `moments`, and functions of Ĥ in `spectral`.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from source_proj.attribution.arguments import checked_number
from source_proj.attribution.shards import ShardGroup
from source_proj.bank import Bank, EncodedBlock, RowBlock, StageBank

__all__ = [
    "Curvature",
    "Damping",
    "Factors",
    "StoredFactors",
    "check_curvature",
    "check_damping",
    "count_factors",
    "damping_value",
    "default_curvature",
    "iter_factors",
    "iter_stored_factors",
    "noise_floor",
    "require_curvature",
]

Curvature = Literal["empirical_fisher", "sampled_fisher", "gauss_newton"]
Factors = Literal["empirical_fisher", "sampled_fisher", "gauss_newton", "features"]
"""A curvature, or ``features``: a = φ itself, TRAK's kernel."""
Damping = float | Literal["noise"] | None


def default_curvature(banks: Sequence[Bank]) -> Curvature:
    """The curvature for the task of some banks: Gauss-Newton for regression, the sampled Fisher for language models.

    Else, and where a language model's bank was built without rows of sampled labels, the empirical Fisher. One draw a
    row predicts retraining better by .027 [.017, .038] on Shakespeare and by .026 [.018, .034] on WikiText-2 at equal k
    (examples/paper/LABORATORY.md, study b).

    Rows that were captured in training have the curvature that was captured with them.

    The squared error's ℓ'' is the same for every example, while the empirical Fisher weighs each by its squared
    residual, which says nothing of the loss's curvature: on all four regression tasks of examples/paper retraining is
    predicted better without it. For classification the order is the reverse (examples/paper/LABORATORY.md, study b).
    """
    if banks[0].captured:
        return banks[0].stages[0].captured_kind
    task, draws = banks[0].task_spec, min(bank.settings.sampled_fisher for bank in banks)
    builtin = None if "class" in task else task["name"]
    if builtin == "causal_lm" and draws:
        return "sampled_fisher"
    return "gauss_newton" if builtin == "regression" else "empirical_fisher"


def noise_floor(trace: float, dim: int, *, is_exact: bool) -> float:
    """ρ = tr(Ĥ)/k, the size of the sketch's own noise in Ĥ's eigenvalues; 0 where the sketch is exact."""
    return 0.0 if is_exact else trace / dim


def check_damping(damping: Damping) -> None:
    """Refuse what is no damping.

    Raises:
        ValueError: unless damping is ``"noise"``, None, or a number >= 0.
        TypeError: it is of another type.
    """
    if isinstance(damping, str):
        if damping != "noise":
            raise ValueError(f"damping must be 'noise', None or a number >= 0, got {damping!r}")
    elif damping is not None:
        checked_number("damping", damping, least=0, hint="'noise', None")


def damping_value(damping: Damping, trace: float, dim: int, *, is_exact: bool) -> float:
    """Resolve a damping setting to the number that is added to the eigenvalues."""
    if damping is None:
        return 0.0
    if isinstance(damping, str):
        return noise_floor(trace, dim, is_exact=is_exact)
    return float(damping)


def check_curvature(stage: StageBank, curvature: Factors) -> None:
    """Refuse a curvature that a stage's rows do not offer.

    Raises:
        ValueError: there is none of this name, or it needs rows of sampled labels and there are none.
    """
    if curvature not in get_args(Factors):
        raise _unknown(curvature)
    if stage.captured:
        if curvature != stage.captured_kind:
            raise ValueError(
                f"curvature {curvature!r} can't be had of rows of whole segments of training: take "
                f"{stage.captured_kind!r}, which was kept with them, or a bank that was built of checkpoints"
            )
        return
    if curvature == "sampled_fisher" and stage.draws == 0:
        raise ValueError(
            "curvature 'sampled_fisher' needs rows of sampled labels, and this bank has none: "
            "build it with sampled_fisher=1 (or more draws), or choose 'empirical_fisher'"
        )


def require_curvature(banks: Sequence[Bank], curvature: Curvature) -> None:
    """Refuse a curvature that some stage of some banks does not offer; raises as :func:`check_curvature`."""
    for bank in banks:
        for stage in bank.stages:
            check_curvature(stage, curvature)
    if curvature not in get_args(Curvature):  # TRAK's kernel is none to choose
        raise _unknown(curvature)


def _unknown(curvature: object) -> ValueError:
    return ValueError(f"unknown curvature {curvature!r}; choose one of {', '.join(get_args(Curvature))}")


def count_factors(stage: StageBank, checkpoints: Sequence[int], curvature: Factors) -> int:
    """Number of factors a_i: one for each example, checkpoint and draw of a label."""
    draws = stage.draws if curvature == "sampled_fisher" and not stage.captured else 1
    return stage.n * len(checkpoints) * draws


def iter_factors(
    stage: StageBank,
    shards: ShardGroup,
    curvature: Factors,
    device: torch.device | str,
    metric: int | None = None,
) -> Iterator[Tensor]:
    """Yield the factors a_i as rows, ``(n, k)`` float32, block by block in a fixed order.

    Args:
        stage: the stage's rows.
        shards: which of its shards at which checkpoints.
        curvature: which factors (see the module's text).
        device: where they are to be.
        metric: the metric that they are in; default: each checkpoint's own.

    Raises:
        ValueError: for a curvature or a metric that the bank's rows do not offer.
    """
    check_curvature(stage, curvature)
    for checkpoint, own in shards:
        for block in stage.iter_rows(checkpoint, _rows_of(curvature), metric, own):
            rows, weights = block.rows.to(device), _weights(block, curvature)
            yield rows if weights is None else rows.mul_(weights.to(device)[:, None])


class StoredFactors(NamedTuple):
    """Factors a_i = w_i rows_i.

    Attributes:
        rows: ``(n, k)`` float32, float16 or int8.
        weights: w, ``(n,)`` float32; None for 1.
    """

    rows: Tensor
    weights: Tensor | None


def iter_stored_factors(
    stage: StageBank, shards: ShardGroup, curvature: Factors, device: torch.device | str
) -> Iterator[StoredFactors]:
    """Yield what :func:`iter_factors` does as it is stored, without a float32 copy; packed codes decoded.

    Args:
        stage: the stage's rows.
        shards: which of its shards at which checkpoints.
        curvature: which factors (see the module's text).
        device: where they are to be.

    Raises:
        ValueError: for a curvature that the bank's rows do not offer.
    """
    check_curvature(stage, curvature)
    for checkpoint, own in shards:
        for block in stage.iter_encoded(checkpoint, own, _rows_of(curvature)):
            if block.codec.packed:
                for piece in block.decoded(stage.dim):
                    yield _stored(piece.rows, _weights(piece, curvature), device)
            else:
                yield _stored(block.rows, _product(_weights(block, curvature), block.scale), device)


def _stored(rows: Tensor, weights: Tensor | None, device: torch.device | str) -> StoredFactors:
    return StoredFactors(rows.to(device), None if weights is None else weights.to(device))


def _rows_of(curvature: Factors) -> Literal["output", "sampled_fisher"]:
    return "sampled_fisher" if curvature == "sampled_fisher" else "output"


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """A times b, where None is 1."""
    return b if a is None else a if b is None else a * b


def _weights(block: RowBlock | EncodedBlock, curvature: Factors) -> Tensor | None:
    """What rows are times to be factors, ``(n,)``; None for 1."""
    if curvature == "empirical_fisher":
        return block.d1 if block.fisher_weight is None else block.d1 * block.fisher_weight
    if curvature in ("features", "sampled_fisher"):
        return None
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
