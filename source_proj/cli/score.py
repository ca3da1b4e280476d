"""``score`` and ``top-k``: ask a bank."""

import csv
import functools
import inspect
import io
import json as json_format
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
import typer
from torch import nn

from source_proj._io.outputs import require_free, write_output, write_outputs
from source_proj._io.printable import csv_cell
from source_proj.attribution.attributor import Attributor
from source_proj.attribution.hits import Hits
from source_proj.attribution.methods import GradCos, GradDot, Hydra, InfluenceFunction, TracIn, Trak
from source_proj.attribution.scores import FACTS, Scores, is_scores_array
from source_proj.attribution.source import Source
from source_proj.bank import open as open_bank
from source_proj.cli.options import BankPaths, BatchSize, Device, Json, Model, Overwrite, Progress, TrustRemoteCode
from source_proj.cli.output import emit, reports_errors, say, table
from source_proj.cli.parsing import make_task, parse_damping, parse_segments
from source_proj.cli.text import ask_about

__all__ = ["score", "top_k"]


class Method(StrEnum):
    """Attribution methods."""

    source = "source"
    tracin = "tracin"
    hydra = "hydra"
    trak = "trak"
    influence = "influence"
    grad_dot = "grad-dot"
    grad_cos = "grad-cos"


class Curvature(StrEnum):
    """How the Hessian is estimated."""

    empirical_fisher = "empirical-fisher"
    gauss_newton = "gauss-newton"
    sampled_fisher = "sampled-fisher"


class QueryGradient(StrEnum):
    """Where a query's gradient is taken."""

    mean = "mean"
    final = "final"


_METHODS: dict[Method, Callable[..., Attributor]] = {
    Method.source: Source,
    Method.tracin: TracIn,
    Method.hydra: Hydra,
    Method.trak: Trak,
    Method.influence: InfluenceFunction,
    Method.grad_dot: GradDot,
    Method.grad_cos: GradCos,
}
Queries = Annotated[
    str | None,
    typer.Option("--queries", metavar="MODULE:FUNCTION", help="Gives the queries: a data set or a DataLoader."),
]
Dataset = Annotated[
    Path | None,
    typer.Option("--dataset", metavar="FILE", help="Queries as .jsonl or .csv, to a bank that was built from one."),
]
PerToken = Annotated[bool, typer.Option("--per-token", help="One query for each token of the texts in --dataset.")]
MethodOption = Annotated[Method, typer.Option("--method", help="Attribution method.")]
TaskName = Annotated[
    str | None, typer.Option("--task", metavar="MODULE:FUNCTION", help="The bank's task, if it is one of your own.")
]
SegmentsOption = Annotated[
    str | None, typer.Option("--segments", help="Number of segments, or JSON such as [[0,1],[2]]; default: the bank's.")
]
CurvatureOption = Annotated[
    Curvature | None,
    typer.Option("--curvature", help="Hessian estimate; default: gauss-newton for regression, else empirical-fisher."),
]
DampingOption = Annotated[str | None, typer.Option("--damping", help="noise (default: by formula), off, or a number.")]
AverageOption = Annotated[
    bool, typer.Option("--average", help="Influence functions with gradients averaged over the checkpoints.")
]
QueryGradientOption = Annotated[
    QueryGradient | None,
    typer.Option("--query-gradient", help="At the final weights, or the mean over checkpoints (source's default)."),
]
RidgeOption = Annotated[float | None, typer.Option("--ridge", min=0, help="TRAK's, added to its eigenvalues.")]


