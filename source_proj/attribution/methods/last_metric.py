"""The metric of methods that know the end of training alone."""

from source_proj._errors import MismatchError
from source_proj.bank import Bank

__all__ = ["last_metric"]


def last_metric(bank: Bank) -> int:
    """Index of the last checkpoint's metric, in which queries and rows are compared.

    Raises:
        MismatchError: the last stage moved none of the bank's parameters, so that all would be zero in its metric.
    """
    stage = bank.stages[-1]
    metric = stage.metric(-1)
    if not bank.metrics.moves(metric):
        raise MismatchError(
            f"the last stage, {stage.name!r}, moved none of the parameters that the bank {bank.path} attributes "
            "through, and this method knows the end of training alone: ask Source, or build a bank of what the stage "
            "trained"
        )
    return metric
