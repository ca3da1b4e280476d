"""TracIn: inner products of gradients, summed over checkpoints."""

from functools import partial

from source_proj.attribution.attributor import Attributor, Term
from source_proj.attribution.features import QueryFeatures
from source_proj.attribution.operands import StageOperands, encoded_gradients
from source_proj.bank import Bank
from source_proj.trajectory import Checkpoint

__all__ = ["TracIn"]


class TracIn(Attributor):
    """TracInCP (Pruthi et al., "Estimating Training Data Influence by Tracing Gradient Descent", arXiv 2002.08484).

        score(q, z) = -(1/N) Σ_c s_c ∇m_c(q)ᵀ g_c(z)

    with s_c the learning rate integrated from the checkpoint before c to c (momentum included), so that a score is a
    change of the measurement. Queries are differentiated at every checkpoint: C backward passes. In a bank of
    preconditioned gradients each product is ∇mᵀ P_c g, the optimizer's own step, with the metric of the checkpoint.

    Example:
        ``sp.TracIn(bank, model=model).score(queries)``
    """

    def _query_points(self, bank: Bank) -> list[Checkpoint]:
        return [bank.checkpoint(s, c) for s, stage in enumerate(bank.stages) for c in range(stage.n_checkpoints)]

    def _terms(self, bank: Bank, features: QueryFeatures) -> list[Term]:
        terms = []
        for index, stage in enumerate(bank.stages):
            for checkpoint, interval in enumerate(stage.record.cut(stage.n_checkpoints)):
                metric = bank.metrics.hash(interval.metric)
                query = features.at(bank.checkpoint(index, checkpoint), metric).to(self.device or "cpu")
                read = partial(encoded_gradients, checkpoints=[checkpoint], device=self.device)
                terms.append(Term(query * (-interval.time / stage.n), StageOperands(bank, index, read)))
        return terms