@reports_errors
def score(
    bank: BankPaths,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Where to write: .npy (ids in NAME.npy.json), .zarr or .csv.")
    ],
    model: Model = None,
    queries: Queries = None,
    dataset: Dataset = None,
    per_token: PerToken = False,
    method: MethodOption = Method.source,
    segments: SegmentsOption = None,
    curvature: CurvatureOption = None,
    damping: DampingOption = None,
    average: AverageOption = False,
    query_gradient: QueryGradientOption = None,
    ridge: RidgeOption = None,
    task: TaskName = None,
    trust_remote_code: TrustRemoteCode = False,
    batch_size: BatchSize = 64,
    device: Device = None,
    progress: Progress = True,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write the scores of all training examples for all queries."""
    write = _writer(out, overwrite)
    network, data = ask_about(bank[0], model, queries, dataset, per_token, trust_remote_code)
    asked = _attributor(
        bank,
        network,
        method,
        segments,
        curvature,
        damping,
        average,
        query_gradient,
        ridge,
        task,
        batch_size,
        device,
        progress,
    )
    scores = asked.score(data)
    write(scores)
    count, rows = scores.shape
    if json:
        emit({"out": out, "queries": count, "train": rows, "unit": scores.unit, "sign": _SIGN, "method": method.value})
    else:
        say(f"{out}: {count} queries x {rows} training examples, in units of the {scores.unit}; {_SIGN}")


@reports_errors
def top_k(
    bank: BankPaths,
    model: Model = None,
    queries: Queries = None,
    dataset: Dataset = None,
    per_token: PerToken = False,
    k: Annotated[int, typer.Option("-k", min=1, help="Training examples per query.")] = 10,
    lowest: Annotated[bool, typer.Option("--lowest", help="The lowest scores instead of the highest.")] = False,
    method: MethodOption = Method.source,
    segments: SegmentsOption = None,
    curvature: CurvatureOption = None,
    damping: DampingOption = None,
    average: AverageOption = False,
    query_gradient: QueryGradientOption = None,
    ridge: RidgeOption = None,
    task: TaskName = None,
    trust_remote_code: TrustRemoteCode = False,
    batch_size: BatchSize = 64,
    device: Device = None,
    progress: Progress = True,
    json: Json = False,
) -> None:
    """Print the training examples with the highest (or lowest) scores of each query."""
    network, data = ask_about(bank[0], model, queries, dataset, per_token, trust_remote_code)
    asked = _attributor(
        bank,
        network,
        method,
        segments,
        curvature,
        damping,
        average,
        query_gradient,
        ridge,
        task,
        batch_size,
        device,
        progress,
    )
    hits: Hits = asked.bottom_k(data, k) if lowest else asked.top_k(data, k)
    if json:
        emit({"unit": hits.unit, "sign": _SIGN, "method": method.value, "queries": [_entry(*hit) for hit in hits]})
        return
    rows = [
        [query, rank, _word(train_id), f"{value:+.4g}"]
        for query, entries in hits
        for rank, (train_id, value) in enumerate(entries, start=1)
    ]
    say(table(["query", "rank", "training id", f"score ({hits.unit})"], rows))


_SIGN = "positive: including the example raised the measurement"


def _attributor(
    paths: list[Path],
    model: nn.Module,
    method: Method,
    segments: str | None,
    curvature: Curvature | None,
    damping: str | None,
    average: bool,
    query_gradient: QueryGradient | None,
    ridge: float | None,
    task: str | None,
    batch_size: int,
    device: str | None,
    progress: bool,
) -> Attributor:
    asked: list[tuple[str, Any, Callable[[Any], Any]]] = [
        ("segments", segments, parse_segments),
        ("curvature", curvature, lambda chosen: chosen.value.replace("-", "_")),
        ("damping", damping, parse_damping),
        ("average", average or None, bool),
        ("query_gradient", query_gradient, str),
        ("ridge", ridge, float),
    ]
    options = {name: read(word) for name, word, read in asked if word is not None}
    known = inspect.signature(_METHODS[method]).parameters
    for name in options:
        if name not in known:
            raise ValueError(f"--{name.replace('_', '-')} has no meaning for --method {method.value}; leave it out")
    return _METHODS[method](
        [open_bank(path) for path in paths],
        model=model,
        task=None if task is None else make_task(task),
        batch_size=batch_size,
        device=device,
        progress=progress,
        **options,
    )


def _writer(out: Path, overwrite: bool) -> Callable[[Scores], None]:
    """Choose by the name's ending, and refuse what is there, before any work is done."""
    writers = {".npy": _write_npy, ".zarr": _write_zarr, ".csv": _write_csv}
    if out.suffix not in writers:
        raise ValueError(f"--out must end in one of {', '.join(writers)}, got {str(out)!r}")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {str(out)!r}: the directory {str(out.parent)!r} does not exist")
    replaceable = is_scores_array if out.suffix == ".zarr" else _replaceable
    for path in [out, *([_facts_path(out)] if out.suffix == ".npy" else [])]:
        require_free(path, overwrite=overwrite, replaceable=replaceable)
    return functools.partial(writers[out.suffix], out=out, overwrite=overwrite)


def _write_npy(scores: Scores, out: Path, overwrite: bool) -> None:
    facts = {
        "query_ids": [_word(query_id) for query_id in scores.query_ids],
        "train_ids": [_word(train_id) for train_id in scores.train_ids],
        "unit": scores.unit,
        "sign": _SIGN,
        "higher_is_better": scores.higher_is_better,
    }
    words = json_format.dumps(facts).encode()
    write_outputs(
        {_facts_path(out): words, out: lambda file: np.save(file, scores.to_numpy())},
        overwrite=overwrite,
        replaceable=_replaceable,
    )


def _facts_path(out: Path) -> Path:
    """Where the ids, unit and sign of an array in ``out`` are written."""
    return out.with_name(f"{out.name}.json")


def _replaceable(path: Path) -> bool:
    """Whether a file may be replaced: one that the user named, or one of facts that was written beside such a one."""
    if path.suffix != ".json" or not path.is_file():
        return path.is_file()
    try:
        facts = json_format.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(facts, dict) and set(facts) == FACTS


def _write_zarr(scores: Scores, out: Path, overwrite: bool) -> None:
    scores.to_zarr(out, overwrite=overwrite)


def _write_csv(scores: Scores, out: Path, overwrite: bool) -> None:
    def write(file: BinaryIO) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        lines = csv.writer(text)
        lines.writerow(["query", *(csv_cell(_word(train_id)) for train_id in scores.train_ids)])
        for query, values in zip(scores.query_ids, scores.values, strict=True):
            lines.writerow([csv_cell(_word(query)), *map(str, values)])
        text.flush()
        text.detach()

    write_output(out, write, overwrite=overwrite)


def _entry(query: Any, hits: list[tuple[Any, float]]) -> dict[str, Any]:
    return {"query": _plain(query), "train": [{"id": _plain(train_id), "score": value} for train_id, value in hits]}


def _plain(given: Any) -> Any:
    """An id as JSON can hold it."""
    return given.item() if isinstance(given, np.generic) else list(given) if isinstance(given, tuple) else given


def _word(given: Any) -> Any:
    """An id in one word: (stage, id) becomes stage/id."""
    return "/".join(map(str, given)) if isinstance(given, tuple) else _plain(given)
