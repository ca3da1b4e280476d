"""Options that several commands share, and the panels that their help is laid out in."""

from enum import StrEnum
from typing import Annotated

import typer

__all__ = [
    "ASKED",
    "METHOD",
    "OUTPUT",
    "RUNNING",
    "SKETCH",
    "TEXT",
    "TRAINED",
    "BankPath",
    "BankPaths",
    "BatchSize",
    "Curvature",
    "Dask",
    "Device",
    "Json",
    "Method",
    "Model",
    "Most",
    "Overwrite",
    "Progress",
    "QueryGradient",
    "ShardRows",
    "TrustRemoteCode",
    "Workers",
]

ASKED = "What is asked"
METHOD = "Method"
TRAINED = "The training run"
TEXT = "Model and data as files"
SKETCH = "Sketch and storage"
OUTPUT = "Output"
RUNNING = "Running"


class Method(StrEnum):
    """Attribution methods."""

    source = "source"
    tracin = "tracin"
    hydra = "hydra"
    trak = "trak"
    influence = "influence"
    arnoldi = "arnoldi"
    datainf = "datainf"
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


class Most(StrEnum):
    """Which training examples are shown."""

    helpful = "helpful"
    harmful = "harmful"


BankPath = Annotated[
    str, typer.Argument(metavar="BANK", help="The bank's directory, or its URL: s3://bucket/bank, gs://…, az://….")
]
BankPaths = Annotated[
    list[str],
    typer.Argument(metavar="BANK", help="The bank's directory or URL; scores are averaged over several."),
]
BatchSize = Annotated[
    int,
    typer.Option("--batch-size", min=1, help="Examples in one forward and backward pass.", rich_help_panel=RUNNING),
]
Device = Annotated[
    str | None, typer.Option("--device", help="Where to compute, such as cpu or cuda.", rich_help_panel=RUNNING)
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers", min=1, metavar="N", help="Processes of this machine that share the bank.", rich_help_panel=RUNNING
    ),
]
Dask = Annotated[
    str | None,
    typer.Option(
        "--dask",
        metavar="ADDRESS",
        help="A Dask scheduler whose workers share the bank: tcp://host:8786.",
        rich_help_panel=RUNNING,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.", rich_help_panel=OUTPUT)
]
Model = Annotated[
    str | None, typer.Option("--model", metavar="MODULE:FUNCTION", help="Gives the model; its code is used.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there already.", rich_help_panel=OUTPUT)]
Progress = Annotated[
    bool,
    typer.Option("--progress/--no-progress", help="Progress bars on standard error.", rich_help_panel=RUNNING),
]
ShardRows = Annotated[
    int | None, typer.Option(min=1, help="Rows in a shard, a multiple of the batch size.", rich_help_panel=RUNNING)
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Let transformers run Python code that lies in the model's directory.",
        rich_help_panel=RUNNING,
    ),
]
