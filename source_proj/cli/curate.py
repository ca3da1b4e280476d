"""``curate``: lists of examples to drop or to keep, files without them, and retraining as their judge."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from source_proj.cli.options import BankPath, BankPaths, BatchSize, Device, Json, Model, Overwrite, Progress
from source_proj.cli.output import emit, reports_errors, say

__all__ = ["app"]

app = typer.Typer(
    help="Clean a training set: find examples, write the file without them, verify by retraining.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class By(StrEnum):
    """What makes a label suspicious."""

    error = "error"
    self_influence = "self-influence"
    disagreement = "disagreement"


Queries = Annotated[
    str | None,
    typer.Option("--queries", metavar="MODULE:FUNCTION", help="Gives the validation set: a data set or DataLoader."),
]
Dataset = Annotated[
    Path | None,
    typer.Option(
        "--dataset",
        metavar="FILE",
        help="Validation set, to a bank of texts: .jsonl, .csv, .tsv, .parquet or a folder of datasets.",
    ),
]
GroupColumn = Annotated[
    str | None,
    typer.Option("--group-column", help="Column of --dataset: its groups count alike, whatever their sizes."),
]
WeightColumn = Annotated[str | None, typer.Option("--weight-column", help="Column of --dataset: the queries' weights.")]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="MODULE:FUNCTION",
        help="Gives the training set, or Examples of it, to show the examples named; a bank of texts knows its own.",
    ),
]
TaskName = Annotated[
    str | None, typer.Option("--task", metavar="MODULE:FUNCTION", help="The bank's task, if it is one of your own.")
]
Count = Annotated[int, typer.Option("-n", min=1, help="How many examples.")]
File = Annotated[
    Path | None, typer.Option("--file", metavar="FILE", help="The training set: .csv, .jsonl, .parquet or a folder.")
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Where to write --file without the dropped examples.")]
ListFile = Annotated[
    Path | None, typer.Option("--list", metavar="JSON", help="Where to write ids, reasons and numbers.")
]
Encoding = Annotated[str, typer.Option("--encoding", help="Of --file, if it begins with no byte order mark.")]
Delimiter = Annotated[
    str,
    typer.Option(
        "--delimiter",
        help=r"Of a .csv file; \t is a tab.",
        callback=lambda sign: sign.replace(r"\t", "\t"),  # which few shells can type
    ),
]
WithColumns = Annotated[
    bool, typer.Option("--annotated", help="Leave all examples in, and add columns (.parquet and folders).")
]
LabelColumn = Annotated[str | None, typer.Option("--label-column", help="Column of the labels in --file.")]


@app.command("harmful")
@reports_errors
def harmful(
    context: typer.Context,
    bank: BankPaths,
    model: Model = None,
    queries: Queries = None,
    dataset: Dataset = None,
    group_column: GroupColumn = None,
    weight_column: WeightColumn = None,
    false_share: Annotated[float, typer.Option(help="Expected share of the named that are named by chance.")] = 0.05,
    task: TaskName = None,
    data: Data = None,
    file: File = None,
    out: Out = None,
    list: ListFile = None,
    encoding: Encoding = "utf-8",
    delimiter: Delimiter = ",",
    annotated: WithColumns = False,
    batch_size: BatchSize = 64,
    device: Device = None,
    progress: Progress = True,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Name the examples that harm a validation set, beyond what its size leaves to chance."""
    from source_proj import curate as library
    from source_proj.cli import cleanings

    delivery = cleanings.delivery(context.params)
    source, data = cleanings.asked(context.params)
    delivery.give(
        library.harmful(
            cleanings.aggregate(source, data, dataset, group_column, weight_column), false_share=false_share
        )
    )


