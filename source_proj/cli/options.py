"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "BankPath",
    "BankPaths",
    "BatchSize",
    "Device",
    "Json",
    "Model",
    "Overwrite",
    "Progress",
    "TrustRemoteCode",
]

BankPath = Annotated[Path, typer.Argument(metavar="BANK", help="The bank's directory.")]
BankPaths = Annotated[
    list[Path], typer.Argument(metavar="BANK...", help="The bank's directory; scores are averaged over several.")
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Examples in one forward and backward pass.")]
Device = Annotated[str | None, typer.Option("--device", help="Where to compute, such as cpu or cuda.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]
Model = Annotated[
    str | None, typer.Option("--model", metavar="MODULE:FUNCTION", help="Gives the model; its code is used.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there already.")]
Progress = Annotated[bool, typer.Option("--progress/--no-progress", help="Progress bars on standard error.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Let transformers run Python code that lies in the model's directory."),
]
