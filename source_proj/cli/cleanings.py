"""What the commands of ``curate`` share: who is asked, what columns say, and where a cleaning goes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from source_proj import curate
from source_proj._errors import MismatchError
from source_proj._io.outputs import refused_together, require_free
from source_proj.attribution.source import Source
from source_proj.bank import Bank
from source_proj.bank import open as open_bank
from source_proj.bank.examples import Examples
from source_proj.cli.answers import require_folder
from source_proj.cli.asking import named_examples, training_examples
from source_proj.cli.output import emit, say
from source_proj.cli.parsing import make_task
from source_proj.cli.text import ask_about, require_own_records
from source_proj.curate.files import require_writable
from source_proj.integrations.text_bank import TextBank
from source_proj.integrations.text_rows import lacking, text_rows

__all__ = ["Delivery", "aggregate", "asked", "delivery", "labels", "opened"]


@dataclass(frozen=True)
class Delivery:
    """Where a cleaning goes."""

    file: Path | None
    out: Path | None
    list: Path | None
    encoding: str
    delimiter: str
    annotated: bool
    overwrite: bool
    json: bool

    def give(self, cleaning: curate.Cleaning) -> None:
        """Write what was asked for, and print the rest."""
        if self.file is not None and self.out is not None:
            cleaning.write(
                self.file,
                self.out,
                overwrite=self.overwrite,
                encoding=self.encoding,
                delimiter=self.delimiter,
                annotated=self.annotated,
            )
        if self.list is not None:
            cleaning.save(self.list, overwrite=self.overwrite)
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


def delivery(options: Mapping[str, Any]) -> Delivery:
    """Where a command's options say that its cleaning goes; refuses what cannot be written before any work is done.

    Raises:
        ValueError: one of ``--file`` and ``--out`` is missing, or what is to be written is the training set itself, of
            another kind, or one file twice.
        FileExistsError: something is there that may not be overwritten.
        FileNotFoundError: the training set is not there, or the folder to write into.
        MismatchError: its records are not those that the bank was built from.
    """
    chosen: dict[str, Any] = {field.name: options.get(field.name) for field in fields(Delivery)}  # clean has no --list
    goal = Delivery(**chosen)
    if goal.out is not None and goal.file is None:
        raise ValueError("--out needs --file FILE, the training set that is written without the dropped examples")
    if goal.annotated and goal.out is None:
        raise ValueError("--annotated needs --out, where --file is written with new columns")
    if goal.file is not None and goal.out is None and options.get("label_column") is None:
        raise ValueError("--file needs --out, where it is written without the dropped examples")
    if goal.out is not None and goal.list is not None and goal.out.resolve() == goal.list.resolve():
        raise ValueError(f"--out and --list are both {goal.out}: give each a file of its own")
    for flag, path in (("--out", goal.out), ("--list", goal.list)):
        if path is None:
            continue
        require_folder(flag, path)
        if goal.file is not None and path.exists() and goal.file.exists():
            _require_another(path, goal.file, flag)
    _require_room(goal)
    _require_own(goal, options.get("bank"))
    return goal


def _require_room(goal: Delivery) -> None:
    """Refuse outputs that are there already, all of them in one message.

    Raises:
        FileExistsError: names them.
    """
    checks: list[Callable[[], None]] = []
    if goal.list is not None:
        checks.append(partial(require_free, goal.list, overwrite=goal.overwrite))
    if goal.file is not None and goal.out is not None:
        room = partial(require_writable, goal.file, goal.out, annotated=goal.annotated, overwrite=goal.overwrite)
        checks.append(room)
    refused_together(*checks)


def _require_own(goal: Delivery, bank: str | Sequence[str] | None) -> None:
    """Refuse another training set than the banks', of which other records would be dropped."""
    if goal.file is not None and bank is not None:
        first = bank if isinstance(bank, str) else bank[0]
        require_own_records(first, goal.file, encoding=goal.encoding, delimiter=goal.delimiter)


