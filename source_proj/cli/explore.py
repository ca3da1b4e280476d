"""``explore``: a page to look around in."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from source_proj.cli.options import (
    ASKED,
    OUTPUT,
    RUNNING,
    BankPaths,
    BatchSize,
    Device,
    Method,
    Model,
    Overwrite,
    Progress,
    TrustRemoteCode,
)
from source_proj.cli.output import reports_errors, say
from source_proj.cli.score import (
    AverageOption,
    BlocksOption,
    CurvatureOption,
    DampingFactorOption,
    DampingOption,
    Data,
    Dataset,
    MethodOption,
    PerToken,
    Picture,
    Queries,
    QueryGradientOption,
    RankOption,
    RidgeOption,
    SegmentsOption,
    Target,
    TaskName,
)

if TYPE_CHECKING:
    from source_proj.attribution.attributor import Attributor

__all__ = ["explore"]


@reports_errors
def explore(
    context: typer.Context,
    bank: BankPaths,
    model: Model = None,
    queries: Queries = None,
    dataset: Dataset = None,
    per_token: PerToken = False,
    target: Target = None,
    data: Data = None,
    picture: Picture = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            metavar="FILE",
            help="The training set, of which the page gives a copy without chosen examples; a bank built from a text "
            "file knows its own.",
            rich_help_panel=ASKED,
        ),
    ] = None,
    method: MethodOption = Method.source,
    segments: SegmentsOption = None,
    curvature: CurvatureOption = None,
    damping: DampingOption = None,
    blocks: BlocksOption = None,
    average: AverageOption = False,
    query_gradient: QueryGradientOption = None,
    ridge: RidgeOption = None,
    rank: RankOption = None,
    damping_factor: DampingFactorOption = None,
    task: TaskName = None,
    static: Annotated[
        Path | None,
        typer.Option(
            "--static",
            metavar="FOLDER",
            help="Write the page into a folder that opens from disk, with the strongest examples of each query, and "
            "serve nothing.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    overwrite: Overwrite = False,
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Where to serve; 0: any.", rich_help_panel=RUNNING)
    ] = 0,
    trust_remote_code: TrustRemoteCode = False,
    batch_size: BatchSize = 64,
    device: Device = None,
    progress: Progress = True,
) -> None:
    """Look around in a page: search queries and training examples, and see who helped or harmed whom.

    A bank that was built from a text file needs no more: 200 of its own examples, evenly spread, are asked about then.
    """
    from source_proj._errors import extra
    from source_proj.cli.asking import ask

    with extra("explore"):
        import starlette  # noqa: F401 (before any work is done)
        import uvicorn  # noqa: F401
    from source_proj.cli.text import own_file
    from source_proj.report.explore import Explorer, require_writable, serve, write_static

    if static is not None:
        require_writable(static, overwrite=overwrite)
    asked, data_of_queries = ask(context.params, own=True)
    known = file or own_file(bank[0])
    documents = _documents(asked) if static is None else None
    explorer = Explorer(asked, data_of_queries, file=known, documents=documents)
    if static is not None:
        write_static(explorer, static, overwrite=overwrite)
        say(f"wrote {static / 'index.html'}")
        return
    serve(explorer, port, lambda address: say(f"open {address} (Ctrl-C ends it)"))


def _documents(method: "Attributor") -> Any:
    """The training set of a language model as it read it, where that is known: tokens have scores then."""
    from source_proj.integrations.text_bank import OwnTexts

    known = method.banks[0].examples
    if method.task.name != "causal_lm" or known is None or not isinstance(known.sources[0], OwnTexts):
        return None
    return known.sources[0]
