"""``condense``: one row an example in place of one a checkpoint."""

from typing import Annotated, Any

import typer

from source_proj.cli.options import BankPath, Curvature, Device, Json, Progress
from source_proj.cli.output import emit, reports_errors, say

__all__ = ["condense"]


@reports_errors
def condense(
    bank: BankPath,
    out: Annotated[str, typer.Argument(metavar="OUT", help="The new bank's directory, or its URL.")],
    segments: Annotated[
        str | None,
        typer.Option(help="Number of segments, or JSON such as [[0,1],[2]]; default: the bank's."),
    ] = None,
    curvature: Annotated[
        Curvature | None, typer.Option(help="Hessian estimate to keep; default: by the task, as score takes it.")
    ] = None,
    query_points: Annotated[
        int | None,
        typer.Option(min=1, help="At how many checkpoints queries are differentiated, evenly spread; default: all."),
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="How the mean rows are stored; default: int8, or the bank's own if finer.")
    ] = None,
    device: Device = None,
    progress: Progress = True,
    json: Json = False,
) -> None:
    """Write a bank of the mean rows and their Hessian: source's scores from a fraction of the bytes.

    Methods that need gradients at a single checkpoint (tracin, trak, --rerank) want the bank that it is made of. A
    killed command goes on where it was when it is given again.
    """
    import source_proj.bank as banks
    from source_proj.attribution.condense import condense as made_of
    from source_proj.cli.parsing import parse_segments
    from source_proj.integrations.text_settings import TextSettings

    kept: Any = None if curvature is None else curvature.name
    opened = banks.open(bank)
    made = made_of(
        opened,
        out,
        segments=parse_segments(segments),
        curvature=kept,
        query_points=query_points,
        storage=storage,
        device=device,
        progress=progress,
    )
    TextSettings.copy(bank, out)
    before, after = (sum(size for part, size in each.nbytes().items() if part != "fits") for each in (opened, made))
    if json:
        emit({"bank": made.path, "rows": made.n_rows, "bytes": after, "bytes_before": before})
    else:
        say(f"{made.path}: {made.n_rows} rows, {after / 1e6:.1f} MB, of {before / 1e6:.1f} without fits")
        if after > before:
            say(
                f"it is larger, by its Hessian of {made.sketch.dim} columns: condense banks of more examples than that "
                "or of more checkpoints"
            )
