"""What a report page shows, as plain values: the template only lays them out."""

import math
from dataclasses import dataclass
from typing import Any

__all__ = ["Attribution", "Check", "Example", "MethodLists", "Page", "QuerySection", "signed"]


def signed(value: float) -> str:
    """Format a number with its sign, three significant digits and a true minus.

    Example:
        >>> signed(0.12345), signed(-2.0), signed(0.0), signed(12345.6), signed(-3.2e-7)
        ('+0.123', '−2.00', '0', '+12346', '−3.20e-7')
    """
    if value == 0:
        return "0"
    size = abs(value)
    if 1e-3 <= size < 1e5:
        text = f"{size:.{max(0, 2 - math.floor(math.log10(size)))}f}"
    else:
        mantissa, exponent = f"{size:.2e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    return ("−" if value < 0 else "+") + text


@dataclass(frozen=True)
class Example:
    """One example as a reader sees it.

    Attributes:
        id: its id in the training set or among the queries.
        label: its label, as words.
        image: a ``data:`` address of its picture, or None.
        text: its text, shown where there is no picture.
        prediction: what the model says of it, as words, or None.
    """

    id: Any
    label: str
    image: str | None = None
    text: str | None = None
    prediction: str | None = None

    @property
    def description(self) -> str:
        """What a screen reader says of the picture."""
        words = f"example {self.id}, label {self.label}"
        return words if self.prediction is None else f"{words}, predicted {self.prediction}"


@dataclass(frozen=True)
class Attribution:
    """A training example beside its score for one query.

    Attributes:
        example: the training example.
        score: change of the query's measurement that including the example made.
        parts: the score's parts, one per segment of training, in order; they sum to the score.
    """

    example: Example
    score: float
    parts: tuple[float, ...] = ()

    @property
    def shares(self) -> tuple[float, ...]:
        """Size of each part relative to the sizes of all parts together, in [0, 1]."""
        total = sum(abs(part) for part in self.parts)
        return tuple(abs(part) / total if total else 0.0 for part in self.parts)


@dataclass(frozen=True)
class MethodLists:
    """What one method says of a query.

    Attributes:
        method: its name.
        helpful: the most helpful training examples, strongest first.
        harmful: the most harmful ones, strongest first.
        unit: unit of this method's scores.
    """

    method: str
    helpful: tuple[Attribution, ...]
    harmful: tuple[Attribution, ...]
    unit: str


@dataclass(frozen=True)
class QuerySection:
    """A query with the training examples that helped and harmed it most.

    Attributes:
        example: the query.
        helpful: the most helpful training examples, strongest first.
        harmful: the most harmful ones, strongest first.
        measurement: the query's measurement, or None.
        note: a sentence on why this query is shown.
        method: name of the method whose lists these are; shown where it is not empty.
        others: what other methods say of the same query.
    """

    example: Example
    helpful: tuple[Attribution, ...]
    harmful: tuple[Attribution, ...]
    measurement: float | None = None
    note: str = ""
    method: str = ""
    others: tuple[MethodLists, ...] = ()


@dataclass(frozen=True)
class Check:
    """A claim held against retraining: examples are left out, and the change is compared with the prediction.

    Attributes:
        name: what was left out.
        predicted: predicted change of the measurement.
        actual: mean change over the retrainings.
        error: standard error of that mean.
        runs: number of retrained pairs.
        verdict: what the comparison says, in words.
    """

    name: str
    predicted: float
    actual: float
    error: float
    runs: int
    verdict: str


@dataclass(frozen=True)
class Page:
    """A whole report.

    Attributes:
        title: heading.
        unit: unit of the scores, such as "logit margin".
        sections: the queries.
        summary: one sentence below the heading.
        segments: a name for each segment of training, such as "steps 1 to 100".
        facts: pairs (name, value) about the run, shown at the end.
        checks: claims held against retraining.
        check_title: which query the checks are about.
        higher_is_better: whether a rise of the measurement is an improvement.
    """

    title: str
    unit: str
    sections: tuple[QuerySection, ...]
    summary: str = ""
    segments: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    checks: tuple[Check, ...] = ()
    check_title: str = ""
    higher_is_better: bool = True
