"""Lay out a :class:`Page` as one HTML file that needs nothing beside it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from source_proj._io.outputs import write_output
from source_proj.attribution.hits import Hits
from source_proj.attribution.scores import Scores
from source_proj.attribution.source import SegmentScores
from source_proj.report.content import Attribution, Check, Example, MethodLists, Page, QuerySection, signed
from source_proj.report.images import image_uri

__all__ = ["make_page", "render", "write_report"]

ClassNames = Sequence[str] | Mapping[Any, str]


def make_page(
    title: str,
    scores: Scores,
    train_set: Any,
    queries: Any,
    *,
    parts: SegmentScores | None = None,
    predictions: Sequence[Any] | None = None,
    measurements: Sequence[float] | None = None,
    notes: Sequence[str] | None = None,
    class_names: ClassNames | None = None,
    picture: Callable[[Any], Any] | None = None,
    top: int = 5,
    method: str = "",
    others: Mapping[str, Scores] | None = None,
) -> Page:
    """Set each query beside its most helpful and most harmful training examples, with pictures, labels and scores.

    What the page says besides (summary, facts, checks) is added with :func:`dataclasses.replace`.

    Args:
        title: heading of the page.
        scores: scores of the queries; rows and columns in the order of the two data sets.
        train_set: map-style data set of ``(input, label)`` that the scores' columns stand for.
        queries: map-style data set of ``(input, label)`` that the scores' rows stand for.
        parts: the scores by segment of training, as ``Source.by_segment`` gives them.
        predictions: what the model says of each query, as class numbers or words.
        measurements: each query's measurement.
        notes: a sentence on each query.
        class_names: names of the classes; labels are shown as they are without it.
        picture: turns an input into a picture that :func:`image_uri` takes; default: the input itself.
        top: examples in each list; fewer where fewer have the list's sign.
        method: name of the method that gave the scores, where others stand beside it.
        others: scores of the same queries and training examples by other methods, under their names.

    Raises:
        ValueError: if the data sets are not as long as the scores say, or parts or others belong to other scores.
        ImportError: without Pillow (extra ``demo``).

    Example:
        >>> scores = Scores(np.array([[0.5, -0.25]]), ["q"], ["a", "b"], unit="logit margin")
        >>> page = make_page("Why?", scores, [("good film", 1), ("bad film", 0)], [("fine film", 1)])
        >>> [hit.example.text for hit in page.sections[0].harmful]
        ['bad film']
    """
    if (len(queries), len(train_set)) != scores.shape:
        raise ValueError(
            f"scores of shape {scores.shape} need as many queries and training examples, "
            f"got {len(queries)} and {len(train_set)}"
        )
    if parts is not None and parts.values.shape[1:] != scores.shape:
        raise ValueError(f"parts of shape {parts.values.shape} do not go with scores of shape {scores.shape}")
    others = others or {}
    for name, other in others.items():
        if other.shape != scores.shape:
            raise ValueError(f"scores {name!r} of shape {other.shape} do not go with scores of shape {scores.shape}")
    show = _Showing(class_names, picture)
    lists = _strongest(scores, train_set, show, top, parts)
    beside = {name: _strongest(other, train_set, show, top) for name, other in others.items()}
    sections = tuple(
        QuerySection(
            example=show(queries[query], id, None if predictions is None else predictions[query]),
            helpful=lists[query][0],
            harmful=lists[query][1],
            measurement=None if measurements is None else float(measurements[query]),
            note="" if notes is None else notes[query],
            method=method,
            others=tuple(MethodLists(name, *lists[query], others[name].unit) for name, lists in beside.items()),
        )
        for query, id in enumerate(scores.query_ids)
    )
    names = () if parts is None else tuple(segment.name for segment in parts.segments)
    return Page(title, scores.unit, sections, segments=names, higher_is_better=scores.higher_is_better)


def _strongest(
    scores: Scores, train_set: Any, show: "_Showing", top: int, parts: SegmentScores | None = None
) -> list[tuple[tuple[Attribution, ...], tuple[Attribution, ...]]]:
    """For each query, its most helpful and its most harmful examples; only those whose score has the list's sign."""
    k = min(top, len(train_set))

    def listed(query: int, hits: Hits, raises: bool) -> tuple[Attribution, ...]:
        return tuple(
            Attribution(
                show(train_set[int(row)], scores.train_ids[row]),
                float(value),
                () if parts is None else tuple(float(part) for part in parts.values[:, query, row]),
            )
            for row, value in zip(hits.indices[query], hits.scores[query], strict=True)
            if (value > 0 if raises else value < 0)
        )

    helpful, harmful, up = scores.helpful(k), scores.harmful(k), scores.higher_is_better
    return [(listed(query, helpful, up), listed(query, harmful, not up)) for query in range(len(scores))]


@dataclass(frozen=True)
class _Showing:
    """How an example of a data set is shown."""

    class_names: ClassNames | None
    picture: Callable[[Any], Any] | None

    def __call__(self, item: Any, id: Any, prediction: Any = None) -> Example:
        shown = self.picture(item[0]) if self.picture is not None else item[0]
        return Example(
            id=id,
            label=_name(item[1], self.class_names),
            image=image_uri(shown),
            text=shown if isinstance(shown, str) else None,
            prediction=None if prediction is None else _name(prediction, self.class_names),
        )


def render(page: Page) -> str:
    """Return the page as HTML; every text is escaped.

    Raises:
        ImportError: without jinja2 (extra ``demo``).
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError('the report needs jinja2: pip install "source-proj[demo]"') from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("source_proj.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["signed"] = signed
    return environment.get_template("page.html").render(page=page, scale=_scale(page.checks))


def write_report(page: Page, path: str | Path, *, overwrite: bool = False) -> Path:
    """Render the page to a file, which appears when it is whole, and return its path.

    Args:
        page: what to show.
        path: where; folders above it are made.
        overwrite: replace a file that is there.

    Raises:
        FileExistsError: something is there already that may not be overwritten.
    """
    path = Path(path)
    content = render(page).encode("utf-8", errors="backslashreplace")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_output(path, content, overwrite=overwrite)
    return path


def _name(label: Any, class_names: ClassNames | None) -> str:
    """A label in words: its class name, or the value as it is."""
    if hasattr(label, "item") and np.ndim(label) == 0:
        label = label.item()
    if class_names is None or isinstance(label, str):
        return f"{label:.4g}" if isinstance(label, float) else str(label)
    return str(class_names[label])


def _scale(checks: Sequence[Check]) -> Callable[[float], float]:
    """Map changes of the measurement to percent of the chart's width, zero and all error bars within."""
    ends = [0.0]
    for check in checks:
        ends += [check.predicted, check.actual - 2 * check.error, check.actual + 2 * check.error]
    low, high = min(ends), max(ends)
    width = (high - low) or 1.0
    return lambda value: round(4 + 92 * (value - low) / width, 2)
