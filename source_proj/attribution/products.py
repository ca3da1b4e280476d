"""Scores as sums of products, block by block: of any span of rows, here or in the process they were sent to.

Each method's scores are a sum of terms, each the product of a query operand ``(Q, k)`` and a training operand
``(N, k)``. Where blocks begin and end depends on the shards and the number of queries alone, so that a span's scores
are the same bits whoever computes it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from source_proj._io.executors import Executor
from source_proj.attribution.operands import Operand, Operands, aligned
from source_proj.attribution.shards import Span, map_spans, row_spans
from source_proj.bank import Bank
from source_proj.kernels.scoring import Strongest
from source_proj.kernels.scoring_torch import StrongestTorch

__all__ = ["Products", "Term", "scored_blocks", "strongest_rows"]

_BLOCK_SCORES = 8 << 20
"""Scores held at once while streaming (32 MiB of float32)."""

_MIN_ROWS = 256
_RESULT_BYTES = 128 << 20  # of the scores that a worker returns at once


class Term(NamedTuple):
    """One product of the sum: ``query`` ``(Q, k)`` times the training operands."""

    query: Tensor
    train: Operands


@dataclass(frozen=True)
class Products:
    """The scores of some queries.

    Attributes:
        terms: of all banks' scores.
        count: Q, the number of queries.
        runs: the number of banks that scores are averaged over.
    """

    terms: Sequence[Term]
    count: int
    runs: int

    @property
    def device(self) -> str:
        """Where products are computed, by a name that other machines have too."""
        return str(self.terms[0].query.device)

    def blocks(self, span: Span) -> Iterator[tuple[int, int, Tensor]]:
        """Yield ``(start, stop, scores (Q, stop - start))`` of a span of rows, in order."""
        for start, stop, active in self._aligned(span):
            yield start, stop, self._block(active).cpu()

    def strongest(self, span: Span, k: int, *, highest: bool) -> tuple[Tensor, Tensor]:
        """Scores and rows of the k strongest of a span, or of all it has, ``(Q, m)`` float32 and int64."""
        device = self.terms[0].query.device
        best, done = Strongest(self.count, k, largest=highest, device=device), span[0]

        def pass_over(stop: int) -> None:
            """Rows that no term covers score 0; of equal scores only the first k can be among the strongest."""
            if stop > done:
                zeros = torch.zeros(self.count, min(k, stop - done), device=device, dtype=torch.float32)
                best.add_scores(zeros, first=done)

        for start, stop, active in self._aligned(span):
            pass_over(start)
            index, operand = active[0]
            if self.runs == len(active) == 1 and operand.weights is None:
                operand.codec.search(best, self.terms[index].query, operand.rows, operand.scale, first=start)
            else:
                best.add_scores(self._block(active), first=start)
            done = stop
        pass_over(span[1])
        return best.result()

    def at(self, device: torch.device | str) -> "Products":
        """The same with queries on a device."""
        return replace(self, terms=[term._replace(query=term.query.to(device)) for term in self.terms])

    def _aligned(self, span: Span) -> Iterator[tuple[int, int, list[tuple[int, Operand]]]]:
        height = max(_MIN_ROWS, _BLOCK_SCORES // max(1, self.count))
        return aligned([term.train.between(*span) for term in self.terms], height)

    def _block(self, active: list[tuple[int, Operand]]) -> Tensor:
        """Scores ``(Q, n)`` of rows that some terms' operands share: the sum of products, averaged over the banks.

        Where operands have weights, those are averaged over the banks by themselves. Where there is one bank, one term
        and no weights this is the product itself: the search for the strongest then takes it without making it.
        """
        total, *products = (its.codec.multiply(self.terms[index].query, its.rows, its.scale) for index, its in active)
        for product in products:
            total += product
        if self.runs > 1:
            total.div_(self.runs)
        weights = [operand.weights for _, operand in active if operand.weights is not None]
        return total.mul_(torch.stack(weights).mean(0)) if weights else total


def scored_blocks(products: Products, bank: Bank, executor: Executor | None) -> Iterator[tuple[int, int, Tensor]]:
    """Yield ``(start, stop, scores (Q, stop - start))`` of all rows, in order.

    Args:
        products: the scores.
        bank: whose rows, of one of the runs.
        executor: computes them, in spans of the bank's shards; None for this process.
    """
    if executor is None:
        yield from products.blocks((0, bank.n_rows))
        return
    row_bytes = torch.float32.itemsize * products.count
    spans = row_spans(bank, row_bytes=row_bytes, limit=_RESULT_BYTES)
    function = partial(_blocks, products.at("cpu"), products.device)
    for blocks in map_spans(executor, function, spans, row_bytes=row_bytes):
        yield from blocks


def _blocks(products: Products, device: str, span: Span) -> list[tuple[int, int, Tensor]]:
    return list(products.at(device).blocks(span))


def strongest_rows(
    products: Products, bank: Bank, k: int, executor: Executor | None, *, highest: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The k strongest scores of each query, and their rows, ``(Q, k)`` float32 and int64; see :func:`scored_blocks`.

    Of equal scores the lower row is the stronger, so that those of all spans together are the same as those of one.
    """
    if executor is None:
        values, rows = products.strongest((0, bank.n_rows), k, highest=highest)
    else:
        best, sign = StrongestTorch(products.count, k, highest, torch.device("cpu")), 1 if highest else -1
        function = partial(_strongest, products.at("cpu"), products.device, k, highest)
        for candidates, places in map_spans(executor, function, row_spans(bank)):
            best.merge(candidates * sign, places)
        values, rows = best.result()
    return values.cpu().numpy(), rows.cpu().numpy().astype(np.int64)


def _strongest(products: Products, device: str, k: int, highest: bool, span: Span) -> tuple[Tensor, Tensor]:
    return products.at(device).strongest(span, k, highest=highest)
