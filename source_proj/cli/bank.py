"""``build`` and ``finalize``: fill a bank."""

import inspect
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from source_proj.cli.options import (
    RUNNING,
    SKETCH,
    TEXT,
    TRAINED,
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
    from source_proj.bank import Bank
    from source_proj.distribute import Plan

__all__ = ["build", "finalize", "plan"]


@reports_errors
def build(
    context: typer.Context,
    bank: BankPath,
    model: Model = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Gives the training set: a data set, a DataLoader, or a dict of them by stage name.",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="classification, regression, causal-lm, or module:function for a task of your own; default: by "
            "--hf-model, or classification."
        ),
    ] = None,
    task_option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Option of the task, such as label_smoothing=0.1.")
    ] = None,
    recorder: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Directory that source_proj.Recorder wrote.", rich_help_panel=TRAINED),
    ] = None,
    trajectory: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FUNCTION", help="Gives a source_proj.Trajectory.", rich_help_panel=TRAINED),
    ] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STEP=PATH", help="Weights after STEP optimizer steps; repeat it.", rich_help_panel=TRAINED
        ),
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Constant learning rate, with --checkpoint.", rich_help_panel=TRAINED)
    ] = None,
    momentum: Annotated[
        float | None,
        typer.Option(
            help="Heavy-ball momentum, with --checkpoint, or where --hf-run does not tell.", rich_help_panel=TRAINED
        ),
    ] = None,
    weight_decay: Annotated[
        float, typer.Option(help="L2 coefficient of SGD, with --checkpoint.", rich_help_panel=TRAINED)
    ] = 0.0,
    hf_run: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="A Trainer's output_dir, or that of RecorderCallback.", rich_help_panel=TRAINED
        ),
    ] = None,
    hf_model: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Pretrained model and tokenizer; default: the run's last checkpoint.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    dataset: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Training set for --hf-model's tokenizer: .jsonl, .csv, .tsv, .parquet or a folder of datasets.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    text_column: Annotated[
        str, typer.Option(help="Column of the text, with --dataset.", rich_help_panel=TEXT)
    ] = "text",
    label_column: Annotated[
        str, typer.Option(help="Column of the class, with --dataset.", rich_help_panel=TEXT)
    ] = "label",
    prompt_column: Annotated[
        str | None,
        typer.Option(
            help="Column of what stands before the text and is not counted, with --dataset.", rich_help_panel=TEXT
        ),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an example, with --dataset.", rich_help_panel=TEXT)
    ] = None,
    text_pair_column: Annotated[
        str | None, typer.Option(help="Column of the second text of a pair, with --dataset.", rich_help_panel=TEXT)
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Steps of the checkpoints of --hf-run to use; default: all.",
            rich_help_panel=TRAINED,
        ),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate, if --hf-run does not tell.", rich_help_panel=TRAINED)
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="lr_scheduler_type, if --hf-run does not tell.", rich_help_panel=TRAINED)
    ] = None,
    schedule_options: Annotated[
        str | None,
        typer.Option(
            metavar="JSON", help='lr_scheduler_kwargs of --schedule: {"min_lr": 1e-6}.', rich_help_panel=TRAINED
        ),
    ] = None,
    warmup_steps: Annotated[
        int | None, typer.Option(min=0, help="Warm-up, if --hf-run does not tell.", rich_help_panel=TRAINED)
    ] = None,
    max_grad_norm: Annotated[
        float | None,
        typer.Option(min=0, help="Of --hf-run, instead of the run's own; 0: none.", rich_help_panel=TRAINED),
    ] = None,
    accumulation: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of --hf-run with a loss of its own: micro-batches summed undivided before a step.",
            rich_help_panel=TRAINED,
        ),
    ] = None,
    preconditioner: Annotated[
        str | None,
        typer.Option(
            help="scalar, factored, shared, per_segment, factored_per_segment or none: Adam's P, with --hf-run; "
            "none takes gradients as they are, and needs no optimizer.pt.",
            rich_help_panel=TRAINED,
        ),
    ] = None,
    segments: Annotated[
        int | None, typer.Option(min=1, help="Segments of training; score can change it.", rich_help_panel=TRAINED)
    ] = None,
    sketch_dim: Annotated[
        int, typer.Option(min=1, help="Numbers kept per example and checkpoint.", rich_help_panel=SKETCH)
    ] = 4096,
    sketch_kind: Annotated[
        str, typer.Option(help="tensor, sparse, rademacher, kronecker or identity.", rich_help_panel=SKETCH)
    ] = "tensor",
    sketch_seed: Annotated[int, typer.Option(help="Seed of the projection.", rich_help_panel=SKETCH)] = 0,
    sketch_nnz: Annotated[
        int, typer.Option(help="Non-zeros per coordinate of the sparse projection.", rich_help_panel=SKETCH)
    ] = 1,
    sketch_backend: Annotated[
        str | None, typer.Option(help="native or torch; default: the fastest present.", rich_help_panel=SKETCH)
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            show_default="int8, int4 above 4096 numbers, int2 above 8192",
            rich_help_panel=SKETCH,
            help="How rows are stored: int8, int4, int2, int1, float16 or float32.",
        ),
    ] = None,
    batch_size: BatchSize = 64,
    parameters: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Parameters to attribute through; !GLOB leaves out.", rich_help_panel=SKETCH),
    ] = None,
    parameter_weights: Annotated[
        str | None,
        typer.Option(
            show_default="agreement for language models, else none",
            rich_help_panel=SKETCH,
            help="agreement: less of parameters on whose gradients checkpoints disagree; none; or GLOB=NUMBER,...",
        ),
    ] = None,
    sampled_fisher: Annotated[
        int | None,
        typer.Option(
            min=0,
            show_default="1 for language models, else 0",
            rich_help_panel=SKETCH,
            help="Draws of labels for the sampled Fisher.",
        ),
    ] = None,
    autocast: Annotated[
        str | None, typer.Option(help="bfloat16 or float16 for the forward pass.", rich_help_panel=SKETCH)
    ] = None,
    gradients: Annotated[str, typer.Option(help="auto, hooks or general.", rich_help_panel=SKETCH)] = "auto",
    shard_rows: ShardRows = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Do only part I of N (from 0), and not what others leave; then run finalize.",
            rich_help_panel=RUNNING,
        ),
    ] = None,
    takeover: Annotated[
        float,
        typer.Option(
            help="Seconds without progress after which another worker of this bank is taken for dead.",
            rich_help_panel=RUNNING,
        ),
    ] = 300.0,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with a bank that was begun.", rich_help_panel=RUNNING)
    ] = True,
    plan_for: Annotated[
        int,
        typer.Option(
            "--workers",
            min=0,
            help="Of source-proj plan: processes that will share the work.",
            rich_help_panel=RUNNING,
        ),
    ] = 0,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = None,
    progress: Progress = True,
    json: Json = False,
) -> None:
    """Sketch the training gradients of every checkpoint into a bank.

    Run it as often as there are devices, by torchrun, Slurm or any launcher that sets SOURCE_PROJ_SHARD=I/N: all
    processes build one bank together, and make what others leave that died.
    """
    import source_proj.bank as banks
    from source_proj.cli.parsing import make_sketch, make_trajectory, parse_json, parse_steps, parse_weights
    from source_proj.cli.text import TextOptions, is_complete
    from source_proj.distribute import this_worker
    from source_proj.distribute.launch import parse_shard
    from source_proj.trajectory.placement import placement_of

    if plan_for and context.info_name != "plan":
        raise ValueError(
            "--workers is for source-proj plan; to build by several processes call build once in each: by a launcher "
            "such as torchrun, or with SOURCE_PROJ_SHARD=I/N"
        )
    chosen_steps, worker = parse_steps(steps), this_worker()
    alone = None if shard is None else parse_shard(shard, "--shard")
    text = TextOptions(
        hf_model,
        hf_run,
        dataset,
        text_column,
        label_column,
        prompt_column,
        max_length,
        text_pair_column,
        chosen_steps,
        trust_remote_code,
    )
    run = {
        "learning_rate": learning_rate,
        "schedule": schedule,
        "schedule_options": parse_json(schedule_options, "--schedule-options"),
        "steps": chosen_steps,
        "warmup_steps": warmup_steps,
        "max_grad_norm": max_grad_norm,
        "accumulation": accumulation,
        "preconditioner": preconditioner,
        "momentum": None if momentum is None or hf_run is None else lambda _: momentum,
    }
    text.require_place(bank)
    network, training_set, chosen = text.build_from(model, data, task, task_option or ())
    recorded = make_trajectory(
        recorder,
        trajectory,
        checkpoint or (),
        lr=lr,
        momentum=0.0 if momentum is None or hf_run is not None else momentum,
        weight_decay=weight_decay,
        segments=segments,
        hf_run=hf_run,
        hf_options={key: value for key, value in run.items() if value is not None},
        model=network,
    )
    options: dict[str, Any] = {
        "sketch": make_sketch(sketch_dim, sketch_kind, sketch_seed, sketch_nnz, sketch_backend),
        "batch_size": batch_size,
        "device": device or worker.device,
        "storage": storage,
        "parameters": text.parameters_of(network, parameters),
        "parameter_weights": parse_weights(parameter_weights),
        "sampled_fisher": sampled_fisher,
        "autocast": autocast,
        "gradients": gradients,
        "shard_rows": shard_rows,
    }
    if plan_for:
        from source_proj.distribute import plan as make_plan

        _report_plan(
            make_plan(network, chosen, recorded, training_set, workers=plan_for, progress=progress, **options), json
        )
        return
    was_complete = dataset is not None and is_complete(bank)
    placement = placement_of(network)
    if placement.lockstep.size > 1:  # together they are one worker, each where its slices are
        options["device"], share = device, None
    else:
        share = worker.shard
    made = banks.build(
        network,
        chosen,
        recorded,
        training_set,
        bank,
        shard=alone or share,
        takeover=takeover if alone is None else None,
        resume=resume,
        progress=progress and worker.local_index == 0,
        **options,
    )
    if worker.local_index == 0:
        text.write_beside(bank, context.params, training_set, keep=was_complete)
        _report(made, json)


