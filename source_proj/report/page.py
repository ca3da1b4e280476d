"""Lay out a :class:`Page` as one HTML file that needs nothing beside it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from source_proj._errors import extra
from source_proj._io.outputs import local_path, write_output
from source_proj._io.printable import SPELLING, printable
from source_proj.attribution.hits import Hits
from source_proj.attribution.parts import PartScores
from source_proj.attribution.scores import Scores
from source_proj.attribution.words import TOWARDS, explained, id_word, signed
from source_proj.bank.examples import ClassNames, Example, Examples, Picture
from source_proj.report.content import Attribution, Check, MethodLists, Page, QuerySection

__all__ = ["make_hits_page", "make_page", "render", "write_report"]


def make_page(
    title: str,
    scores: Scores,
    train_set: Any = None,
    queries: Any = None,
    *,
    parts: PartScores | None = None,
    predictions: Sequence[Any] | None = None,
    measurements: Sequence[float] | None = None,
    notes: Sequence[str] | None = None,
    class_names: ClassNames | None = None,
    picture: Picture | None = None,
    columns: Sequence[str] | None = None,
    top: int = 5,
    method: str = "",
    others: Mapping[str, Scores] | None = None,
) -> Page:
    """Set each query beside its most helpful and most harmful training examples, with pictures, labels and scores.

    What the page says besides (summary, facts, checks) is added with :func:`dataclasses.replace`.

    Args:
        title: heading of the page.
        scores: scores of the queries; rows and columns in the order of the two data sets.
        train_set: what the scores' columns stand for: a map-style data set of ``(input, label)``, or what else
            :class:`Examples` takes, or such examples themselves. Default: what the scores know, as they do where
            ``bank.examples`` was set.
        queries: what the scores' rows stand for, likewise; default: those that were asked.
        parts: the scores by segment of training, as ``Source.by_segment`` gives them.
        predictions: what the model says of each query, as class numbers or words; default: as the scores know it.
        measurements: each query's measurement; likewise.
        notes: a sentence on each query.
        class_names: names of the classes; labels are shown as they are without it.
        picture: how an input becomes a picture, and columns: names of a row's numbers; see :class:`Examples`.
        columns: likewise.
        top: examples in each list; fewer where fewer have the list's sign.
        method: name of the method that gave the scores, where others stand beside it.
        others: scores of the same queries and training examples by other methods, under their names.

    Raises:
        ValueError: if the data sets, or what is said of each query, are not as long as the scores say, or parts or
            others belong to other scores, or nothing is known of the examples.
        ImportError: without Pillow (extra ``demo``).

    Example:
        >>> import numpy as np
        >>> scores = Scores(np.array([[0.5, -0.25]]), ["q"], ["a", "b"], unit="logit margin")
        >>> page = make_page("Why?", scores, [("good film", 1), ("bad film", 0)], [("fine film", 1)])
        >>> [hit.example.text for hit in page.sections[0].harmful]
        ['bad film']
    """
    shown = _known("train_set", train_set, scores.shown.train, picture, class_names, columns)
    asked = shown.like(queries) if queries is not None else _known("queries", None, scores.shown.queries)
    said = replace(scores.shown, queries=asked)
    measured = scores.shown.measurements if measurements is None else measurements
    _require_lengths(scores, shown, asked, predictions=predictions, measurements=measurements, notes=notes)
    others = others or {}
    if parts is not None:
        _require_alike(f"parts of shape {parts.shape}", parts, scores)
    for name, other in others.items():
        _require_alike(f"scores {name!r} of shape {other.shape}", other, scores)
    lists = _strongest(scores, shown, top, parts)
    beside = {name: _strongest(other, shown, top) for name, other in others.items()}
    sections = tuple(
        QuerySection(
            example=_named(said.query(query, id, scores.unit))
            if predictions is None
            else asked.show(query, id_word(id), predictions[query]),
            helpful=lists[query][0],
            harmful=lists[query][1],
            measurement=None if measured is None else float(measured[query]),
            note="" if notes is None else notes[query],
            method=method,
            others=tuple(MethodLists(name, *lists[query], others[name].unit) for name, lists in beside.items()),
        )
        for query, id in enumerate(scores.query_ids)
    )
    names = () if parts is None else parts.names
    return Page(
        title, scores.unit, sections, segments=names, higher_is_better=scores.higher_is_better, additive=scores.additive
    )


def _known(name: str, data: Any, default: Examples | None, *options: Any) -> Examples:
    """Examples that were given, or that scores know of.

    Raises:
        ValueError: nothing is known, or options are given beside examples that have theirs.
    """
    if data is None and default is None:
        raise ValueError(
            f"nothing is known of the scores' examples but their ids: give {name}=, or set bank.examples = "
            "sp.Examples(train_set) before scoring"
        )
    found = default if data is None else data
    if not isinstance(found, Examples):
        return Examples(found, **dict(zip(("picture", "class_names", "columns"), options, strict=True)))
    if any(option is not None for option in options):
        raise ValueError(f"picture, class_names and columns go with a data set: {name} is of examples that have theirs")
    return found


def _require_lengths(
    scores: Scores, train_set: Examples, queries: Examples, **of_each_query: Sequence[Any] | None
) -> None:
    if (len(queries), len(train_set)) != scores.shape:
        raise ValueError(
            f"scores of shape {scores.shape} need as many queries and training examples, "
            f"got {len(queries)} and {len(train_set)}"
        )
    for name, values in of_each_query.items():
        if values is not None and len(values) != len(queries):
            raise ValueError(f"got {len(values)} {name} for {len(queries)} queries: give one for each")


def _require_alike(what: str, given: Scores | PartScores, scores: Scores) -> None:
    """Refuse what is of other examples: places of its columns would be shown as the same places of the scores'."""
    if given.shape[-2:] != scores.shape:
        raise ValueError(f"{what} do not go with scores of shape {scores.shape}")
    for place, (own, other) in enumerate(zip(given.train_ids, scores.train_ids, strict=True)):
        if own != other:
            raise ValueError(
                f"{what} do not go with the scores, whose training example {place} is {other!r} and not {own!r}: "
                "make both of one bank, or of banks with the same ids in the same order"
            )


