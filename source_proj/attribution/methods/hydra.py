"""Hydra: training gradients along the trajectory against the query's gradient at the end."""

from collections.abc import Iterator, Mapping
from functools import partial

import torch

from source_proj.attribution.attributor import Attributor, Term
from source_proj.attribution.features import QueryFeatures
from source_proj.attribution.operands import Operand, StageOperands, loss_gradients
from source_proj.attribution.spectral import decay_operator, response
from source_proj.bank import Bank

__all__ = ["Hydra"]


class Hydra(Attributor):
    """HyDRA without its Hessian term (Chen et al., "HyDRA: Hypergradient Data Relevance Analysis", arXiv 2102.02515).

        score(q, z) = -(1/N) Σ_c w_c ∇m(q)ᵀ g_c(z),    w_c = e^{-λ t_c} (1 - e^{-λ s_c}) / λ    (s_c where λ = 0)

    with ∇m(q) at the final weights, s_c the learning rate integrated from the checkpoint before c to c (momentum
    included), t_c that from c to the end of training, through all later stages, and λ weight decay. The fast version
    of HyDRA (https://arxiv.org/abs/2102.02515) unrolls the optimizer's steps with the Hessian taken as zero; weight
    decay, which needs no Hessian, stays and shrinks what came before. It is :class:`~source_proj.Source` with Ĥ = 0
    and a segment for each checkpoint, in its metric where the optimizer was preconditioned.
    A query costs one backward pass; TracIn differentiates it at every checkpoint.

    Example:
        Least squares with one weight, at 0 after 10 steps of 0.1: s = 1, g = (-2, 0), and ∇m = -2 for the first
        example's own squared error, so that its score is -(1/2)(-2)(-2).

        >>> import tempfile
        >>> import source_proj as sp
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> train = torch.utils.data.TensorDataset(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [0.0]]))
        >>> run = sp.Trajectory([sp.Checkpoint(model.state_dict(), step=10, lr=0.1)])
        >>> exact = {"sketch": sp.Sketch(1, "identity"), "storage": "float32"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bank = sp.build(model, sp.Regression("squared"), run, train, f"{folder}/bank", **exact)
        ...     float(sp.Hydra(bank, model=model).score(train)[0, 0])
        -2.0
    """

    takes_captured = True

    def _terms(self, bank: Bank, features: QueryFeatures) -> list[Term]:
        final = bank.final_checkpoint()
        flat = torch.zeros(1, dtype=torch.float64, device="cpu")  # the Hessian's eigenvalues
        terms, left = [], 1.0  # left: what weight decay leaves of a change until the end of training
        for index in reversed(range(len(bank.stages))):
            stage = bank.stages[index]
            intervals = stage.record.cut(stage.n_checkpoints)
            weights: dict[int, dict[int, float]] = {}  # by metric, of each checkpoint
            for checkpoint in reversed(range(stage.n_checkpoints)):
                time, decay = intervals[checkpoint].time, intervals[checkpoint].decay
                own = weights.setdefault(stage.metric(checkpoint), {})
                own[checkpoint] = left * float(response(time, decay, 0.0)(flat))
                left *= float(decay_operator(time, decay)(flat))
            for metric, own in weights.items():
                query = features.at(final, bank.metrics.hash(metric)).to(self.device or "cpu")
                read = partial(_weighted_sums, weights=dict(sorted(own.items())), device=self.device)
                rows = StageOperands(bank, index, read)
                terms.append(Term(query * (-1 / stage.n), rows))
        return terms


def _weighted_sums(
    bank: Bank,
    stage: int,
    weights: Mapping[int, float],
    device: torch.device | str | None,
    shards: range | None = None,
) -> Iterator[Operand]:
    """Σ_c w_c g_c over the stage's checkpoints of one metric, so that queries meet one product and not C."""
    streams = [loss_gradients(bank, stage, checkpoint, device, shards=shards) for checkpoint in weights]
    first, *later = weights.values()
    for blocks in zip(*streams, strict=True):
        total = blocks[0].rows.mul_(first)
        for block, weight in zip(blocks[1:], later, strict=True):
            total.add_(block.rows, alpha=weight)
        yield blocks[0]._replace(rows=total)
