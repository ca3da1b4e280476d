"""``curate``: lists of examples to drop or to keep, files without them, and retraining as their judge."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from source_proj import curate
from source_proj._io.outputs import require_free
from source_proj.attribution.source import Source
from source_proj.bank import open as open_bank
from source_proj.cli.options import BankPath, BankPaths, BatchSize, Device, Json, Model, Overwrite, Progress
from source_proj.cli.output import emit, reports_errors, say
from source_proj.cli.parsing import load_function, make_task, needed
from source_proj.cli.text import ask_about
from source_proj.integrations.text_rows import text_rows

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
    typer.Option("--dataset", metavar="FILE", help="Validation set, to a bank that was built from a text file."),
]
GroupColumn = Annotated[
    str | None,
    typer.Option("--group-column", help="Column of --dataset: its groups count alike, whatever their sizes."),
]
WeightColumn = Annotated[str | None, typer.Option("--weight-column", help="Column of --dataset: the queries' weights.")]
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
Delimiter = Annotated[str, typer.Option("--delimiter", help="Of a .csv file.")]
WithColumns = Annotated[
    bool, typer.Option("--annotated", help="Leave all examples in, and add columns (.parquet and folders).")
]
LabelColumn = Annotated[str | None, typer.Option("--label-column", help="Column of the labels in --file.")]


@dataclass(frozen=True)
class _Delivery:
    """Where a cleaning goes."""

    file: Path | None
    out: Path | None
    list: Path | None
    encoding: str
    delimiter: str
    annotated: bool
    overwrite: bool
    json: bool

    def check(self) -> None:
        """Refuse what cannot be written before any work is done.

        Raises:
            ValueError: one of ``--file`` and ``--out`` is missing.
            FileExistsError: something is there that may not be overwritten.
        """
        if self.out is not None and self.file is None:
            raise ValueError("--out needs --file FILE, the training set that is written without the dropped examples")
        for path in (self.out, self.list):
            if path is not None and not path.is_dir():
                require_free(path, overwrite=self.overwrite)

    def give(self, cleaning: curate.Cleaning) -> None:
        """Write what was asked for, and print the rest."""
        if self.list is not None:
            cleaning.save(self.list, overwrite=self.overwrite)
        if self.file is not None and self.out is not None:
            cleaning.write(
                self.file,
                self.out,
                overwrite=self.overwrite,
                encoding=self.encoding,
                delimiter=self.delimiter,
                annotated=self.annotated,
            )
        if self.json:
            emit(
                {
                    "what": cleaning.what,
                    "selects": cleaning.selects,
                    "kept": len(cleaning.kept),
                    "train": len(cleaning.train_ids),
                    "out": self.out,
                    "list": self.list,
                    "examples": [{"id": its_id, "reason": reason} for its_id, reason in cleaning],
                }
            )
            return
        say(str(cleaning))
        for path in (self.out, self.list):
            if path is not None:
                say(f"wrote {path}")


@app.command("harmful")
@reports_errors
def harmful(
    bank: BankPaths,
    model: Model = None,
    queries: Queries = None,
    dataset: Dataset = None,
    group_column: GroupColumn = None,
    weight_column: WeightColumn = None,
    false_share: Annotated[float, typer.Option(help="Expected share of the named that are named by chance.")] = 0.05,
    task: TaskName = None,
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
    delivery = _Delivery(file, out, list, encoding, delimiter, annotated, overwrite, json)
    delivery.check()
    source, data = _asked(bank, model, queries, dataset, task, batch_size, device, progress)
    delivery.give(
        curate.harmful(_aggregate(source, data, dataset, group_column, weight_column), false_share=false_share)
    )


@app.command("drop-worst")
@reports_errors
def drop_worst(
    bank: BankPaths,
    n: Count,
    model: Model = None,
    queries: Queries = None,
    dataset: Dataset = None,
    group_column: GroupColumn = None,
    weight_column: WeightColumn = None,
    label_column: LabelColumn = None,
    task: TaskName = None,
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
    delivery = _Delivery(file, out, list, encoding, delimiter, annotated, overwrite, json)
    delivery.check()
    labels = None if label_column is None else _column(file, label_column)
    source, data = _asked(bank, model, queries, dataset, task, batch_size, device, progress)
    aggregated = _aggregate(source, data, dataset, group_column, weight_column)
    delivery.give(curate.drop_worst(aggregated, n, labels=labels))


@app.command("select")
@reports_errors
def select(
    bank: BankPaths,
    n: Count,
    model: Model = None,
    queries: Queries = None,
    dataset: Dataset = None,
    label_column: LabelColumn = None,
    task: TaskName = None,
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
    delivery = _Delivery(file, out, list, encoding, delimiter, annotated, overwrite, json)
    delivery.check()
    labels = None if label_column is None else _column(file, label_column)
    source, data = _asked(bank, model, queries, dataset, task, batch_size, device, progress)
    delivery.give(curate.select(source, data, n=n, labels=labels))


@app.command("mislabelled")
@reports_errors
def mislabelled(
    bank: BankPaths,
    label_column: Annotated[str, typer.Option(help="Column of the labels in --file.")] = "label",
    n: Annotated[int | None, typer.Option("-n", min=1, help="How many; default: those far from their class.")] = None,
    by: Annotated[By, typer.Option(help="What makes a label suspicious.")] = By.error,
    file: File = None,
    out: Out = None,
    list: ListFile = None,
    encoding: Encoding = "utf-8",
    delimiter: Delimiter = ",",
    annotated: WithColumns = False,
    device: Device = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Name the examples whose label is likely wrong; needs neither model nor queries."""
    delivery = _Delivery(file, out, list, encoding, delimiter, annotated, overwrite, json)
    delivery.check()
    labels = _column(file, label_column)
    source = Source([open_bank(path) for path in bank], device=device, progress=False)
    delivery.give(curate.mislabelled(source, labels, n=n, by=by.value.replace("-", "_")))  # type: ignore[arg-type]