def _strongest(
    scores: Scores, train_set: Examples, top: int, parts: PartScores | None = None
) -> list[tuple[tuple[Attribution, ...], tuple[Attribution, ...]]]:
    """For each query, its most helpful and its most harmful examples; only those whose score has the list's sign."""
    k = min(top, len(train_set))

    def listed(query: int, hits: Hits, raises: bool) -> tuple[Attribution, ...]:
        return tuple(
            Attribution(
                train_set.show(int(row), id_word(scores.train_ids[row])),
                float(value),
                () if parts is None else tuple(float(part) for part in parts.values[:, query, row]),
            )
            for row, value in zip(hits.indices[query], hits.scores[query], strict=True)
            if (value > 0 if raises else value < 0)
        )

    helpful, harmful, up = scores.helpful(k), scores.harmful(k), scores.higher_is_better
    return [(listed(query, helpful, up), listed(query, harmful, not up)) for query in range(len(scores))]


def make_hits_page(title: str, lists: Mapping[str, Hits], facts: Sequence[tuple[str, str]] = ()) -> Page:
    """Set each query beside its training examples, as far as the hits know them.

    Args:
        title: heading of the page.
        lists: hits of the same queries, under "helpful", "harmful" or any other name. The page's two lists take of
            these two the entries that did what the name says, and of others all.
        facts: pairs (name, value) shown at the end.
    """
    hits = next(iter(lists.values()))
    measured = hits.shown.measurements

    def listed(query: int, helps: bool) -> tuple[Attribution, ...]:
        entries = [
            Attribution(_named(each.train_example(query, rank)), hit.score)
            for name, each in lists.items()
            if name != TOWARDS[not helps]  # the least helpful may end a list of harmful ones
            for rank, hit in enumerate(each[query])
            if hit.score and (hit.score > 0) == (helps == each.higher_is_better)
        ]
        return tuple(sorted(entries, key=lambda entry: -abs(entry.score)))

    sections = tuple(
        QuerySection(
            _named(hits.query_example(query)),
            listed(query, True),
            listed(query, False),
            None if measured is None else float(measured[query]),
        )
        for query in range(len(hits))
    )
    return Page(
        title, hits.unit, sections, facts=tuple(facts), higher_is_better=hits.higher_is_better, additive=hits.additive
    )


def _named(example: Example) -> Example:
    """The example by its id in one word, as terminals and notebooks write it."""
    return replace(example, id=id_word(example.id))


def render(page: Page) -> str:
    """Return the page as HTML; every text is escaped, its controls and direction marks too.

    Raises:
        ImportError: without jinja2 (extra ``demo``).
    """
    with extra("demo"):
        import jinja2
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("source_proj.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_harmless,
    )
    environment.filters["signed"] = partial(signed, minus="−")
    environment.filters["printable"] = printable
    return environment.get_template("page.html").render(
        page=page, scale=_scale(page.checks), unit_in_words=explained(page.unit)
    )


def _harmless(value: Any) -> Any:
    """What a stranger's text may hold is shown as an escape: controls, and marks that would turn what stands beside."""
    return printable(value, keep=SPELLING) if type(value) is str else value


def write_report(page: Page, path: str | Path, *, overwrite: bool = False) -> Path:
    """Render the page to a file, which appears when it is whole, and return its path.

    Args:
        page: what to show.
        path: where; folders above it are made.
        overwrite: replace a file that is there.

    Raises:
        FileExistsError: something is there already that may not be overwritten.
        ValueError: the path is a URL.
    """
    path = local_path(path)
    content = render(page).encode("utf-8", errors="backslashreplace")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_output(path, content, overwrite=overwrite)
    return path


def _scale(checks: Sequence[Check]) -> Callable[[float], float]:
    """Map changes of the measurement to percent of the chart's width, zero and all error bars within."""
    ends = [0.0]
    for check in checks:
        ends += [check.predicted, check.actual - 2 * check.error, check.actual + 2 * check.error]
    low, high = min(ends), max(ends)
    width = (high - low) or 1.0
    return lambda value: round(4 + 92 * (value - low) / width, 2)
