"""GradDot: inner product of gradients at the final checkpoint."""

from functools import partial

from source_proj.attribution.attributor import Attributor, Term
from source_proj.attribution.features import QueryFeatures
from source_proj.attribution.operands import StageOperands, encoded_gradients
from source_proj.bank import Bank

__all__ = ["GradDot"]


class GradDot(Attributor):
    """Inner product of gradients (Charpiat et al., "Input Similarity from the Neural Network Perspective", 2019).

        score(q, z) = -(1/N) ∇m(q)ᵀ g(z)

    at the last banked checkpoint of z's stage: the change of the measurement that one full-batch step of unit learning
    rate makes through z; ∇mᵀ P g in a bank of preconditioned gradients.
    """

    def _terms(self, bank: Bank, features: QueryFeatures) -> list[Term]:
        terms = []
        for index, stage in enumerate(bank.stages):
            last = stage.n_checkpoints - 1
            query = features.at(bank.final_checkpoint(), bank.metrics.hash(stage.metric(last))).to(self.device or "cpu")
            rows = StageOperands(bank, index, partial(encoded_gradients, checkpoints=[last], device=self.device))
            terms.append(Term(query * (-1 / stage.n), rows))
        return terms
