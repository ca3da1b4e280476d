"""``demo``: see it work."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from source_proj.cli.options import Json, Overwrite, Progress
from source_proj.cli.output import emit, reports_errors, say

if TYPE_CHECKING:
    from source_proj.attribution.hits import Hits
    from source_proj.demo import Demo

__all__ = ["demo"]


@reports_errors
def demo(
    folder: Annotated[
        Path | None,
        typer.Argument(help="Keep run, bank and page here; an interrupted demo goes on. Default: a temporary folder."),
    ] = None,
    page: Annotated[Path | None, typer.Option(help="Where to write the HTML page.")] = None,
    pairs: Annotated[int, typer.Option(min=2, help="Matched pairs of retrainings behind each check.")] = 16,
    remove: Annotated[int, typer.Option(min=1, max=500, help="Training digits left out in each check.")] = 20,
    overwrite: Overwrite = False,
    progress: Progress = True,
    json: Json = False,
) -> None:
    """Train on handwritten digits, attribute four answers, check the scores by retraining, write an HTML page."""
    from source_proj.demo import run

    shown = _silent if json else say
    result = run(folder, page=page, pairs=pairs, remove=remove, overwrite=overwrite, say=shown, progress=progress)
    if json:
        emit(_facts(result))


def _silent(text: str) -> None:
    """Print nothing: standard output is for the JSON."""


def _facts(result: "Demo") -> dict[str, Any]:
    from source_proj.demo import verdict

    helpful, harmful = result.scores.helpful(5), result.scores.harmful(5)
    return {
        "accuracy": result.accuracy,
        "unit": result.scores.unit,
        "queries": [
            {
                "id": answer.query,
                "label": answer.label,
                "prediction": answer.prediction,
                "measurement": answer.margin,
                "note": answer.note,
                "helpful": _entries(helpful, row),
                "harmful": _entries(harmful, row),
            }
            for row, answer in enumerate(result.answers)
        ],
        "checks": [
            {
                "name": removal.name,
                "predicted": removal.predicted,
                "actual": removal.actual,
                "standard_error": removal.error,
                "pairs": len(removal.changes),
                "holds": removal.holds,
                "verdict": verdict(removal),
            }
            for removal in result.removals
        ],
        "page": result.page,
        "seconds": result.seconds,
    }


def _entries(hits: "Hits", row: int) -> list[dict[str, Any]]:
    return [
        {"id": train_id, "score": float(score)} for train_id, score in zip(hits.ids[row], hits.scores[row], strict=True)
    ]  # fmt: skip