def _require_another(path: Path, file: Path, flag: str) -> None:
    """Refuse to write over the training set, also with ``--overwrite``: it may be the only one there is."""
    if path.samefile(file):
        raise ValueError(f"{path} is the training set itself, which is never replaced: give another {flag}")


def opened(options: Mapping[str, Any], texts: TextBank | None = None) -> list[Bank]:
    """The banks that a command names; the first knows how its examples are shown."""
    paths = [options["bank"]] if isinstance(options["bank"], str) else options["bank"]
    banks = [open_bank(path) for path in paths]
    banks[0].examples = training_examples(paths[0], banks[0].n_rows, options["data"], texts=texts)
    return banks


def asked(options: Mapping[str, Any]) -> tuple[Source, Any]:
    """SOURCE on the banks, and the queries that a command's options name."""
    banks, task = options["bank"], options["task"]
    network, data, texts = ask_about(banks[0], options["model"], options["queries"], options["dataset"], False)
    source = Source(
        opened(options, texts),
        model=network,
        task=None if task is None else make_task(task),
        batch_size=options["batch_size"],
        device=options["device"],
        progress=options["progress"],
    )
    return source, data


def aggregate(
    source: Source, data: Any, dataset: Path | None, group_column: str | None, weight_column: str | None
) -> curate.Aggregate:
    """The scores summed up, the groups and weights taken from columns of ``--dataset``."""
    groups, weights = (
        None if name is None else column(_of_dataset(dataset, name, of), name, of)
        for name, of in ((group_column, "--group-column"), (weight_column, "--weight-column"))
    )
    return curate.aggregate(source, data, groups=groups, weights=None if weights is None else _numbers(weights))


def _of_dataset(dataset: Path | None, name: str, option: str) -> Path:
    """The file that a column is named of.

    Raises:
        ValueError: there is none.
    """
    if dataset is None:
        raise ValueError(
            f"{option} {name!r} names a column of --dataset, and there is none: give the validation set by --dataset "
            f"FILE, or leave {option} out (in Python source_proj.curate.aggregate takes groups= and weights= as lists)"
        )
    return dataset


def _numbers(values: Sequence[Any]) -> list[float]:
    """The queries' weights.

    Raises:
        MismatchError: one is no number.
    """
    numbers = []
    for place, value in enumerate(values, start=1):
        try:
            numbers.append(float(value))
        except (TypeError, ValueError):
            raise MismatchError(f"the weight of query {place} is {value!r}, and a number is needed") from None
    return numbers


def labels(options: Mapping[str, Any], examples: Examples | None = None) -> list[Any]:
    """The training set's labels: of ``--file``, as it is written there, or of the examples of ``--data``.

    Args:
        options: those of the command, by name.
        examples: those of ``--data``, where they were loaded already.

    Raises:
        ValueError: neither is named.
        MismatchError: as `column`, or an example has no label.
    """
    name, file = options["label_column"], options["file"]
    if file is None and options["data"] is not None:
        shown = named_examples(options["data"]) if examples is None else examples
        found = [label for _, label in shown.searched()]
        if "" in found:
            place = f"example {found.index('')} of --data {options['data']!r}"
            raise MismatchError(f"{place} has no label: give the training set with its")
        return found
    if file is None:
        raise ValueError(
            f"the labels are not known: give --file FILE, whose column {name!r} holds them, or --data MODULE:FUNCTION, "
            "the training set with its labels"
        )
    return column(file, name, "--label-column", encoding=options["encoding"], delimiter=options["delimiter"])


def column(file: Path, name: str, option: str, *, encoding: str = "utf-8", delimiter: str = ",") -> list[Any]:
    """A column of a file, which an option names.

    Raises:
        MismatchError: there is no such column, or a record has nothing in it, as an empty cell of a table.
    """
    called, rows = text_rows(file, encoding=encoding, delimiter=delimiter)
    values = [row.get(name) for row in rows]
    for place, value in enumerate(values):
        if value is None or value == "":
            raise lacking(name, rows[place], place + 1, called, option)
    return values
