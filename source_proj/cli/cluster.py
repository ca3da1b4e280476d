"""``status`` and ``submit``: builds by many processes, on this machine or a cluster."""

import os
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from source_proj.cli.jobs import Command, parse_options, submit_job
from source_proj.cli.options import BankPath, Json
from source_proj.cli.output import emit, reports_errors, say, table

if TYPE_CHECKING:
    from source_proj.distribute import Status

__all__ = ["show_status", "submit"]


@reports_errors
def show_status(bank: BankPath, json: Json = False) -> None:
    """Say how far a build has come, from any process: rows, rate, time left, dead workers."""
    from source_proj.distribute import status

    now = status(bank)
    if json:
        summary = {"rate": now.rate, "seconds_left": now.seconds_left, "dead": len(now.dead)}
        emit({**asdict(now), **summary})
    else:
        say(_line(now))
        if now.workers:
            say(_workers(now))


@reports_errors
def submit(
    context: typer.Context,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of each machine, one worker each.")] = 0,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    tasks: Annotated[
        int | None, typer.Option(min=1, help="Workers on each machine; default: one for each GPU, or one.")
    ] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="Cores of each worker.")] = None,
    memory: Annotated[int | None, typer.Option(min=1, metavar="GB", help="Memory of each machine.")] = None,
    hours: Annotated[float, typer.Option(min=0, help="Time limit of a job; it is requeued when it ends.")] = 24.0,
    partition: Annotated[str | None, typer.Option(help="Slurm's partition.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Further option of sbatch, such as account=us.")
    ] = None,
    logs: Annotated[Path, typer.Option(help="Folder of the jobs' scripts and logs, which all machines see.")] = Path(
        "source-proj-jobs"
    ),
    local: Annotated[bool, typer.Option("--local", help="Run it on this machine, without Slurm.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Return when the job has ended.")] = False,
    json: Json = False,
) -> None:
    """Hand a command to Slurm: source-proj submit --gpus 8 --partition train build BANK ...; requeued when preempted.

    The command stands behind submit's own options. It runs in this directory, with this Python.
    """
    parameters = {
        "nodes": nodes,
        "tasks_per_node": tasks or gpus or 1,
        "gpus_per_node": gpus or None,
        "cpus_per_task": cpus,
        "mem_gb": memory,
        "timeout_min": max(1, round(60 * hours)),
        "slurm_partition": partition,
        "slurm_additional_parameters": parse_options(option or ()) or None,
    }
    job = submit_job(Command(context.obj, context.args), logs, parameters, local=local)
    if json:
        emit({"job": job.job_id, "logs": os.fspath(logs)})
    else:
        say(f"job {job.job_id} submitted; logs in {logs}; source-proj status BANK says how far it is")
    if wait:
        job.results()


def _line(now: "Status") -> str:
    share = 100 * now.rows_done / now.rows
    text = f"{now.path}: {now.rows_done} of {now.rows} rows ({share:.1f} %)"
    if now.finalized:
        return f"{text}, finalized"
    if now.seconds_left is not None:
        text += f", {now.rate:.0f} rows/s, {timedelta(seconds=round(now.seconds_left))} left"
    return f"{text}, {len(now.workers) - len(now.dead)} workers at work, {len(now.dead)} dead"


def _workers(now: "Status") -> str:
    rows = [
        [f"{worker.shard[0]}/{worker.shard[1]}", worker.host, worker.pid, worker.rows, f"{worker.rate:.1f}",
         f"{worker.silent:.0f}", "dead" if worker.dead else "at work"]
        for worker in now.workers
    ]  # fmt: skip
    return table(["share", "host", "process", "rows", "rows/s", "seconds silent", "state"], rows)