def plan(*args: Any, **options: Any) -> None:
    """Say what a build with these options would cost, from a few timed batches: time, disk, memory, better sizes."""
    build(*args, **{**options, "plan_for": options["plan_for"] or 1})


plan.__signature__ = inspect.signature(build)  # type: ignore[attr-defined]  # its options are the build's


@reports_errors
def finalize(bank: BankPath, json: Json = False) -> None:
    """Declare a bank complete after every part of a build in parts is done."""
    import source_proj.bank as banks

    made = banks.open(bank)
    made.finalize()
    _report(made, json)


def _report_plan(plan: "Plan", json: bool) -> None:
    if json:
        summary = {"seconds": plan.seconds, "seconds_each": plan.seconds_each, "dominates": plan.dominates}
        emit({**asdict(plan), **summary})
    else:
        say(str(plan))


def _report(made: "Bank", json: bool) -> None:
    fits = made.nbytes()["fits"]
    size = sum(made.nbytes().values())
    if json:
        facts = {"rows": made.n_rows, "finalized": made.finalized, "bytes": size, "bytes_of_fits": fits}
        emit({"bank": made.path, **facts})
    else:
        rest = "build its other parts, then run" if made.missing() else "all rows are there, run"
        state = "complete" if made.finalized else f"unfinished: {rest} source-proj finalize"
        of_fits = f" ({fits / 1e6:.1f} of fits)" if fits >= 5e4 else ""  # less is 0.0
        say(f"{made.path}: {made.n_rows} rows, {size / 1e6:.1f} MB{of_fits}, {state}")
        if not made.captured and made.stages[-1].n_checkpoints == 1:
            say(
                "It has one checkpoint, where gradients are mostly this run's own noise. The mean over several moments "
                "of training predicts retraining better: build another of five or more, if the run saved them."
            )
