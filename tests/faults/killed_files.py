"""Outputs, fits and recorded runs whose writers are killed; scenarios of `killed_banks.py`."""

import errno
import json
import os
import random
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import zarr
from forks import dies_at, events_of, finished, forked

sys.path.insert(0, str(Path(__file__).parents[1] / "trajectory"))
from bank_runs import Run, make_data, make_model
from recorded_runs import STEPS, described, train

import source_proj as sp
from source_proj import bank as banks
from source_proj.cli.answers import _write_csv, _write_npy
from source_proj.report import Page, write_report

__all__ = ["fitted", "outputs", "recorded"]

Report = dict[str, object]
OLD, NEW = np.full((3, 5), 1, np.float32), np.full((3, 5), 2, np.float32)


# Outputs ---------------------------------------------------------------------------------------------------------


def made(values: np.ndarray) -> sp.Scores:
    """Scores whose ids tell of their values."""
    return sp.Scores(values, [0, 1, 2], [f"{values[0, 0]}{letter}" for letter in "abcde"], unit="logit margin")


def page(values: np.ndarray, path: Path, overwrite: bool) -> None:
    """A page of HTML that tells of the values."""
    write_report(Page(title=str(values[0, 0]), summary="", sections=(), unit="nats"), path, overwrite=overwrite)


WRITERS: dict[str, Callable[[np.ndarray, Path, bool], object]] = {
    "zarr": lambda values, path, overwrite: made(values).to_zarr(path, overwrite=overwrite),
    "csv": lambda values, path, overwrite: _write_csv(made(values), path, overwrite),
    "npy": lambda values, path, overwrite: _write_npy(made(values), path, overwrite),
    "html": page,
}


def written(path: Path) -> object:
    """What an output says; None where there is none."""
    if path.is_dir():
        array = zarr.open_array(path, mode="r")
        return np.asarray(array[...]).tolist(), array.attrs.asdict()
    if not path.exists():
        return None
    facts = path.with_name(f"{path.name}.json")
    return path.read_bytes(), facts.read_bytes() if path.suffix == ".npy" else b""


def outputs(run: Run, folder: Path, kills: int, seed: int) -> Report:
    """Kill a writer before one file event after another: what is there is the old, the new, or nothing.

    Then it is written again, and nothing else stays.
    """
    draw = random.Random(seed)
    whole, moments = {}, []
    for name, write in WRITERS.items():
        for values in (OLD, NEW):
            path = folder / f"{values[0, 0]}.{name}"
            finished(forked(lambda w=write, v=values, path=path: w(v, path, False)))
            whole[name, values is NEW] = written(path)
        for over in (False, True):
            path = folder / "counted" / f"output.{name}"
            begin(path, folder / f"1.0.{name}", over)
            count = events_of(lambda w=write, path=path, over=over: w(NEW, path, over), path.parent)
            moments += [(name, over, event) for event in range(1, count + 1)]
            shutil.rmtree(path.parent)
    done = tried = 0
    while done < kills:
        name, over, event = draw.choice(moments)
        tried += 1
        path = folder / "killed" / f"output.{name}"
        begin(path, folder / f"1.0.{name}", over)
        write = WRITERS[name]
        done += not finished(
            forked(lambda w=write, path=path, e=event, over=over: (dies_at(e, path.parent), w(NEW, path, over)))
        )
        # Two files cannot get their names at one instant: an array's facts come first, and the old array goes before.
        if written(path) not in (None, whole[name, False] if over else None, whole[name, True]):
            raise SystemExit(f"{path}, killed before event {event}, is neither the old nor the new output")
        if written(path) is None and over and name in ("csv", "html"):
            raise SystemExit(f"{path}, killed before event {event}, has gone")
        finished(forked(lambda w=write, path=path: w(NEW, path, True)))
        if written(path) != whole[name, True]:
            raise SystemExit(f"{path}, written again after a kill before event {event}, is not as it must be")
        shutil.rmtree(path.parent)
    return {"kills": done, "banks": tried, "moments": len(moments)}


def begin(path: Path, old: Path, over: bool) -> None:
    """A folder for an output, with an old one in its place if asked."""
    path.parent.mkdir()
    if not over:
        return
    for source, target in ((old, path), (old.with_name(f"{old.name}.json"), path.with_name(f"{path.name}.json"))):
        if source.is_dir():
            shutil.copytree(source, target)
        elif source.exists():
            shutil.copy(source, target)


# Fits ------------------------------------------------------------------------------------------------------------


