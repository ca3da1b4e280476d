"""``score`` and ``top-k``: ask a bank."""

from pathlib import Path
from typing import Annotated

import typer

from source_proj.cli.options import (
    ASKED,
    METHOD,
    OUTPUT,
    BankPaths,
    BatchSize,
    Curvature,
    Dask,
    Device,
    Json,
    Method,
    Model,
    Most,
    Overwrite,
    Progress,
    QueryGradient,
    TrustRemoteCode,
    Workers,
)
from source_proj.cli.output import emit, reports_errors, say

__all__ = ["score", "top_k"]

Queries = Annotated[
    str | None,
    typer.Option(
        "--queries",
        metavar="MODULE:FUNCTION",
        help="Gives the queries: a data set or a DataLoader.",
        rich_help_panel=ASKED,
    ),
]
Dataset = Annotated[
    Path | None,
    typer.Option(
        "--dataset",
        metavar="FILE",
        help="Queries to a bank that was built from texts: .jsonl, .csv, .tsv, .parquet or a folder of datasets.",
        rich_help_panel=ASKED,
    ),
]
PerToken = Annotated[
    bool, typer.Option("--per-token", help="One query for each token of the texts in --dataset.", rich_help_panel=ASKED)
]
MethodOption = Annotated[Method, typer.Option("--method", help="Attribution method.", rich_help_panel=METHOD)]
Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="TARGET",
        help="Which class queries are asked about: label (default), predicted (why did the model say this?) or a "
        "class's number or name; predicted asks a regression about its prediction, a language model about its own "
        "continuations.",
        rich_help_panel=ASKED,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="MODULE:FUNCTION",
        help="Gives the training set, whose examples are then shown; a bank built from a text file knows its own.",
        rich_help_panel=ASKED,
    ),
]
Picture = Annotated[
    str | None,
    typer.Option("--picture", metavar="HxW", help="Shape of pictures that lie flat, as 8x8.", rich_help_panel=ASKED),
]
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task", metavar="MODULE:FUNCTION", help="The bank's task, if it is one of your own.", rich_help_panel=ASKED
    ),
]
SegmentsOption = Annotated[
    str | None,
    typer.Option(
        "--segments",
        help="Number of segments, or JSON such as [[0,1],[2]]; default: the bank's.",
        rich_help_panel=METHOD,
    ),
]
CurvatureOption = Annotated[
    Curvature | None,
    typer.Option(
        "--curvature",
        help="Hessian estimate; default: gauss-newton for regression, sampled-fisher for language models (if the bank "
        "has its rows), else empirical-fisher.",
        rich_help_panel=METHOD,
    ),
]
DampingOption = Annotated[
    str | None, typer.Option("--damping", help="noise (default: by formula), off, or a number.", rich_help_panel=METHOD)
]
BlocksOption = Annotated[
    int | None,
    typer.Option(
        "--blocks",
        metavar="B",
        min=1,
        help="Sketches that the bank's is cut into, for cheaper fits of large ones; default: of at most 4,096 columns.",
        rich_help_panel=METHOD,
    ),
]
AverageOption = Annotated[
    bool,
    typer.Option(
        "--average", help="Influence functions with gradients averaged over the checkpoints.", rich_help_panel=METHOD
    ),
]
QueryGradientOption = Annotated[
    QueryGradient | None,
    typer.Option(
        "--query-gradient",
        help="At the final weights, or the mean over checkpoints (source's default).",
        rich_help_panel=METHOD,
    ),
]
RidgeOption = Annotated[
    float | None, typer.Option("--ridge", min=0, help="TRAK's, added to its eigenvalues.", rich_help_panel=METHOD)
]
RankOption = Annotated[
    int | None, typer.Option("--rank", min=1, help="Eigenvectors of arnoldi's Hessian.", rich_help_panel=METHOD)
]
DampingFactorOption = Annotated[
    float | None,
    typer.Option("--damping-factor", help="Of datainf's damping; default: the paper's 0.1.", rich_help_panel=METHOD),
]
HitsOut = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="FILE",
        help="Stream one list (--most or --lowest) of any number of queries to .parquet or .csv (query_id, train_id, "
        "rank, score), or .zarr; after a kill the same command goes on.",
        rich_help_panel=OUTPUT,
    ),
]
HtmlFile = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Also write a page.", rich_help_panel=OUTPUT)
]

_PREVIEW = 3  # queries, and examples of each, that score shows


