"""Scores that know how far they can be trusted."""

import warnings
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from source_proj.attribution.attributor import Queries
from source_proj.attribution.operands import Picked, StageOperands, mean_gradients, stage_start
from source_proj.attribution.scores import Scores
from source_proj.attribution.source.fidelity import Fidelity, estimated_fidelity
from source_proj.attribution.source.fitted_segments import FittedSegments
from source_proj.attribution.source.reranking import Reranking
from source_proj.sketch import plain_modes

__all__ = ["Diagnosing"]

_OWN = 64  # training examples that stand for queries, at most; and an eighth of all


class Diagnosing(Reranking):
    """What :class:`Source` says of its own scores."""

    def score(self, queries: Queries, out: str | Path | None = None, *, overwrite: bool = False) -> Scores:  # noqa: D102
        if out is not None:
            return super().score(queries, out, overwrite=overwrite)
        features = self.sketch(queries)
        scores = super().score(features)
        scores.attach_fidelity(partial(self.fidelity, features))
        return scores

    @plain_modes()
    def fidelity(self, queries: Queries | None = None) -> Fidelity:
        """Estimate how far the sketch's scores of some queries can be trusted: see :class:`Fidelity`.

        Warns where k is too small, with the k that would do.

        Args:
            queries: as for :meth:`score`; None for some training examples' own losses, which need no model.

        Raises:
            BankError: the bank holds too few training examples to correlate over.
        """
        self._compare_banks()
        runs, apart = [self._of(bank) for bank in self.banks], None
        if queries is None:
            first, n = stage_start(self.banks[0], len(self.banks[0].stages) - 1), self.n_rows
            count = max(1, min(_OWN, (n - first) // 8))
            apart = torch.linspace(first, n - 1, count + 1, dtype=torch.float64, device="cpu")[:-1].long().unique()
            sketches = [_own_losses(run, apart) for run in runs]
            ids = [self.banks[0].ids[row] for row in apart.tolist()]
        else:
            features = self.sketch(queries)
            sketches = [
                {segment.metric: self._query(run.bank, queried, segment.metric) for segment in run.segments}
                for run, queried in zip(runs, features, strict=True)
            ]
            ids = features.ids
        fidelity = estimated_fidelity(runs, sketches, ids, apart)
        if fidelity.warning is not None:
            warnings.warn(fidelity.warning, stacklevel=3)  # of whoever called the decorated method
        return fidelity


def _own_losses(fitted: FittedSegments, rows: Tensor) -> dict[int, Tensor]:
    """By metric, the loss gradients ``(Q, k)`` of some examples of the last stage at its last checkpoint."""
    index = len(fitted.bank.stages) - 1
    last = fitted.bank.stages[index].n_checkpoints - 1
    sketches = {}
    for metric in {segment.metric for segment in fitted.segments}:
        read = partial(mean_gradients, checkpoints=[last], device=None, metric=metric)
        chosen = Picked(StageOperands(fitted.bank, index, read), rows).between(0, len(rows))
        sketches[metric] = torch.cat([part.rows for part in chosen])
    return sketches
