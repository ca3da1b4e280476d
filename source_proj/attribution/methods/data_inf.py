"""DataInf: influence functions whose inverse is a mean of inverses, one an example, each in closed form."""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from source_proj._io.executors import Executor
from source_proj._io.progress import Progress
from source_proj.attribution.arguments import checked_number
from source_proj.attribution.attributor import Attributor, Term
from source_proj.attribution.curvature import Curvature, count_factors, iter_factors, require_curvature
from source_proj.attribution.features import QueryFeatures
from source_proj.attribution.methods.last_metric import last_metric
from source_proj.attribution.moments import add_up
from source_proj.attribution.operands import StageOperands, encoded_gradients
from source_proj.attribution.shards import ShardGroup, map_shards, shard_groups
from source_proj.bank import Bank, StageBank
from source_proj.task import Task

__all__ = ["DataInf"]

_ROWS = 1024  # rows whose products with all queries are held at once


class DataInf(Attributor):
    """DataInf (Kwon et al., "DataInf: Efficiently Estimating Data Influence in LoRA-tuned LLMs", arXiv 2310.00902).

        score(q, z) = -(1/N) ∇m(q)ᵀ [ (1/N) Σ_i (a_i a_iᵀ + μ)⁻¹ ] g(z),     μ = λ + .1 tr(Ĥ)/k

    with the factors a_i of Ĥ = (1/N) Σ_i a_i a_iᵀ, by default the empirical Fisher's, and the training run's weight
    decay λ. It is the influence function with mean and inverse exchanged; each inverse is known in closed form (Sherman
    and Morrison),

        (a aᵀ + μ)⁻¹ v = (v - a (a·v) / (μ + |a|²)) / μ,

    so that nothing of k x k is made: two passes over the banked rows, and 4 N k operations a query. The paper's damping
    is .1 times the mean squared norm of the gradients per dimension, which here is .1 tr(Ĥ)/k. The paper does this for
    each layer by itself; a row of a sketched bank adds up all layers and can't be taken apart, so that there is one
    block and one μ for all parameters. All is taken at the last checkpoint, in its metric where there is one; only the
    last stage is attributed to, and examples of earlier stages get 0.

    Args:
        bank: a finalized bank, or a list of banks (scores are averaged).
        model: see :class:`~source_proj.attribution.attributor.Attributor`.
        task: likewise.
        curvature: which factors a_i, as for :class:`~source_proj.Source`; default: the
            empirical Fisher's, as in the paper.
        damping_factor: what tr(Ĥ)/k is times in μ; a number > 0.
        batch_size: queries per backward pass.
        device: where products are computed and queries run.
        executor: computes what reads the whole bank; see :class:`~source_proj.attribution.attributor.Attributor`.
        progress: show progress bars for what takes over two seconds; False for none, or a function of (description,
            done, total).

    Raises:
        ValueError: for a damping factor that is not a number > 0, or a curvature that the bank's rows do not offer.

    Example:
        One weight at 0 and one example, x = 1 with y = 1: g = -2, Ĥ = 4 and μ = .4, and for the example's own squared
        error ∇m = -2, so that its score is -(-2)(-2)/4.4.

        >>> import tempfile
        >>> import source_proj as sp
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> train = torch.utils.data.TensorDataset(torch.tensor([[1.0]]), torch.tensor([[1.0]]))
        >>> run = sp.Trajectory([sp.Checkpoint(model.state_dict(), step=10, lr=0.1)])
        >>> exact = {"sketch": sp.Sketch(1, "identity"), "storage": "float32"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bank = sp.build(model, sp.Regression("squared"), run, train, f"{folder}/bank", **exact)
        ...     round(float(sp.DataInf(bank, model=model).score(train)[0, 0]), 4)
        -0.9091
    """

    def __init__(
        self,
        bank: Bank | Sequence[Bank],
        *,
        model: nn.Module | None = None,
        task: Task | None = None,
        curvature: Curvature = "empirical_fisher",
        damping_factor: float = 0.1,
        batch_size: int = 64,
        device: torch.device | str | None = None,
        executor: Executor | None = None,
        progress: Progress = True,
    ) -> None:
        super().__init__(
            bank, model=model, task=task, batch_size=batch_size, device=device, executor=executor, progress=progress
        )
        require_curvature(self.banks, curvature)
        self.curvature: Curvature = curvature
        self.damping_factor = checked_number("damping_factor", damping_factor, above=0)

    def _query_metrics(self, bank: Bank) -> list[int]:
        return [last_metric(bank)]

    def _terms(self, bank: Bank, features: QueryFeatures) -> list[Term]:
        last, stage = len(bank.stages) - 1, bank.stages[-1]
        checkpoints = [stage.n_checkpoints - 1]
        decay = stage.record.cut(stage.n_checkpoints)[-1].decay
        given = features.at(bank.final_checkpoint(), bank.metrics.hash(stage.metric(-1)))
        query = self._solved(given.to(self.device or "cpu").double(), stage, bank.sketch.dim, decay)
        rows = StageOperands(bank, last, partial(encoded_gradients, checkpoints=checkpoints, device=self.device))
        return [Term(query.float() * (-1 / stage.n), rows)]

    def _solved(self, query: Tensor, stage: StageBank, dim: int, decay: float) -> Tensor:
        """Queries ``(Q, k)`` float64 times the mean of inverses, in two passes over the factors."""
        checkpoints, device = [stage.n_checkpoints - 1], self.device or "cpu"
        count, groups = count_factors(stage, checkpoints, self.curvature), shard_groups(stage, checkpoints)
        squares = partial(_squares, stage, self.curvature, device)
        trace = sum(map_shards(self.executor, squares, stage, groups)) / count
        ridge = self.damping_factor * trace / dim + decay
        if ridge == 0:  # all gradients are 0, and so is every score
            return torch.zeros_like(query)
        shares = partial(_shares, stage, self.curvature, device, query.cpu(), ridge)
        parts = map_shards(self.executor, shares, stage, groups, nbytes=query.nbytes)
        (total,) = add_up([part] for part in parts)
        return (query - total.to(query.device) / count) / ridge


def _squares(stage: StageBank, curvature: Curvature, device: torch.device | str, shards: ShardGroup) -> float:
    """Σ_i |a_i|² of some shards."""
    return sum(float(rows.double().square().sum()) for rows in iter_factors(stage, shards, curvature, device))


def _shares(
    stage: StageBank, curvature: Curvature, device: torch.device | str, query: Tensor, ridge: float, shards: ShardGroup
) -> Tensor:
    return shares_along(query.to(device), iter_factors(stage, shards, curvature, device), ridge)


def shares_along(query: Tensor, factors: Iterable[Tensor], ridge: float) -> Tensor:
    """Σ_i a_i (a_i·q) / (μ + |a_i|²) of each query q: the sum over i of (a_i a_iᵀ + μ)⁻¹ q is (n q - this) / μ.

    In float64: along a gradient that all examples share, only μ/(μ + |a|²) is left of a query.

    Args:
        query: ``(Q, k)`` float64.
        factors: the a_i as rows, in blocks ``(n, k)``.
        ridge: μ > 0.

    Returns:
        ``(Q, k)`` float64.
    """
    shares = torch.zeros_like(query)
    for block in factors:
        for rows in block.double().split(_ROWS):
            weights = 1 / (ridge + rows.square().sum(1))
            shares += ((query @ rows.T) * weights) @ rows  # (Q, n) (n, k)
    return shares