@reports_errors
def score(
    context: typer.Context,
    bank: BankPaths,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Where to write: .npy (ids in NAME.npy.json), .zarr, .csv (a row a query, a column an example) "
            "or .parquet (a line a score: query_id, train_id, rank, score).",
            rich_help_panel=OUTPUT,
        ),
    ],
    model: Model = None,
    queries: Queries = None,
    dataset: Dataset = None,
    per_token: PerToken = False,
    target: Target = None,
    data: Data = None,
    picture: Picture = None,
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
    trust_remote_code: TrustRemoteCode = False,
    batch_size: BatchSize = 64,
    device: Device = None,
    workers: Workers = None,
    dask: Dask = None,
    progress: Progress = True,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write the scores of all training examples for all queries, and show the first queries' strongest."""
    from source_proj.attribution.words import sign_of
    from source_proj.cli.answers import Answer, scores_writer
    from source_proj.cli.asking import ask
    from source_proj.cli.executors import executor_of

    write = scores_writer(out, overwrite)
    executor = context.with_resource(executor_of(context.params))
    asked, data_of_queries = ask(context.params, executor)
    if out.suffix == ".zarr":
        scores = asked.score(data_of_queries, out, overwrite=overwrite)
    else:
        scores = asked.score(data_of_queries)
        write(scores)
    count, rows = scores.shape
    sign = sign_of(scores.unit, additive=scores.additive)
    if json:
        emit({"out": out, "queries": count, "train": rows, "unit": scores.unit, "sign": sign, "method": method.value})
        return
    say(f"{out}: {count} queries x {rows} training examples, in units of the {scores.unit}; {sign}")
    k = min(_PREVIEW, rows)
    first = scores.corner(_PREVIEW, rows)
    lists = {"helpful": first.helpful(k), "harmful": first.harmful(k)}
    left = count - _PREVIEW
    more = f"… and {left} more {'query' if left == 1 else 'queries'}: {out} has all" if left > 0 else ""
    say("\n" + Answer(lists, method.value).text(more))


@reports_errors
def top_k(
    context: typer.Context,
    bank: BankPaths,
    model: Model = None,
    queries: Queries = None,
    dataset: Dataset = None,
    per_token: PerToken = False,
    target: Target = None,
    data: Data = None,
    picture: Picture = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Training examples per query.", rich_help_panel=ASKED)] = 10,
    most: Annotated[
        Most | None,
        typer.Option("--most", help="Only these, by the task's own sense; default: both.", rich_help_panel=ASKED),
    ] = None,
    lowest: Annotated[
        bool, typer.Option("--lowest", help="The lowest scores, whatever their sense.", rich_help_panel=ASKED)
    ] = False,
    rerank: Annotated[
        int | None,
        typer.Option(
            "--rerank",
            metavar="M",
            min=1,
            help="Correct the scores of M examples per query by their whole gradients, made anew from --data (source).",
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
    out: HitsOut = None,
    html: HtmlFile = None,
    trust_remote_code: TrustRemoteCode = False,
    batch_size: BatchSize = 64,
    device: Device = None,
    workers: Workers = None,
    dask: Dask = None,
    progress: Progress = True,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Show the training examples that helped and harmed each query most, with what is known of them."""
    from source_proj._io.outputs import require_free
    from source_proj.cli.answers import Answer, require_folder
    from source_proj.cli.asking import ask, check_one_list, stream_list, verbs_of
    from source_proj.cli.executors import executor_of

    if most is not None and lowest:
        raise ValueError("--most and --lowest choose differently: leave one of them out")
    if out is not None:
        check_one_list(context.params)
    if html is not None:
        require_folder("--html", html)
        require_free(html, overwrite=overwrite)
    executor = context.with_resource(executor_of(context.params))
    asked, data_of_queries = ask(context.params, executor)
    if out is not None:
        facts = stream_list(asked, data_of_queries, context.params)
        if json:
            emit(facts)
        else:
            say(
                f"{out}: {facts['queries']} queries x {k} training examples, in units of the {facts['unit']}; "
                f"{facts['sign']}"
            )
        return
    verbs = verbs_of(asked, data_of_queries, k, rerank)
    wanted = ["lowest"] if lowest else ["helpful", "harmful"] if most is None else [most.value]
    answer = Answer({name: verbs[name]() for name in wanted}, method.value)
    if html is not None:
        answer.write_html(html, overwrite)
    if json:
        emit(answer.as_json())
    else:
        say(answer.text())
