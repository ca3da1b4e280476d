"""A query's sketches on their way back through training, from one segment's metric into another's."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

__all__ = ["QueryPropagator"]


class QueryPropagator:
    """The linear map from a query's sketches at the end of training to its sketches before the segments passed so far.

    There is one sketch a metric, û^(m) = R P_m^½ v, and the map is a ``(k, k)`` float64 matrix for each metric before
    and each metric at the end. It begins as the identity. With one metric it is the product S_{l+1} ··· S_L.

    Args:
        metrics: the metrics of all segments.

    Example:
        >>> query = QueryPropagator([0])
        >>> query.step(0, 1.0, torch.eye(2) / 2, {})
        >>> query.times(torch.eye(2), 0)
        {0: tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])}
    """

    def __init__(self, metrics: Collection[int]) -> None:
        # None is the identity, which costs no product; an absent entry is 0.
        self._maps: dict[tuple[int, int], Tensor | None] = {(m, m): None for m in sorted(metrics)}

    def times(self, left: Tensor, metric: int) -> dict[int, Tensor]:
        """Return ``left`` times the maps into a metric, by the metric at the end."""
        return {
            origin: left if carried is None else left @ carried
            for (at, origin), carried in self._maps.items()
            if at == metric
        }

    def step(self, own: int, decay: float, kept: Tensor | None, crossed: Mapping[int, Tensor]) -> None:
        """Go back through a segment; only the metrics named stay.

        Args:
            own: the segment's metric.
            decay: exp(-s λ).
            kept: exp(-s (Ĥ + λ)), if the segment's metric is an earlier one's too.
            crossed: exp(-s λ) C h(Ĥ) for every other metric of earlier segments.
        """
        maps: dict[tuple[int, int], Tensor | None] = {}
        if kept is not None:
            maps |= {(own, origin): found for origin, found in self.times(kept, own).items()}
        for metric, cross in crossed.items():
            into = {origin: found.clone() for origin, found in self.times(cross, own).items()}
            for (at, origin), carried in self._maps.items():
                if at != metric:
                    continue
                into.setdefault(origin, torch.zeros_like(cross))
                if carried is None:
                    into[origin].diagonal().add_(decay)
                else:
                    into[origin].add_(carried, alpha=decay)
            maps |= {(metric, origin): found for origin, found in into.items()}
        self._maps = maps
