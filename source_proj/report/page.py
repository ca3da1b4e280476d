"""Lay out a :class:`Page` as one HTML file that needs nothing beside it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from source_proj.report.content import Attribution, Check, Example, Page, QuerySection, signed
from source_proj.report.images import image_uri
from source_proj.scores import Scores

__all__ = ["collect", "render", "write_report"]

ClassNames = Sequence[str] | Mapping[Any, str]


def collect(
    scores: Scores,
    train_set: Any,
    queries: Any,
    *,
    parts: np.ndarray | None = None,
    predictions: Sequence[Any] | None = None,
    measurements: Sequence[float] | None = None,
    notes: Sequence[str] | None = None,
    class_names: ClassNames | None = None,
    picture: Callable[[Any], Any] | None = None,
    top: int = 5,
) -> tuple[QuerySection, ...]:
    """Gather each query's most helpful and most harmful training examples with their pictures and labels.

    Args:
        scores: scores of the queries; rows and columns in the order of the two data sets.
        train_set: map-style data set of ``(input, label)`` that the scores' columns stand for.
        queries: map-style data set of ``(input, label)`` that the scores' rows stand for.
        parts: the scores by segment, ``(L, Q, N)``, or None.
        predictions: what the model says of each query, as class numbers or words.
        measurements: each query's measurement.
        notes: a sentence on each query.
        class_names: names of the classes; labels are shown as they are without it.
        picture: turns an input into a picture that :func:`image_uri` takes; default: the input itself.
        top: examples in each list; fewer where fewer have the list's sign.

    Raises:
        ValueError: if the data sets are not as long as the scores say.
    """
    if (len(queries), len(train_set)) != scores.shape:
        raise ValueError(
            f"scores of shape {scores.shape} need as many queries and training examples, "
            f"got {len(queries)} and {len(train_set)}"
        )
    helpful, harmful = scores.helpful(min(top, len(train_set))), scores.harmful(min(top, len(train_set)))
    direction = 1.0 if scores.higher_is_better else -1.0

    def show(data: Any, index: int, id: Any, prediction: Any = None) -> Example:
        item = data[index]
        shown = picture(item[0]) if picture is not None else item[0]
        return Example(
            id=id,
            label=_name(item[1], class_names),
            image=image_uri(shown),
            text=shown if isinstance(shown, str) else None,
            prediction=None if prediction is None else _name(prediction, class_names),
        )

    def attributions(query: int, indices: np.ndarray, sign: float) -> tuple[Attribution, ...]:
        return tuple(
            Attribution(
                show(train_set, int(one), scores.train_ids[one]),
                float(scores.values[query, one]),
                () if parts is None else tuple(float(part) for part in parts[:, query, one]),
            )
            for one in indices
            if scores.values[query, one] * sign > 0
        )

    return tuple(
        QuerySection(
            example=show(queries, query, id, None if predictions is None else predictions[query]),
            helpful=attributions(query, helpful.indices[query], direction),
            harmful=attributions(query, harmful.indices[query], -direction),
            measurement=None if measurements is None else float(measurements[query]),
            note="" if notes is None else notes[query],
        )
        for query, id in enumerate(scores.query_ids)
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


def write_report(page: Page, path: str | Path) -> Path:
    """Render the page to a file and return its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(page), encoding="utf-8")
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
