"""Panels: a query beside the training examples that helped and harmed it most, method by method.

As in the SOURCE paper's figures 12 to 15: pictures as one PNG, sentences as tables in markdown. One query by default:
what is committed stays small.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _above  # noqa: F401
import numpy as np
from _pictures import save_picture
from _problem import Problem

import source_proj as sp
from source_proj.report import Attribution, Example, Page, QuerySection, make_page

from _data import write_whole  # isort: skip  # (its folder is put on the path by _problem)

__all__ = ["make_panels", "write_panels"]

TOP = 5
HELPFUL, HARMFUL, INK, SOFT = "#0b6e66", "#a83c0c", "#1d2327", "#5b656d"
LONGEST = 200  # letters of a text in a table


def write_panels(problem: Problem, scores: Mapping[str, Any], folder: Path, queries: Sequence[int] = (0,)) -> Path:
    """Write ``<name>_panels.png`` (pictures) or ``.md`` (texts).

    Args:
        problem: the task; its ``show`` makes the pictures or texts.
        scores: scores ``(Q, N)`` of every method under its name, as arrays or :class:`source_proj.Scores`; columns
            beyond the first stage's examples are left out.
        folder: where the files go.
        queries: positions of the queries to show.

    Returns:
        The file.

    Raises:
        ValueError: if the problem shows nothing, there are no scores, or scores or queries do not fit it.
    """
    page = make_panels(problem, scores, queries)
    if problem.panel == "image":
        path = folder / f"{problem.name}_panels.png"
        _draw(problem, page, path)
    else:
        path = folder / f"{problem.name}_panels.md"
        write_whole(path, _markdown(page).encode())
    return path


def make_panels(problem: Problem, scores: Mapping[str, Any], queries: Sequence[int]) -> Page:
    """Find the strongest examples of each query by each method; arguments and errors as of :func:`write_panels`."""
    if problem.panel not in ("image", "text") or problem.show is None:
        raise ValueError(f"{problem.name} has panel={problem.panel!r}: panels need 'image' or 'text', and show")
    if not scores:
        raise ValueError("there is nothing to show: got no scores")
    total = len(problem.queries)
    if not queries or not all(0 <= query < total for query in queries):
        raise ValueError(f"queries must be positions from 0 to {total - 1}, got {list(queries)}")
    chosen = {name: _of_queries(problem, name, values, list(queries), total) for name, values in scores.items()}
    (method, first), *others = chosen.items()
    return make_page(
        f"{problem.title}: the examples behind the answers",
        first,
        _Shown(problem, next(iter(problem.train_sets)), range(problem.n)),
        _Shown(problem, "queries", queries),
        top=TOP,
        method=method,
        others=dict(others),
    )


def _of_queries(problem: Problem, name: str, scores: Any, queries: list[int], total: int) -> sp.Scores:
    """The chosen queries' scores of the first stage's examples."""
    values = np.asarray(scores)
    if values.ndim != 2 or len(values) != total or values.shape[1] < problem.n:
        raise ValueError(
            f"scores {name!r} of shape {values.shape} do not fit {total} queries and {problem.n} training examples"
        )
    unit = getattr(scores, "unit", problem.task.unit)
    higher = getattr(scores, "higher_is_better", problem.task.higher_is_better)
    return sp.Scores(values[queries, : problem.n], queries, range(problem.n), unit=unit, higher_is_better=higher)


@dataclass(frozen=True)
class _Shown:
    """A data set as a reader sees it: pictures or texts, with the names of their labels."""

    problem: Problem
    which: str
    positions: Sequence[int]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[Any, str]:
        assert self.problem.show is not None
        return self.problem.show(self.which, self.positions[index])


# Texts ---------------------------------------------------------------------------------------------------------------


def _markdown(page: Page) -> str:
    lines = [
        f"# {page.title}", "",
        f"A score is the change of the query's {page.unit} that including the training example made.",
    ]  # fmt: skip
    for section in page.sections:
        lines += [
            "",
            f"## Query {section.example.id}: {section.example.label}",
            "",
            f"> {_cell(section.example, None)}",
        ]
        for method, helpful, harmful in _methods(section):
            lines += ["", f"**{method}**", "", "| helpful | label | score | harmful | label | score |"]
            lines.append("| --- | --- | ---: | --- | --- | ---: |")
            rows = max(len(helpful), len(harmful))
            lines += [f"| {_third(helpful, row)} | {_third(harmful, row)} |" for row in range(rows)]
            if not rows:
                lines.append("| – | | | – | | |")
    return "\n".join(lines) + "\n"


def _methods(section: QuerySection) -> list[tuple[str, tuple[Attribution, ...], tuple[Attribution, ...]]]:
    own = (section.method, section.helpful, section.harmful)
    return [own, *((other.method, other.helpful, other.harmful) for other in section.others)]


def _third(hits: Sequence[Attribution], row: int) -> str:
    """Text, label and score of one example: half of a table's row."""
    if row >= len(hits):
        return "– | | "
    hit = hits[row]
    return f"{_cell(hit.example, LONGEST)} | {_escaped(hit.example.label)} | {_number(hit.score)}"


