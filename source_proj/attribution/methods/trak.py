"""TRAK: a linear model in the sketched tangent features of the final checkpoint."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from source_proj._io.executors import Executor
from source_proj._io.progress import Progress
from source_proj.attribution.arguments import checked_number
from source_proj.attribution.attributor import Attributor, Term
from source_proj.attribution.features import QueryFeatures
from source_proj.attribution.fits import Fit, fitted_hessian
from source_proj.attribution.methods.last_metric import last_metric
from source_proj.attribution.operands import Operand, StageOperands, stage_start
from source_proj.attribution.spectral import ridge_inverse
from source_proj.bank import Bank
from source_proj.task import Task

__all__ = ["Trak"]


class Trak(Attributor):
    """TRAK (Park et al., "TRAK: Attributing Model Behavior at Scale", arXiv 2303.14186, eq. 13 to 17).

        score(q, ·) = φ(q)ᵀ (ΦᵀΦ + rN)⁻¹ Φᵀ · Q,     Q_z = -ℓ'_z  (1 - p of the correct class)

    with Φ the sketched gradients of the model output at the last checkpoint. Over a list of banks it ensembles as TRAK
    does: the kernel terms and the weights Q are averaged over the runs separately, then multiplied. Each bank should
    have its own sketch seed. Only the last stage is attributed to; examples of earlier stages get 0.
    In a bank of preconditioned gradients φ = R P^½ ∇o, with P at the last checkpoint.

    Args:
        bank: a finalized bank, or a list of banks.
        model: see :class:`~source_proj.attribution.attributor.Attributor`.
        task: likewise.
        ridge: r, added to the eigenvalues of ΦᵀΦ/N.
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
        ridge: float = 0.0,
        batch_size: int = 64,
        device: torch.device | str | None = None,
        executor: Executor | None = None,
        cache: bool = True,
        progress: Progress = True,
    ) -> None:
        super().__init__(
            bank, model=model, task=task, batch_size=batch_size, device=device, executor=executor, progress=progress
        )
        self.ridge = checked_number("ridge", ridge, least=0)
        self.cache = cache

    def _query_metrics(self, bank: Bank) -> list[int]:
        return [last_metric(bank)]

    def _terms(self, bank: Bank, features: QueryFeatures) -> list[Term]:
        last, stage = len(bank.stages) - 1, bank.stages[-1]
        fit = Fit(bank, last, [stage.n_checkpoints - 1], "features", self.device, self.cache, self.executor)
        hessian = fitted_hessian(fit)
        metric = bank.metrics.hash(stage.metric(-1))
        given = features.at(bank.final_checkpoint(), metric).to(self.device or "cpu")
        query = hessian.multiply(given, ridge_inverse(self.ridge, hessian.dim))
        read = partial(_features, device=self.device, joined=len(self.banks) == 1)
        return [Term(query.float() / stage.n, StageOperands(bank, last, read))]


def _features(
    bank: Bank, stage: int, device: torch.device | str | None, joined: bool, shards: range | None = None
) -> Iterator[Operand]:
    """Rows φ as they are banked, with the weights Q; if joined, these and a row's scale are one factor."""
    start, target = stage_start(bank, stage), device or "cpu"
    for block in bank.stages[stage].iter_encoded(bank.stages[stage].n_checkpoints - 1, shards):
        scale: Tensor | None = block.scale
        weights: Tensor | None = -block.d1
        if joined:
            scale, weights = -block.d1 if scale is None else -block.d1 * scale, None
        yield Operand(
            start + block.start,
            start + block.stop,
            block.rows.to(target),
            None if scale is None else scale.to(target),
            None if weights is None else weights.to(target),
            block.codec,
        )
