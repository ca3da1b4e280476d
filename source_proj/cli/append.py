"""``append``: add training examples to a bank."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from source_proj.cli.options import (
    RUNNING,
    TEXT,
    BankPath,
    BatchSize,
    Device,
    Json,
    Model,
    Progress,
    ShardRows,
    TrustRemoteCode,
)
from source_proj.cli.output import emit, reports_errors, say

if TYPE_CHECKING:
    from torch import nn

__all__ = ["append"]


@reports_errors
def append(
    bank: BankPath,
    model: Model = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FUNCTION", help="Gives the new examples: a data set or a DataLoader."),
    ] = None,
    dataset: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The new examples as .jsonl, .csv or .parquet, for a bank that was built from a text file.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(metavar="MODULE:FUNCTION", help="Gives the bank's task, where it is one of your own.")
    ] = None,
    stage: Annotated[str | None, typer.Option(help="Name of the stage that they belong to; default: the last.")] = None,
    batch_size: BatchSize = 64,
    shard_rows: ShardRows = None,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Do only part I of N (from 0); then run finalize.", rich_help_panel=RUNNING),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = None,
    progress: Progress = True,
    json: Json = False,
) -> None:
    """Add training examples to a bank: their gradients alone are computed, and what is there stays as it is.

    A killed append goes on where it was when the command is given again; one that is done already adds nothing. By
    torchrun, Slurm or any launcher that sets SOURCE_PROJ_SHARD=I/N each process does its share; then run finalize.
    """
    import source_proj.bank as banks
    from source_proj.cli.parsing import load_model, load_object, make_task, needed
    from source_proj.cli.text import note_appended
    from source_proj.distribute import this_worker
    from source_proj.distribute.launch import parse_shard
    from source_proj.integrations.text_bank import TextBank
    from source_proj.task import Task

    made, worker, texts = banks.open(bank), this_worker(), None
    network: nn.Module
    if dataset is None:
        names = needed(model, "--model"), needed(data, "--data")
        network, examples = load_model(names[0]), load_object(names[1], "--data")
    elif model is not None or data is not None:
        raise ValueError("--model and --data have no meaning beside --dataset: leave one or the other out")
    else:
        own = TextBank(bank, trust_remote_code=trust_remote_code)
        network, texts = own.model, own.read(dataset, labelled=True)
        examples = texts
    share = worker.shard if worker.count > 1 else None
    added = made.append(
        network,
        Task.from_spec(made.task_spec) if task is None else make_task(task, ()),
        examples,
        stage=-1 if stage is None else stage,
        batch_size=batch_size,
        device=device or worker.device,
        shard=share if shard is None else parse_shard(shard, "--shard"),
        shard_rows=shard_rows,
        progress=progress and worker.local_index == 0,
    )
    if texts is not None and dataset is not None and worker.index == 0:
        note_appended(bank, dataset, texts, len(made.ids))
    if worker.local_index:
        return
    if json:
        emit({"bank": made.path, "appended": added, "examples": len(made.ids), "finalized": made.finalized})
    else:
        rest = "append its other parts, then run" if made.missing() else "all rows are there, run"
        state = "" if made.finalized else f", unfinished: {rest} source-proj finalize"
        say(f"{made.path}: {added} examples appended, {len(made.ids)} in all{state}")
