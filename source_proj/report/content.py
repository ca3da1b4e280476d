"""What a report page shows, as plain values: the template only lays them out."""

from dataclasses import dataclass

from source_proj._io.html import tiles, wrapped
from source_proj.attribution.words import signed
from source_proj.bank.examples import Example

__all__ = ["Attribution", "Check", "MethodLists", "Page", "QuerySection"]


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
        additive: whether scores are changes of the measurement, and no similarities.
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
    additive: bool = True

    def _repr_html_(self) -> str:
        """The first queries with their strongest examples, for notebooks; ``write_report`` has it all."""
        parts = []
        for section in self.sections[:3]:
            asked = section.example
            contents = [(asked._repr_html_(), f"query {asked.description.removeprefix('example ')}")]
            contents += [
                (hit.example._repr_html_(), f"{name} {signed(hit.score)}: {hit.example.id}")
                for name, hits in (("helpful", section.helpful), ("harmful", section.harmful))
                for hit in hits[:3]
            ]
            parts.append(tiles(contents))
        return wrapped(f"{self.title} ({len(self.sections)} queries, {self.unit})", "".join(parts))
