"""Influence functions in the sketched space."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from source_proj._io.executors import Executor
from source_proj._io.progress import Progress
from source_proj.attribution.attributor import Attributor, Term
from source_proj.attribution.columns import checked_blocks
from source_proj.attribution.curvature import (
    Curvature,
    Damping,
    check_damping,
    damping_value,
    default_curvature,
    require_curvature,
)
from source_proj.attribution.features import QueryFeatures
from source_proj.attribution.fits import Fit, fitted_hessian
from source_proj.attribution.methods.last_metric import last_metric
from source_proj.attribution.operands import StageOperands, encoded_gradients
from source_proj.attribution.query_points import QueryGradient, check_query_gradient, query_points
from source_proj.attribution.spectral import ridge_inverse
from source_proj.bank import Bank
from source_proj.task import Task
from source_proj.trajectory import Checkpoint, StageRecord

__all__ = ["InfluenceFunction"]


class InfluenceFunction(Attributor):
    """Projected influence functions (Koh and Liang, arXiv 1703.04730).

        score(q, z) = -(1/N) ∇m(q)ᵀ (Ĥ + λ + ρ)⁻¹ g(z)

    with the training run's weight decay λ and damping ρ. Only the last stage is attributed to: an influence function
    sees one optimum, so examples of earlier stages get 0. In a bank of preconditioned gradients, Ĥ, g and ∇m are in the
    metric P of the last checkpoint, so that what is inverted is H + (λ + ρ) P⁻¹.

    Args:
        bank: a finalized bank, or a list of banks (scores are averaged).
        model: see :class:`~source_proj.attribution.attributor.Attributor`.
        task: likewise.
        average: take gradients and Hessian as means over all checkpoints of the last stage, as one-segment SOURCE
            does, instead of at its last checkpoint; of those in the last one's metric, where there are several.
        curvature: as for :class:`~source_proj.Source`.
        damping: ``"noise"`` (ρ = tr(Ĥ)/k), a number, or None. Without damping and weight decay, the inverse is taken on
            the range of Ĥ.
        blocks: as for :class:`~source_proj.Source`.
        query_gradient: as for :class:`~source_proj.Source`; without ``average`` the default is ``"final"``.
        batch_size: queries per backward pass.
        device: where products are computed and queries run.
        executor: computes what reads the whole bank; see :class:`~source_proj.attribution.attributor.Attributor`.
        cache: keep Hessians' spectra or factors beside the bank.
        progress: show progress bars for what takes over two seconds; False for none, or a function of (description,
            done, total).
    """

    def __init__(
        self,
        bank: Bank | Sequence[Bank],
        *,
        model: nn.Module | None = None,
        task: Task | None = None,
        average: bool = False,
        curvature: Curvature | None = None,
        damping: Damping = "noise",
        blocks: int | None = None,
        query_gradient: QueryGradient | None = None,
        batch_size: int = 64,
        device: torch.device | str | None = None,
        executor: Executor | None = None,
        cache: bool = True,
        progress: Progress = True,
    ) -> None:
        self.takes_captured = average
        super().__init__(
            bank, model=model, task=task, batch_size=batch_size, device=device, executor=executor, progress=progress
        )
        check_damping(damping)
        check_query_gradient(query_gradient)
        self.query_gradient: QueryGradient | None = query_gradient if average else query_gradient or "final"
        self.average = average
        self.curvature: Curvature = default_curvature(self.banks) if curvature is None else curvature
        require_curvature(self.banks, self.curvature)
        self.damping: Damping = damping
        self._blocks = checked_blocks(blocks, self.banks)
        self.cache = cache

    def _query_points(self, bank: Bank) -> list[Checkpoint]:
        return query_points(bank, self.query_gradient)

    def _query_metrics(self, bank: Bank) -> list[int]:
        return [last_metric(bank)]

    def _terms(self, bank: Bank, features: QueryFeatures) -> list[Term]:
        last, stage = len(bank.stages) - 1, bank.stages[-1]
        metric = stage.metric(-1)
        checkpoints = [stage.n_checkpoints - 1]
        if self.average:
            checkpoints = [c for c in range(stage.n_checkpoints) if stage.metric(c) == metric]
        fit = Fit(bank, last, checkpoints, self.curvature, self.device, self.cache, self.executor)
        given = self._query(bank, features, metric).to(self.device or "cpu")
        query = self._solved(fit, given, _decay(stage.record, checkpoints))
        rows = StageOperands(bank, last, partial(encoded_gradients, checkpoints=checkpoints, device=self.device))
        return [Term(query.float() * (-1 / stage.n), rows)]

    def _solved(self, fit: Fit, query: Tensor, decay: float) -> Tensor:
        """Queries ``(Q, k)`` times (Ĥ + λ + ρ)⁻¹, of weight decay λ."""
        sketch = fit.bank.sketch
        hessian = fitted_hessian(fit, self._blocks)
        ridge = decay + damping_value(self.damping, hessian.trace, sketch.dim, is_exact=sketch.is_exact)
        return hessian.multiply(query, ridge_inverse(ridge, hessian.dim))


def _decay(record: StageRecord, checkpoints: Sequence[int]) -> float:
    """Weight decay λ over the intervals that end at some checkpoints: they may differ, by clipping or scalar P."""
    intervals = record.cut(len(record.checkpoints))
    own = [intervals[checkpoint] for checkpoint in checkpoints]
    time = sum(each.time for each in own)
    same = len({each.decay for each in own}) == 1
    return own[-1].decay if same or not time else sum(each.decay * each.time for each in own) / time
