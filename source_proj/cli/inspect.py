"""``inspect``, ``verify`` and ``clean``: look into a bank, and tidy it up."""

import math
import statistics
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from source_proj._io.printable import bytes_in_words, counted
from source_proj.cli.options import BankPath, Json
from source_proj.cli.output import emit, reports_errors, say, table

if TYPE_CHECKING:
    from source_proj.bank import Bank, StageBank
    from source_proj.bank.read.weights import Weights

__all__ = ["clean", "inspect", "verify"]

_LISTED = 8  # missing shards spelled out for people


Fidelity = Annotated[
    bool,
    typer.Option(
        "--fidelity",
        help="Also fit source, and estimate how far scores of a sketch of this size can be trusted, by some training "
        "examples' own losses.",
    ),
]


@reports_errors
def inspect(bank: BankPath, fidelity: Fidelity = False, json: Json = False) -> None:
    """Show what is in a bank, also while it is being built."""
    from source_proj.bank import open as open_bank

    opened = open_bank(bank)
    facts = {**_facts(opened), **({"fidelity": _fidelity(opened)} if fidelity else {})}
    if json:
        emit(facts)
    else:
        say("\n".join(_lines(facts)))


@reports_errors
def verify(bank: BankPath, json: Json = False) -> None:
    """Read every byte of a bank; list what is wrong, and exit with code 1 if anything is."""
    from source_proj.bank import open as open_bank
    from source_proj.bank import verify as verify_bank

    report = verify_bank(bank)
    gone = open_bank(bank).weights.missing() if report.ok else []  # no fault of the bank's own
    if json:
        emit(
            {
                "bank": bank,
                "ok": report.ok,
                "problems": report.problems,
                "files": report.files,
                "bytes_read": report.bytes_read,
                "leftovers": report.leftovers,
                "missing_weights": gone,
            }
        )
    else:
        for problem in report.problems:
            say(problem)
        count = len(report.problems)
        verdict = "whole" if report.ok else f"{count} problem{'' if count == 1 else 's'}"
        say(f"{bank}: {verdict}; {report.files} files, {report.bytes_read / 1e6:.1f} MB read")
        if gone:
            say(_gone(gone))
        if report.leftovers:
            say(f"{len(report.leftovers)} leftovers, such as {report.leftovers[0]}: source-proj clean removes them")
    if not report.ok:
        raise typer.Exit(1)


@reports_errors
def clean(bank: BankPath, json: Json = False) -> None:
    """Delete what was fitted from a bank and kept in it; scoring computes it again when it is needed."""
    from source_proj.bank import open as open_bank

    freed = open_bank(bank).clear_fits()
    if json:
        emit({"bank": bank, "bytes_freed": freed})
    else:
        say(f"{bank}: {freed / 1e6:.1f} MB of fits removed")


def _facts(bank: "Bank") -> dict[str, Any]:
    """Everything about a bank, as JSON can hold it."""
    shapes = bank.space_spec["shapes"]
    return {
        "bank": bank.path,
        "finalized": bank.finalized,
        "fingerprint": bank.fingerprint if bank.finalized else None,
        "rows": bank.n_rows,
        "storage": bank.storage,
        "sketch": bank.sketch.spec(),
        "task": bank.task_spec,
        "parameters": dict(zip(bank.space_spec["names"], shapes, strict=True)),
        "parameter_choice": bank.parameter_choice,
        "parameter_weights": bank.parameter_weights,
        "stages": [_stage(stage, bank.weights) for stage in bank.stages],
        "missing": bank.missing(),
        "missing_weights": bank.weights.missing(),
        "bytes": {**bank.nbytes(), "fits": bank.fits.nbytes()},
        "versions": bank.versions,
    }


def _fidelity(bank: "Bank") -> dict[str, Any]:
    from source_proj.attribution.source import Source

    estimate = Source(bank, progress=False).fidelity()
    return {
        "correlation": estimate.correlation.tolist(),
        "leakage": estimate.leakage.tolist(),
        "effective_dimension": estimate.effective_dimension,
        "sufficient_dim": estimate.sufficient_dim,
    }


def _stage(stage: "StageBank", weights: "Weights") -> dict[str, Any]:
    from source_proj.bank.audits import total
    from source_proj.trajectory.record import write_optimizer

    committed = [[part.done(index) for part in stage.parts] for index in range(stage.n_checkpoints)]
    return {
        "name": stage.name,
        "rows": stage.n,
        "first_ids": stage.ids[:5],
        "optimizer": write_optimizer(stage.record.optimizer),
        "segments": [list(group) for group in stage.record.segments],
        "sampled_fisher_draws": stage.draws,
        "checkpoints": [
            {
                "step": checkpoint.step,
                "lr_integral": integral,
                "path": weights.placed(checkpoint).path,
                "there": weights.is_there(checkpoint),
                "hash": checkpoint.hash,
                "shards": sum(len(done) for done in shards),
                "shards_done": sum(int(done.sum()) for done in shards),
                "audit": total(part.audit(index) for part in stage.parts),
            }
            for index, (checkpoint, integral, shards) in enumerate(
                zip(stage.record.checkpoints, stage.record.lr_integrals, committed, strict=True)
            )
        ],
    }


