"""GradCos: cosine of gradients at the final checkpoint."""

from collections.abc import Iterator
from functools import partial

import torch

from source_proj.attribution.attributor import Attributor, Term
from source_proj.attribution.features import QueryFeatures
from source_proj.attribution.operands import Operand, StageOperands, stage_start, unit_rows
from source_proj.bank import Bank

__all__ = ["GradCos"]


class GradCos(Attributor):
    """Cosine of gradients (Charpiat et al., "Input Similarity from the Neural Network Perspective", 2019).

        score(q, z) = -cos(∇m(q), g(z))

    at the last banked checkpoint of z's stage; in a bank of preconditioned gradients, the cosine in its metric P. A
    similarity in [-1, 1]: it ranks examples, but is no change of the
    measurement, and so is not summed over subsets.
    """

    additive = False

    @property
    def unit(self) -> str:
        """Unit of the scores."""
        return "cosine"

    def _terms(self, bank: Bank, features: QueryFeatures) -> list[Term]:
        terms = []
        for index, stage in enumerate(bank.stages):
            metric = bank.metrics.hash(stage.metric(stage.n_checkpoints - 1))
            query = features.at(bank.final_checkpoint(), metric).to(self.device or "cpu")
            rows = StageOperands(bank, index, partial(_directions, device=self.device))
            terms.append(Term(-unit_rows(query), rows))
        return terms


def _directions(
    bank: Bank, stage: int, device: torch.device | str | None, shards: range | None = None
) -> Iterator[Operand]:
    """The directions of φ with the sign of ℓ': of an example that was learnt well their product can be too small."""
    own, start = bank.stages[stage], stage_start(bank, stage)
    for block in own.iter_rows(own.n_checkpoints - 1, shards=shards):
        rows = unit_rows(block.rows.to(device or "cpu")).mul_(block.d1.sign().to(device or "cpu")[:, None])
        yield Operand(start + block.start, start + block.stop, rows)