@app.command("duplicates")
@reports_errors
def duplicates(
    bank: BankPath,
    threshold: Annotated[float, typer.Option(help="Least cosine of two examples' gradients.")] = 0.98,
    file: File = None,
    out: Out = None,
    list: ListFile = None,
    encoding: Encoding = "utf-8",
    delimiter: Delimiter = ",",
    annotated: WithColumns = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Name all but one of each cluster of examples that teach the model the same."""
    delivery = _Delivery(file, out, list, encoding, delimiter, annotated, overwrite, json)
    delivery.check()
    delivery.give(curate.near_duplicates(open_bank(bank), threshold=threshold))


@app.command("clean")
@reports_errors
def clean(
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
    delivery = _Delivery(file, out, None, encoding, delimiter, annotated, overwrite, json)
    delivery.check()
    delivery.give(curate.Cleaning.load(cleaning))


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
    seeds: Annotated[int, typer.Option(min=1, help="Models of each kind.")] = 5,
    progress: Progress = True,
    json: Json = False,
) -> None:
    """Judge a cleaning by retraining: on all examples, on the kept ones, on as many at random."""
    functions = load_function(train, "--train"), load_function(evaluate, "--evaluate")
    judged = curate.verify(curate.Cleaning.load(cleaning), *functions, seeds=range(seeds), progress=progress)
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


def _asked(
    banks: list[str],
    model: str | None,
    queries: str | None,
    dataset: Path | None,
    task: str | None,
    batch_size: int,
    device: str | None,
    progress: bool,
) -> tuple[Source, Any]:
    network, data, _ = ask_about(banks[0], model, queries, dataset, False)
    source = Source(
        [open_bank(path) for path in banks],
        model=network,
        task=None if task is None else make_task(task),
        batch_size=batch_size,
        device=device,
        progress=progress,
    )
    return source, data


def _aggregate(
    source: Source, data: Any, dataset: Path | None, group_column: str | None, weight_column: str | None
) -> curate.Aggregate:
    groups, weights = (
        None if name is None else _column(Path(needed(None if dataset is None else str(dataset), "--dataset")), name)
        for name in (group_column, weight_column)
    )
    return curate.aggregate(source, data, groups=groups, weights=None if weights is None else [*map(float, weights)])


def _column(file: Path | None, name: str) -> list[Any]:
    """A column of a file.

    Raises:
        ValueError: there is no such column, or a record has nothing in it.
    """
    if file is None:
        raise ValueError(f"the labels are in no file: give --file FILE, whose column {name!r} holds them")
    called, rows = text_rows(file)
    values = [row.get(name) for row in rows]
    if None in values:
        place = values.index(None)
        raise ValueError(f"example {place + 1} of {called} has no {name!r}, only {sorted(map(str, rows[place]))}")
    return values