def fitted(run: Run, folder: Path, kills: int, seed: int) -> Report:
    """Kill a score that fits before one file event after another; the next one gives the same and leaves none."""
    draw = random.Random(seed)
    finished(forked(lambda: run.build(folder / "bank")))
    finished(forked(lambda: score(folder / "bank", folder / "right.npy")))
    right, path = np.load(folder / "right.npy"), folder / "killed"
    entries = sorted(entry.name for entry in (folder / "bank/fits").iterdir())
    shutil.rmtree(folder / "bank/fits")
    shutil.copytree(folder / "bank", path)
    count = events_of(lambda: score(path, folder / "counted.npy"), path / "fits")
    shutil.rmtree(path)
    done = tried = 0
    while done < kills:
        event = draw.randint(1, count)
        tried += 1
        shutil.copytree(folder / "bank", path)
        done += not finished(
            forked(lambda event=event: (dies_at(event, path / "fits"), score(path, folder / "never.npy")))
        )
        finished(forked(lambda: score(path, folder / "again.npy")))
        banks.open(path).finalize()  # removes what killed writers left
        report = banks.verify(path)
        if not np.array_equal(np.load(folder / "again.npy"), right) or report.problems or report.leftovers:
            raise SystemExit(f"{path}, killed before event {event} of its fits: {report}")
        if sorted(entry.name for entry in (path / "fits").iterdir()) != entries:
            raise SystemExit(f"{path}, killed before event {event}, lacks a fit or has another")
        shutil.rmtree(path)
    return {"kills": done, "banks": tried, "moments": count}


def score(path: Path, out: Path) -> None:
    """Scores of a few queries, which makes fits; a damaged one is no fault of a kill, and must not be met."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = sp.Source(banks.open(path), model=make_model(), progress=False)
        np.save(out, np.asarray(source.score(make_data(3, seed=7))))


# Recorded runs ---------------------------------------------------------------------------------------------------


def recorded(run: Run, folder: Path, kills: int, seed: int) -> Report:
    """Kill training that meets full disks and Ctrl-C in the recorder, catches them and calls again; then let it end."""
    draw = random.Random(seed)
    finished(forked(lambda: ended(folder / "whole", folder / "whole.json")))
    right = json.loads((folder / "whole.json").read_text())
    path = folder / "killed"
    count = events_of(lambda: ended(path, folder / "counted.json"), path)
    shutil.rmtree(path)
    done = turn = 0
    while done < kills:
        turn += 1
        for _ in range(draw.choice([1, 1, 2])):
            event, fault = draw.randint(1, count), draw.randint(24, 90)
            done += not finished(forked(lambda event=event, fault=fault: (dies_at(event, path), caught(path, fault))))
        finished(forked(lambda: ended(path, folder / "again.json")))
        if json.loads((folder / "again.json").read_text()) != right:
            raise SystemExit(f"{path}, turn {turn} of seed {seed}: the run is not that of an uninterrupted one")
        left = [file.name for file in path.iterdir() if file.name.endswith(".partial")]
        if left or len(list(path.glob("optimizer_*"))) != 1:
            raise SystemExit(f"{path}, turn {turn} of seed {seed}: {left or 'states of earlier steps'} left")
        shutil.rmtree(path)
    return {"kills": done, "banks": turn, "moments": count}


def ended(path: Path, out: Path) -> None:
    """Train to the end, from wherever it is."""
    recorder, model, _ = train(path)
    weights = {name: value.tolist() for name, value in model.state_dict().items()}
    out.write_text(json.dumps([described(recorder.trajectory(segments=3), path), weights]))


def caught(path: Path, fault: int) -> None:
    """Train, with an error at every so many openings and renamings, after which the recorder is called again."""
    count, step = 0, sp.Recorder.step

    def failing(real: Callable[..., object], error: BaseException) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            nonlocal count
            count += 1
            if count % fault == fault - 1:
                raise error
            return real(*arguments, **options)

        return call

    def again(self: sp.Recorder, *arguments: object) -> None:
        for _ in range(5):
            with suppress(OSError, KeyboardInterrupt):
                return step(self, *arguments)  # type: ignore[arg-type]
        raise AssertionError("a step failed five times")

    Path.open = failing(Path.open, OSError(errno.ENOSPC, "No space left on device"))  # type: ignore[method-assign,assignment]
    os.replace = failing(os.replace, KeyboardInterrupt())  # type: ignore[assignment]
    sp.Recorder.step = again  # type: ignore[method-assign,assignment]
    train(path, until=STEPS)
