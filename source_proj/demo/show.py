"""What the demo shows: lines for a terminal, and the page."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Subset

from source_proj._io.printable import bytes_in_words
from source_proj.attribution.parts import PartScores
from source_proj.attribution.scores import Scores
from source_proj.attribution.source import Segment
from source_proj.attribution.words import signed
from source_proj.demo.check import Removal, judged, verdict
from source_proj.demo.digits import BATCH_SIZE, EPOCHS, LR, MOMENTUM, WEIGHT_DECAY, Digits, checkpoint_steps
from source_proj.report import Check, Page, make_page

__all__ = ["Answer", "answer_text", "check_text", "demo_page", "rendering"]

_SHADES = np.array(list(" .:-=+*#%@"))
_GAP = "   "


@dataclass(frozen=True)
class Answer:
    """A test digit and what the network says of it.

    Attributes:
        query: its position among the test digits.
        label: its label.
        prediction: the network's answer.
        margin: logit margin of the label.
        note: why it was chosen.
    """

    query: int
    label: int
    prediction: int
    margin: float
    note: str


def rendering(pixels: Tensor) -> list[str]:
    """Draw a digit of 64 pixels in [0, 1] as 8 lines of 16 characters.

    Example:
        >>> import torch
        >>> rendering(torch.linspace(0, 1, 64))[7]
        '%%%%%%%%@@@@@@@@'
    """
    levels = (pixels.reshape(8, 8).clamp(0, 1) * (len(_SHADES) - 1)).round().long().numpy()
    return ["".join(np.repeat(_SHADES[row], 2)) for row in levels]


def answer_text(answer: Answer, scores: Scores, row: int, digits: Digits, top: int = 5) -> str:
    """Describe one answer and its strongest training digits, drawing the first of each kind."""
    helpful, harmful = scores.helpful(top), scores.harmful(top)
    right = "right" if answer.prediction == answer.label else "wrong"
    lines = [
        f"query {answer.query} ({answer.note}): a {answer.label}, answered {answer.prediction} ({right}), "
        f"{scores.unit} {signed(answer.margin)}"
    ]
    drawn = [
        rendering(digits.test_set[answer.query][0]),
        rendering(digits.train_set[int(helpful.indices[row, 0])][0]),
        rendering(digits.train_set[int(harmful.indices[row, 0])][0]),
    ]
    titles = [f"query: {answer.label}", "most helpful", "most harmful"]
    lines += ["  " + _GAP.join(f"{title:<16}" for title in titles).rstrip()]
    lines += ["  " + _GAP.join(parts).rstrip() for parts in zip(*drawn, strict=True)]
    for name, hits in (("most helpful", helpful), ("most harmful", harmful)):
        entries = (
            f"{train_id} (a {int(digits.train_set[int(index)][1])}) {signed(float(score))}"
            for train_id, index, score in zip(hits.ids[row], hits.indices[row], hits.scores[row], strict=True)
        )
        lines.append(f"  {name}, by training id: " + ", ".join(entries))
    return "\n".join(lines)


def check_text(answer: Answer, removals: Sequence[Removal], unit: str) -> str:
    """Lay predicted and actual changes side by side, with what they mean."""
    lines = [
        f"does it hold? change of the {unit} of query {answer.query}; {len(removals[0].changes)} pairs of runs, "
        "each with the same initial weights and batch order; ± one standard error",
    ]
    for removal in removals:
        lines += [f"  {removal.name}", f"    {verdict(removal)}"]
    failed = sum(not removal.holds for removal in removals)
    held = "the signs of the named held, and random examples matter less; sizes need not hold: scores are first-order."
    lines.append(f"  {failed} of {len(removals)} predictions FAILED." if failed else f"  {held}")
    return "\n".join(lines)


def demo_page(
    answers: Sequence[Answer],
    scores: Scores,
    parts: PartScores,
    removals: Sequence[Removal],
    digits: Digits,
    *,
    accuracy: float,
    bank_bytes: int,
) -> Page:
    """Put everything on one page."""
    examples = len(digits.train_set)
    page = make_page(
        "Which training digits made these answers?",
        scores,
        digits.train_set,
        Subset(digits.test_set, [answer.query for answer in answers]),
        parts=parts,
        predictions=[answer.prediction for answer in answers],
        measurements=[answer.margin for answer in answers],
        notes=[answer.note for answer in answers],
        picture=_enlarged,
    )
    return replace(
        page,
        summary=f"A small network learned {examples:,} handwritten digits. For four test digits, these are the "
        "training digits that pushed its answer up or down the most, found by SOURCE in a bank of randomly "
        "projected gradients.",
        segments=_segment_words(parts.parts),
        facts=(
            ("data", f"scikit-learn’s digits, {examples:,} for training, {len(digits.test_set)} for testing"),
            ("network", f"64-128-128-10 with ReLU; {accuracy:.1%} of the test digits right"),
            (
                "training",
                f"SGD, {EPOCHS} epochs, batches of {BATCH_SIZE}, learning rate {LR}, momentum {MOMENTUM}, "
                f"weight decay {WEIGHT_DECAY}",
            ),
            ("bank", bytes_in_words(bank_bytes)),
            ("segments", "; ".join(_segment_fact(segment) for segment in parts.parts)),
        ),
        checks=tuple(
            Check(each.name, each.predicted, each.actual, each.error, len(each.changes), judged(each))
            for each in removals
        ),
        check_title=f"Query {answers[0].query}, trained again",
    )


def _segment_words(segments: Sequence[Segment]) -> tuple[str, ...]:
    """Name segments by the steps that they cover."""
    ends = [0, *(checkpoint_steps(segment.n)[segment.checkpoints[-1]] for segment in segments)]
    return tuple(f"steps {start + 1} to {stop}" for start, stop in pairwise(ends))


def _segment_fact(segment: Segment) -> str:
    return (
        f"{segment.name}, time {segment.time:.3g} (the learning rate's integral), "
        f"trace of the curvature {segment.trace:.3g}, damping {segment.damping:.2g}"
    )


def _enlarged(pixels: Tensor) -> Any:
    """Enlarge 8 x 8 pixels smoothly, so that a browser shows a digit and no mosaic."""
    from PIL import Image

    small = (pixels.reshape(8, 8).clamp(0, 1) * 255).round().byte().numpy()
    return Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC)