@app.command("drop-worst")
@reports_errors
def drop_worst(
    context: typer.Context,
    bank: BankPaths,
    n: Count,
    model: Model = None,
    queries: Queries = None,
    dataset: Dataset = None,
    group_column: GroupColumn = None,
    weight_column: WeightColumn = None,
    label_column: LabelColumn = None,
    task: TaskName = None,
    data: Data = None,
    file: File = None,
    out: Out = None,
    list: ListFile = None,
    encoding: Encoding = "utf-8",
    delimiter: Delimiter = ",",
    annotated: WithColumns = False,
    batch_size: BatchSize = 64,
    device: Device = None,
    progress: Progress = True,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Name the n examples that harm a validation set most; with --label-column, each class loses its share."""
    from source_proj import curate as library
    from source_proj.cli import cleanings

    delivery = cleanings.delivery(context.params)
    labels = None if label_column is None else cleanings.labels(context.params)
    source, data = cleanings.asked(context.params)
    aggregated = cleanings.aggregate(source, data, dataset, group_column, weight_column)
    delivery.give(library.drop_worst(aggregated, n, labels=labels))


@app.command("select")
@reports_errors
def select(
    context: typer.Context,
    bank: BankPaths,
    n: Count,
    model: Model = None,
    queries: Queries = None,
    dataset: Dataset = None,
    label_column: LabelColumn = None,
    task: TaskName = None,
    data: Data = None,
    file: File = None,
    out: Out = None,
    list: ListFile = None,
    encoding: Encoding = "utf-8",
    delimiter: Delimiter = ",",
    annotated: WithColumns = False,
    batch_size: BatchSize = 64,
    device: Device = None,
    progress: Progress = True,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Choose n examples for a target set; with --label-column, each class gives its share."""
    from source_proj import curate as library
    from source_proj.cli import cleanings

    delivery = cleanings.delivery(context.params)
    labels = None if label_column is None else cleanings.labels(context.params)
    source, data = cleanings.asked(context.params)
    delivery.give(library.select(source, data, n=n, labels=labels))


@app.command("mislabelled")
@reports_errors
def mislabelled(
    context: typer.Context,
    bank: BankPaths,
    label_column: Annotated[
        str | None,
        typer.Option(help="Column of the labels in --file; default: that of a bank of texts, else 'label'."),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(
            "-n",
            min=1,
            help="How many; default: by error those less probable than halfway between their class and another, else "
            "those far from their class.",
        ),
    ] = None,
    by: Annotated[By, typer.Option(help="What makes a label suspicious.")] = By.error,
    data: Data = None,
    file: File = None,
    out: Out = None,
    list: ListFile = None,
    encoding: Encoding = "utf-8",
    delimiter: Delimiter = ",",
    annotated: WithColumns = False,
    device: Device = None,
    progress: Progress = True,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Name the examples whose label is likely wrong; needs the labels: --file, --data, or the bank's own texts."""
    from source_proj import curate as library
    from source_proj.attribution.source import Source
    from source_proj.cli import cleanings
    from source_proj.cli.text import label_column_of, own_file

    banks = cleanings.opened(context.params)
    if label_column is None and banks[0].task_spec["name"] == "causal_lm":
        raise ValueError(
            f"{bank[0]} is a language model's bank, whose examples have no classes: name a column of --file that has "
            "some by --label-column, with --by self-influence"
        )
    options = {
        **context.params, "label_column": label_column or label_column_of(bank[0]), "file": file or own_file(bank[0])
    }  # fmt: skip
    delivery = cleanings.delivery(options)
    labels = cleanings.labels(options, banks[0].examples)
    source = Source(banks, device=device, progress=progress)
    delivery.give(library.mislabelled(source, labels, n=n, by=by.value.replace("-", "_")))  # type: ignore[arg-type]


@app.command("duplicates")
@reports_errors
def duplicates(
    context: typer.Context,
    bank: BankPath,
    threshold: Annotated[
        float,
        typer.Option(
            help="Least cosine of two examples' gradients. Of few parameters, as adapters have, many examples are "
            "alike: look at the clusters, and take .999 or more."
        ),
    ] = 0.98,
    data: Data = None,
    file: File = None,
    out: Out = None,
    list: ListFile = None,
    encoding: Encoding = "utf-8",
    delimiter: Delimiter = ",",
    annotated: WithColumns = False,
    overwrite: Overwrite = False,
    progress: Progress = True,
    json: Json = False,
) -> None:
    """Name all but one of each cluster of examples that teach the model the same."""
    from source_proj import curate as library
    from source_proj.cli import cleanings

    delivery = cleanings.delivery(context.params)
    (opened,) = cleanings.opened(context.params)
    delivery.give(library.near_duplicates(opened, threshold=threshold, progress=progress))


@app.command("clean")
@reports_errors
def clean(
    context: typer.Context,
    cleaning: Annotated[Path, typer.Argument(metavar="JSON", help="What --list wrote.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The training set.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where to write it without the dropped examples.")],
    encoding: Encoding = "utf-8",
    delimiter: Delimiter = ",",
    annotated: WithColumns = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write a training set's file without the examples of a list; every other byte stays as it was."""
    from source_proj import curate as library
    from source_proj.cli import cleanings

    delivery = cleanings.delivery(context.params)
    delivery.give(library.Cleaning.load(cleaning))


@app.command("verify")
@reports_errors
def verify(
    cleaning: Annotated[Path, typer.Argument(metavar="JSON", help="What --list wrote.")],
    train: Annotated[
        str, typer.Option(metavar="MODULE:FUNCTION", help="train(kept, seed): trains on the positions kept.")
    ],
    evaluate: Annotated[
        str, typer.Option(metavar="MODULE:FUNCTION", help="evaluate(model): a number, higher is better.")
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Models of each kind; fewer than 3 give no verdict.")] = 5,
    progress: Progress = True,
    json: Json = False,
) -> None:
    """Judge a cleaning by retraining: on all examples, on the kept ones, on as many at random."""
    from source_proj import curate as library
    from source_proj.cli.parsing import load_function
    from source_proj.curate.verification import no_verdict

    functions = load_function(train, "--train"), load_function(evaluate, "--evaluate")
    if missing := no_verdict(seeds):
        typer.echo(missing, err=True)  # before the work, which may take long
    judged = library.verify(library.Cleaning.load(cleaning), *functions, seeds=seeds, progress=progress)
    if json:
        emit(
            {
                "what": judged.cleaning.what,
                "kept": len(judged.cleaning.kept),
                "train": len(judged.cleaning.train_ids),
                "measures": {"all": judged.whole, "kept": judged.cleaned, "random": judged.random},
                "gain": judged.gain._asdict(),
                "gain_over_random": judged.gain_over_random._asdict(),
                "verdict": judged.verdict,
            }
        )
    else:
        say(str(judged))
