"""Where a query is differentiated: at the final weights, or at all checkpoints of the last stage."""

from typing import Literal, get_args

from source_proj.bank import Bank
from source_proj.trajectory import Checkpoint

__all__ = ["QueryGradient", "check_query_gradient", "query_points", "takes_mean"]

QueryGradient = Literal["mean", "final"]


def takes_mean(bank: Bank, query_gradient: QueryGradient | None) -> bool:
    """Return whether a query's gradient is a mean over checkpoints."""
    return not bank.sketch.is_exact if query_gradient is None else query_gradient == "mean"


def query_points(bank: Bank, query_gradient: QueryGradient | None) -> list[Checkpoint]:
    """Return where a query is differentiated: by default at all checkpoints of the last stage, unless R is exact."""
    if not takes_mean(bank, query_gradient):
        return [bank.final_checkpoint()]
    return bank.query_points()


def check_query_gradient(query_gradient: QueryGradient | None) -> None:
    """Refuse what is no way to take a query's gradient.

    Raises:
        ValueError: unless it is ``"mean"``, ``"final"`` or None.
    """
    if query_gradient not in (None, *get_args(QueryGradient)):
        raise ValueError(f"query_gradient must be 'mean', 'final' or None, got {query_gradient!r}")
