"""The errors that source-proj raises on purpose; each message names the value received and the remedy."""

__all__ = ["BankError", "GradientError", "MismatchError", "SourceProjError"]


class SourceProjError(Exception):
    """Base class: catch it to catch everything that this package raises on purpose, bad arguments excepted."""


class MismatchError(SourceProjError, ValueError):
    """Two things that must agree do not, such as a checkpoint and a model, or a bank and a sketch."""


class BankError(SourceProjError, RuntimeError):
    """A bank is missing, unfinished, corrupt, or of a foreign format."""


class GradientError(SourceProjError, RuntimeError):
    """A gradient is not finite, or a module's per-example gradients cannot be computed."""
