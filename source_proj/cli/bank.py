"""``build`` and ``finalize``: fill a bank."""

from enum import StrEnum
from typing import Annotated

import typer

import source_proj.bank as banks
from source_proj.cli.names import (
    load_model,
    load_object,
    make_sketch,
    make_task,
    make_trajectory,
    parse_shard,
)
from source_proj.cli.options import BankPath, BatchSize, Device, Json, Model, Progress
from source_proj.cli.output import emit, reports_errors, say

__all__ = ["build", "finalize"]


class Storage(StrEnum):
    """How rows are stored."""

    int8 = "int8"
    float16 = "float16"
    float32 = "float32"


@reports_errors
def build(
    bank: BankPath,
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Gives the training set: a data set, a DataLoader, or a dict of them by stage name.",
        ),
    ],
    task: Annotated[
        str, typer.Option(help="classification, regression, causal-lm, or module:function for a task of your own.")
    ] = "classification",
    task_option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Option of the task, such as label_smoothing=0.1.")
    ] = None,
    recorder: Annotated[
        str | None, typer.Option(metavar="DIR", help="Directory that source_proj.Recorder wrote.")
    ] = None,
    trajectory: Annotated[
        str | None, typer.Option(metavar="MODULE:FUNCTION", help="Gives a source_proj.Trajectory.")
    ] = None,
    checkpoint: Annotated[
        list[str] | None, typer.Option(metavar="STEP=PATH", help="Weights after STEP optimizer steps; repeat it.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Constant learning rate, with --checkpoint.")] = None,
    momentum: Annotated[float, typer.Option(help="Heavy-ball momentum, with --checkpoint.")] = 0.0,
    weight_decay: Annotated[float, typer.Option(help="L2 coefficient of SGD, with --checkpoint.")] = 0.0,
    segments: Annotated[int | None, typer.Option(min=1, help="Segments of training; score can change it.")] = None,
    sketch_dim: Annotated[int, typer.Option(min=1, help="Numbers kept per example and checkpoint.")] = 4096,
    sketch_kind: Annotated[str, typer.Option(help="sparse, rademacher, kronecker or identity.")] = "sparse",
    sketch_seed: Annotated[int, typer.Option(help="Seed of the projection.")] = 0,
    sketch_nnz: Annotated[int, typer.Option(help="Non-zeros per coordinate of the sparse projection.")] = 1,
    sketch_backend: Annotated[str | None, typer.Option(help="native or torch; default: the fastest present.")] = None,
    storage: Annotated[Storage, typer.Option(help="Type of the stored rows.")] = Storage.int8,
    batch_size: BatchSize = 64,
    parameters: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Parameters to attribute through; !GLOB leaves out.")
    ] = None,
    sampled_fisher: Annotated[int, typer.Option(min=0, help="Draws of labels for the sampled Fisher.")] = 0,
    autocast: Annotated[str | None, typer.Option(help="bfloat16 or float16 for the forward pass.")] = None,
    gradients: Annotated[str, typer.Option(help="auto, hooks or general.")] = "auto",
    shard_rows: Annotated[
        int | None, typer.Option(min=1, help="Rows in a shard, a multiple of the batch size.")
    ] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Do only part I of N (from 0); then run finalize once.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Go on with a bank that was begun.")] = True,
    device: Device = None,
    progress: Progress = True,
    json: Json = False,
) -> None:
    """Sketch the training gradients of every checkpoint into a bank."""
    made = banks.build(
        load_model(model),
        make_task(task, task_option or ()),
        make_trajectory(
            recorder,
            trajectory,
            checkpoint or (),
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            segments=segments,
        ),
        load_object(data, "--data"),
        bank,
        sketch=make_sketch(sketch_dim, sketch_kind, sketch_seed, sketch_nnz, sketch_backend),
        batch_size=batch_size,
        device=device,
        storage=storage.value,
        shard=parse_shard(shard),
        resume=resume,
        progress=progress,
        parameters=parameters,
        sampled_fisher=sampled_fisher,
        autocast=autocast,
        gradients=gradients,
        shard_rows=shard_rows,
    )
    _report(made, json)


@reports_errors
def finalize(bank: BankPath, json: Json = False) -> None:
    """Declare a bank complete after every part of a build in parts is done."""
    made = banks.open(bank)
    made.finalize()
    _report(made, json)


def _report(made: banks.Bank, json: bool) -> None:
    size = sum(made.nbytes().values())
    if json:
        emit({"bank": made.path, "rows": made.n_rows, "finalized": made.finalized, "bytes": size})
    else:
        state = "complete" if made.finalized else "unfinished: build its other parts, then run source-proj finalize"
        say(f"{made.path}: {made.n_rows} rows, {size / 1e6:.1f} MB, {state}")
