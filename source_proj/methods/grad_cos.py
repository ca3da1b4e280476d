"""GradCos: cosine of gradients at the final checkpoint."""

from collections.abc import Iterator

import torch

from source_proj.attributor import Attributor, Term
from source_proj.bank import Bank
from source_proj.operands import Operand, loss_gradients
from source_proj.queries import QueryFeatures

__all__ = ["GradCos"]


class GradCos(Attributor):
    """Cosine of gradients (Charpiat et al., "Input Similarity from the Neural Network Perspective", 2019).

        score(q, z) = -cos(∇m(q), g(z))

    at the last banked checkpoint of z's stage. A similarity in [-1, 1]: it ranks examples, but is no change of the
    measurement, and so is not summed over subsets.
    """

    additive = False

    @property
    def unit(self) -> str:
        """Unit of the scores."""
        return "cosine"

    def _terms(self, bank: Bank, features: QueryFeatures) -> list[Term]:
        query = torch.nn.functional.normalize(features.at(bank.final_checkpoint()).to(self.device or "cpu"))
        return [Term(-query, self._rows(bank, index)) for index in range(len(bank.stages))]

    def _rows(self, bank: Bank, stage: int) -> Iterator[Operand]:
        for operand in loss_gradients(bank, stage, bank.stages[stage].n_checkpoints - 1, self.device):
            yield operand._replace(rows=torch.nn.functional.normalize(operand.rows))