def _cell(example: Example, longest: int | None) -> str:
    """The text on one line; the lines of a pair are kept apart."""
    parts = [" ".join(line.split()) for line in (example.text or "").splitlines()]
    if longest is not None:
        share = max(20, longest // max(1, len(parts)))
        parts = [part if len(part) <= share else part[: share - 1].rstrip() + "…" for part in parts]
    return "<br>".join(_escaped(part) for part in parts)


def _escaped(text: str) -> str:
    """Text that markdown leaves as it is."""
    for sign in "\\`*_[]|#~":
        text = text.replace(sign, "\\" + sign)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _number(score: float) -> str:
    return f"{score:+.3g}".replace("-", "−")


# Pictures ------------------------------------------------------------------------------------------------------------


def _draw(problem: Problem, page: Page, path: Path) -> None:
    """One picture of all queries; all tiles on one axes, whose unit is a tile's side."""
    from matplotlib.figure import Figure

    left, gap, step = 3.3, 0.35, 1.42  # where tiles begin, what parts the two fives, height of a row
    rows = sum(len(_methods(section)) for section in page.sections)
    height = rows * step + 0.5 * len(page.sections) + 0.6
    width = left + 2 * TOP * 1.08 + gap
    figure = Figure(figsize=(0.72 * width, 0.72 * height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    starts = {"helpful": left, "harmful": left + TOP * 1.08 + gap}
    for kind, colour in [("helpful", HELPFUL), ("harmful", HARMFUL)]:
        axes.text(starts[kind], 0.4, f"most {kind}", color=colour, fontsize=11, weight="bold")
    stage, top = next(iter(problem.train_sets)), 0.6

    def tile(which: str, index: int, x: float, y: float, side: float = 1.0) -> None:
        assert problem.show is not None
        image = np.asarray(problem.show(which, index)[0])
        axes.imshow(image, cmap="gray", extent=(x, x + side, y + side, y), aspect="auto", interpolation="nearest")

    for section in page.sections:
        tile("queries", section.example.id, 0.15, top, side=1.3)
        axes.text(0.15, top + 1.54, f"query {section.example.id}", color=SOFT, fontsize=7)
        axes.text(0.15, top + 1.8, section.example.label, color=INK, fontsize=9, weight="bold")
        for method, helpful, harmful in _methods(section):
            axes.text(left - 0.15, top + 0.5, _folded(method), color=INK, fontsize=8, ha="right", va="center")
            for hits, kind, colour in [(helpful, "helpful", HELPFUL), (harmful, "harmful", HARMFUL)]:
                for place, hit in enumerate(hits):
                    x = starts[kind] + place * 1.08
                    tile(stage, hit.example.id, x, top)
                    same = hit.example.label == section.example.label
                    axes.text(
                        x, top + 1.15, hit.example.label, color=INK if same else SOFT, fontsize=6,
                        weight="bold" if same else "normal",
                    )  # fmt: skip
                    axes.text(x, top + 1.3, _number(hit.score), color=colour, fontsize=6)
            top += step
        top += 0.5
    axes.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    save_picture(figure, path, dpi=130, colours=256)


def _folded(method: str) -> str:
    """A method's name on lines short enough for its place."""
    return textwrap.fill(method, 17)
