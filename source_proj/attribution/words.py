"""Scores in words: signs, units and ids, the same in terminals, notebooks and pages."""

import math
from typing import Any

import numpy as np
from torch import Tensor

__all__ = [
    "TOWARDS",
    "explained",
    "id_of",
    "id_word",
    "mean_effect",
    "measured",
    "plain_id",
    "plain_ids",
    "plain_number",
    "sign_of",
    "signed",
    "toward",
]

TOWARDS = {True: "helpful", False: "harmful"}

_UNITS = {
    "logit margin": "log-odds of the class asked about, log p/(1-p): 0 is probability 50 %, +2 is 88 %, -2 is 12 %",
    "absolute error": "distance between prediction and target",
    "squared error": "squared distance between prediction and target",
    "mean token log-likelihood (nats)": "mean log-probability of the sequence's tokens: 0 is certainty, -0.7 is "
    "probability one half a token",
    "sequence log-likelihood (nats)": "log-probability of the whole sequence: 0 is certainty",
    "prediction": "the number that the model gives; helpful examples raised it",
    "cosine": "how alike two examples look to the model, from -1 to 1; no change of its answer",
}


def explained(unit: str) -> str:
    """A unit in words.

    Example:
        >>> explained("squared error")
        'scores in units of the squared error (squared distance between prediction and target)'
        >>> explained("sequence log-likelihood (nats)")
        'scores in units of the sequence log-likelihood (nats; log-probability of the whole sequence: 0 is certainty)'
    """
    if unit not in _UNITS:
        return f"scores in units of the {unit}"
    begun = f"{unit[:-1]}; " if unit.endswith(")") else f"{unit} ("  # one pair of brackets
    return f"scores in units of the {begun}{_UNITS[unit]})"


def sign_of(unit: str, *, additive: bool) -> str:
    """What the sign of scores says.

    Args:
        unit: of the scores.
        additive: whether they are changes of the measurement, and no similarities.
    """
    if additive:
        return "positive: including the example raised the measurement"
    return f"similarity ({unit}), no change of the measurement"


def toward(score: float, higher_is_better: bool) -> str:
    """What an example with this score was to the query.

    Example:
        >>> toward(0.5, True), toward(0.5, False), toward(0.0, True)
        ('helpful', 'harmful', 'neither')
    """
    return TOWARDS[(score > 0) == higher_is_better] if score else "neither"


def signed(value: float, minus: str = "-") -> str:
    """Format a number with its sign and three significant digits.

    Example:
        >>> signed(0.12345), signed(-2.0), signed(0.0), signed(12345.6), signed(-3.2e-7)
        ('+0.123', '-2.00', '0', '+12346', '-3.20e-7')
    """
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if 1e-3 <= size < 1e5:
        text = f"{size:.{max(0, 2 - math.floor(math.log10(size)))}f}"
    else:
        mantissa, exponent = f"{size:.2e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    return (minus if value < 0 else "+") + text


def measured(value: float, unit: str) -> str:
    """A measurement in words.

    Example:
        >>> measured(-1.5, "logit margin"), measured(-0.25, "sequence log-likelihood (nats)")
        ('logit margin -1.50', 'sequence log-likelihood -0.250 nats')
        >>> measured(0.5, "accuracy (0 to 1)")
        'accuracy (0 to 1) 0.500'
    """
    number = signed(value).removeprefix("+")
    name, _, rest = unit.removesuffix(")").rpartition(" (")
    return f"{name} {number} {rest}" if rest.isalpha() and unit.endswith(f"({rest})") else f"{unit} {number}".lstrip()


def mean_effect(unit: str, queries: int, size: str, *, additive: bool, groups: int = 1) -> str:
    """What an example did to some queries on average.

    Args:
        unit: of the scores.
        queries: how many they are.
        size: the mean, as text.
        additive: whether scores are changes of the measurement, and no similarities.
        groups: how many groups they are in, whose means are counted alike.

    Example:
        >>> mean_effect("logit margin", 90, "+0.5", additive=True, groups=2)
        'including it changed the mean logit margin of 90 queries, their 2 groups counted alike, by +0.5'
        >>> mean_effect("logit margin", 3, "+0.5", additive=True), mean_effect("cosine", 3, "+0.5", additive=False)
        ('including it changed the mean logit margin of 3 queries by +0.5', 'its mean cosine with 3 queries is +0.5')
    """
    unit = unit.removeprefix("mean ")
    alike = f", their {groups} groups counted alike," if groups > 1 else ""
    if additive:
        return f"including it changed the mean {unit} of {queries} queries{alike} by {size}"
    return f"its mean {unit} with {queries} queries{alike} is {size}"


def plain_id(given: Any) -> Any:
    """An id as JSON can hold it, from which :func:`id_of` makes it again.

    Raises:
        TypeError: it is no number, string, or tuple of such.

    Example:
        >>> plain_id(("fine", np.int64(2))), id_of(["fine", 2])
        (['fine', 2], ('fine', 2))
    """
    given = plain_number(given)
    if isinstance(given, tuple):
        return [plain_id(part) for part in given]
    if given is None or isinstance(given, str | int | float):
        return given
    raise TypeError(
        f"an id in a file is a number, a string, or a tuple of such, got {given!r} of type {type(given).__name__}: "
        "give ids of those kinds, ids="
    )


def plain_ids(ids: Any) -> list[Any]:
    """Ids as JSON can hold them; raises as :func:`plain_id`."""
    return [plain_id(given) for given in ids]


def id_of(plain: Any) -> Any:
    """The id that :func:`plain_id` made this of; a tensor's number, which equals itself alone, is Python's own."""
    if isinstance(plain, list):
        return tuple(map(id_of, plain))
    return plain_number(plain) if isinstance(plain, Tensor) else plain


def id_word(given: Any) -> Any:
    """An id in one word: (stage, id) becomes stage/id."""
    if isinstance(given, tuple):
        return "/".join(map(str, given))
    return plain_number(given)


def plain_number(given: Any) -> Any:
    """A number of NumPy or torch as Python's own; all else as it is."""
    is_number = isinstance(given, np.generic) or (isinstance(given, np.ndarray | Tensor) and given.ndim == 0)
    return given.item() if is_number else given
