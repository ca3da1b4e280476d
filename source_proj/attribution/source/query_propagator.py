"""A query's sketches on their way back through training, from one segment's metric into another's.

The recursion of SOURCE stands here once. What is carried are either queries, as rows ``(Q, k)``, or the linear map that
any query would go through, as ``(k, k)`` matrices: the first costs less for fewer than k queries.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from source_proj.attribution.series import SpectralFunction
from source_proj.attribution.spectral import Hessian

__all__ = ["QueryPropagator", "SpectralOperator"]


@dataclass(frozen=True)
class SpectralOperator:
    """The operator C f(Ĥ), or f(Ĥ) alone, on sketches.

    Attributes:
        hessian: Ĥ.
        function: f.
        moment: C ``(k, k)`` float64, which leads into another metric; None for the identity.
    """

    hessian: Hessian
    function: SpectralFunction
    moment: Tensor | None = None

    def matrix(self) -> Tensor:
        """The operator itself, ``(k, k)``."""
        own = self.hessian.apply(self.function)
        return own if self.moment is None else self.moment @ own.to(self.moment)

    def of_rows(self, rows: Tensor) -> Tensor:
        """The operator applied to each of the rows ``(n, k)``, without forming f(Ĥ)."""
        own = self.hessian.multiply(rows, self.function)
        return own if self.moment is None else own.to(self.moment) @ self.moment.T


class QueryPropagator:
    """Sketches at the end of training, carried back to before the segments passed so far.

    There is one sketch per metric, û^(m) = R P_m^½ v. Made by :meth:`identity` or :meth:`of`.

    Example:
        >>> from source_proj.attribution.spectral import Spectrum
        >>> spectrum = Spectrum(torch.ones(2), torch.eye(2))
        >>> halved = SpectralOperator(spectrum, SpectralFunction(lambda eigenvalues: eigenvalues / 2, ()))
        >>> query = QueryPropagator.of({0: torch.ones(1, 2)})
        >>> query.step(0, halved, {})
        >>> query.through(halved, 0)
        {0: tensor([[0.2500, 0.2500]])}
    """

    def __init__(self, carried: Mapping[tuple[int, int], Tensor | None]) -> None:
        # By metric here and metric at the end. None is the identity, which costs no product; an absent entry is 0.
        self._carried = dict(carried)
        self._rows = all(carried is not None for carried in self._carried.values())

    @classmethod
    def identity(cls, metrics: Collection[int]) -> "QueryPropagator":
        """The map itself: ``(k, k)`` float64 from each metric at the end; with one metric it is S_{l+1} ··· S_L."""
        return cls({(metric, metric): None for metric in sorted(metrics)})

    @classmethod
    def of(cls, queries: Mapping[int, Tensor]) -> "QueryPropagator":
        """Queries by metric, each ``(Q, k)``."""
        return cls({(metric, 0): rows for metric, rows in queries.items()})

    def through(self, operator: SpectralOperator, metric: int) -> dict[int, Tensor]:
        """What an operator makes of the sketches in its metric, by the metric at the end (0 for queries)."""
        at_metric = {origin: carried for (at, origin), carried in self._carried.items() if at == metric}
        if self._rows:
            return {origin: operator.of_rows(rows) for origin, rows in at_metric.items() if rows is not None}
        matrix = operator.matrix()
        return {
            origin: matrix if carried is None else matrix.to(carried) @ carried for origin, carried in at_metric.items()
        }

    def step(
        self, own: int, kept: SpectralOperator | None, crossed: Mapping[int, tuple[float, SpectralOperator]]
    ) -> None:
        """Go back through a segment; only the metrics named stay.

        Args:
            own: the segment's metric.
            kept: exp(-s (Ĥ + λ)), if the segment's metric is also that of an earlier one.
            crossed: for every other metric of earlier segments, what its sketch decays by, exp(-s λ), and the operator
                on the own one that is added, exp(-s λ) C h(Ĥ), each with its moment C.
        """
        before: dict[tuple[int, int], Tensor | None] = {}
        if kept is not None:
            before |= {(own, origin): carried for origin, carried in self.through(kept, own).items()}
        for metric, (decay, operator) in crossed.items():
            into = self.through(operator, own)
            for (at, origin), carried in self._carried.items():
                if at == metric:
                    into[origin] = _plus(into.get(origin), carried, decay, cast(Tensor, operator.moment))
            before |= {(metric, origin): carried for origin, carried in into.items()}
        self._carried = before


def _plus(moved: Tensor | None, carried: Tensor | None, decay: float, like: Tensor) -> Tensor:
    """Moved + decay · carried, where no moved is 0 and no carried is the identity, of the shape of ``like``."""
    if moved is None:
        moved = torch.zeros_like(like if carried is None else carried)
    if carried is None:
        moved.diagonal().add_(decay)
        return moved
    return moved.add_(carried.to(moved), alpha=decay)