def _lines(facts: dict[str, Any]) -> Iterator[str]:
    """The same for people."""
    state = f"complete, fingerprint {facts['fingerprint'][:16]}" if facts["finalized"] else "unfinished"
    size = sum(facts["bytes"].values())
    sizes = ", ".join(f"{name} {bytes_in_words(count)}" for name, count in facts["bytes"].items() if count >= 50_000)
    yield f"{facts['bank']}: {state}"
    yield f"  rows        {facts['rows']} training examples, {facts['storage']}"
    yield f"  sketch      {_sketch(facts)}"
    if "fidelity" in facts:
        yield f"  fidelity    {_trusted(facts['fidelity'])}"
    yield f"  task        {_options(facts['task'])}"
    yield f"  parameters  {facts['parameter_choice']}"
    yield f"  size        {bytes_in_words(size)}{f' ({sizes})' if sizes else ''}"
    yield f"  made by     {_options(facts['versions'])}"
    for stage in facts["stages"]:
        yield ""
        yield f"stage {stage['name']}: {stage['rows']} rows, {_options(stage['optimizer'])}"
        segment_of = {checkpoint: number for number, group in enumerate(stage["segments"], 1) for checkpoint in group}
        yield table(
            ["checkpoint", "segment", "step", "integral of lr", "shards done", "compared with autograd, off by",
             "weights"],
            [
                [index, segment_of[index], checkpoint["step"], f"{checkpoint['lr_integral']:.6g}",
                 f"{checkpoint['shards_done']} of {checkpoint['shards']}", _audit(checkpoint["audit"]),
                 _place(checkpoint)]
                for index, checkpoint in enumerate(stage["checkpoints"])
            ],
        )  # fmt: skip
        yield from _general(stage)
    if facts["missing_weights"]:
        yield f"\n{_gone(facts['missing_weights'])}"
    if facts["missing"]:
        more = len(facts["missing"]) - _LISTED
        yield "\nmissing: " + "; ".join(facts["missing"][:_LISTED]) + (f"; and {more} more" if more > 0 else "")


def _place(checkpoint: dict[str, Any]) -> str:
    """Where weights lie."""
    return f"{checkpoint['path'] or 'in the bank'}{'' if checkpoint['there'] else ' (not there)'}"


def _audit(audit: dict[str, Any]) -> str:
    return f"{audit['audited_examples']} of {audit['examples']}, {audit['worst_error']:.0e}"


def _gone(paths: list[str]) -> str:
    """What to say of files of weights that are not there."""
    return (
        f"{counted(len(paths), 'file')} of weights not there, such as {paths[0]}: queries given as data need them; put "
        "them back, or beside the bank as they were"
    )


def _general(stage: dict[str, Any]) -> Iterator[str]:
    """Why gradients went by the slow path, where they did."""
    reasons: Counter[str] = Counter()
    for checkpoint in stage["checkpoints"]:
        reasons.update(checkpoint["audit"]["general"])
    for reason, count in reasons.most_common():
        yield f"  {count} gradients by the general path: {reason}"


def _sketch(facts: dict[str, Any]) -> str:
    """The sketch, and whether there is more room in it than there are numbers to sketch."""
    from source_proj.sketch import exact_sketch

    sketch, sizes = facts["sketch"], [math.prod(shape) for shape in facts["parameters"].values()]
    words = f"{sketch['kind']}, {sketch['dim']} numbers an example, seed {sketch['seed']}"
    if sketch["kind"] != "identity" and sketch["dim"] > sum(sizes):
        words += f" (only {sum(sizes)} parameters: {exact_sketch(sum(sizes))})"
    return words


def _trusted(fidelity: dict[str, Any]) -> str:
    median = statistics.median(fidelity["correlation"])
    return (
        f"effective dimension {fidelity['effective_dimension']:.0f}; scores of training examples' own losses correlate "
        f"by about {median:.2f} with those without a sketch at the same damping; "
        f"k = {fidelity['sufficient_dim']} would do for .90"
    )


def _options(spec: dict[str, Any]) -> str:
    """A description in words: what is not said, off or empty is left out, and what is long is counted."""
    words = []
    for name, value in spec.items():
        plain = name.replace("_", " ")
        if value is None or value is False or value in ([], {}, 0):
            continue
        if name in ("name", "kind"):
            words.append(str(value).replace("_", " "))
        elif isinstance(value, dict) or (
            isinstance(value, list) and (len(value) > _LISTED or any(isinstance(entry, dict) for entry in value))
        ):
            words.append(f"{len(value)} {plain}")
        else:
            words.append(f"{plain} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    return ", ".join(words)
