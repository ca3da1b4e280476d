"""Texts with coloured tokens: as an HTML page, and as a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from source_proj.attribution.words import signed

__all__ = ["Coloured", "Passage", "draw", "write_page"]

UP, DOWN = (11, 110, 102), (190, 70, 15)  # red, green, blue; those of the library's report
STRONGEST = 0.75  # opacity of the strongest token's colour: the letters must stay readable on it


@dataclass(frozen=True)
class Coloured:
    """A text whose tokens have numbers.

    Attributes:
        title: what it is.
        words: its tokens, as text.
        values: a number for each, in nats; None where there is none.
    """

    title: str
    words: Sequence[str]
    values: Sequence[float | None]

    @property
    def pairs(self) -> list[tuple[str, float | None]]:
        """Tokens beside their numbers; the ends of lines are shown, as they are tokens too."""
        shown = (word.replace("\n", "↵\n") for word in self.words)
        return list(zip(shown, self.values, strict=True))

    @property
    def scale(self) -> float:
        """Size of the largest number."""
        return max(abs(value) for value in self.values if value is not None)

    @property
    def total(self) -> float:
        """Sum of the numbers."""
        return sum(value for value in self.values if value is not None)


@dataclass(frozen=True)
class Passage:
    """A passage beside the training text that raised its likelihood most.

    Attributes:
        title: heading.
        note: a sentence on it.
        query: the passage; its numbers are the training text's scores.
        document: the training text; its numbers are what each token taught the whole passage.
        others: further training texts and their scores.
    """

    title: str
    note: str
    query: Coloured
    document: Coloured
    others: Sequence[tuple[float, str]]


def write_page(path: Path, title: str, summary: str, reading: str, passages: Sequence[Passage]) -> None:
    """Write the page; all texts are escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, loader=FileSystemLoader(Path(__file__).parent)
    )
    page = environment.get_template("_token_page.html").render(
        title=title, summary=summary, reading=reading, passages=passages, signed=signed, colour=_colour
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def draw(path: Path, passage: Passage) -> None:
    """Draw a passage and its training text side by side."""
    from matplotlib import cm, colors, figure, patches

    texts = (passage.query, passage.document)
    lines = max("".join(text.words).count("\n") for text in texts) + 1
    sheet = figure.Figure(figsize=(13, 1.3 + 0.27 * lines), layout="constrained")
    for axes, text in zip(sheet.subplots(1, 2), texts, strict=True):
        ends = [np.array([*part, 255 * alpha]) / 255 for part, alpha in ((DOWN, STRONGEST), (UP, 0), (UP, STRONGEST))]
        ends[1][:3] = 1
        ramp = colors.LinearSegmentedColormap.from_list("influence", ends)
        norm = colors.Normalize(-text.scale, text.scale)
        row = column = 0
        for word, value in text.pairs:
            for part in word.splitlines(keepends=True):
                letters = part.rstrip("\n")
                shade = (0, 0, 0, 0) if value is None else ramp(norm(value))
                box = patches.Rectangle((column, row - 0.45), len(letters), 0.9, facecolor=shade, linewidth=0)
                axes.add_patch(box)
                axes.text(
                    column, row, letters, family="monospace", fontsize=11, va="center", parse_math=False,
                    color="0.5" if value is None else "black",
                )  # fmt: skip
                column += len(letters)
                if part.endswith("\n"):
                    row, column = row + 1, 0
        axes.set(xlim=(-0.5, 62), ylim=(lines - 0.5, -0.8))
        axes.set_title(text.title, loc="left", fontsize=10)
        axes.axis("off")
        bar = sheet.colorbar(
            cm.ScalarMappable(norm, ramp), ax=axes, orientation="horizontal", shrink=0.5, aspect=35, pad=0.02
        )
        bar.set_label("change of log-likelihood that it made (nats)", fontsize=8)
        bar.ax.locator_params(nbins=5)
        bar.ax.tick_params(labelsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.savefig(path, dpi=130)


def _colour(value: float, scale: float) -> str:
    """A CSS colour: green up, orange down, the more opaque the larger."""
    red, green, blue = UP if value > 0 else DOWN
    return f"rgba({red},{green},{blue},{STRONGEST * abs(value) / scale:.3f})"
