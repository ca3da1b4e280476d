"""Read every byte of a bank and say what is wrong where."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import zarr

from source_proj._errors import BankError
from source_proj._io.files import walk
from source_proj.bank.format import Settings
from source_proj.bank.read.metrics import Metrics
from source_proj.bank.read.part import Part, content_digest
from source_proj.bank.read.root import check_seal, find_parts, read_root
from source_proj.bank.read.weights import Weights

__all__ = ["VerifyReport", "verify"]


@dataclass(frozen=True)
class VerifyReport:
    """What :func:`verify` found.

    Attributes:
        path: the bank's folder.
        problems: one line each: what is wrong, and where; none for a whole, finalized bank.
        bytes_read: bytes of all files that were read and compared.
        files: number of these files.
        leftovers: temporary files of killed processes; harmless, and removed by ``finalize``.
    """

    path: Path
    problems: list[str]
    bytes_read: int
    files: int
    leftovers: list[Path] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(path: str | Path) -> VerifyReport:
    """Read every byte of a bank and say what is wrong where.

    Metadata are compared with what the settings want, chunks with their checksums, shards with their commit marks,
    copies of weights with their hashes, seals with all that they cover; files that do not belong are named. Fits that
    were computed from the bank are no part of it, and shards that are not committed yet count as missing.
    """
    path = Path(path)
    try:
        settings = read_root(path).settings
        parts = [part for s in range(len(settings.trajectory.stages)) for part in find_parts(path, settings, s)]
    except BankError as error:
        return VerifyReport(path, [str(error)], 0, 0)
    problems = [problem for part in parts for problem in _part_problems(part)]
    problems += _weights_problems(path, settings)
    problems += _metrics_problems(path, settings)
    known, allowed = _files(path, settings, parts)
    foreign, leftovers, read = [], [], []
    for file in walk(path):
        if file.name.endswith(".partial"):
            leftovers.append(file)
        elif file in known:
            read.append(file)
        elif file.relative_to(path).parts[0] != "fits" and file not in allowed:
            foreign.append(f"{file} does not belong to the bank: move it elsewhere")
    return VerifyReport(path, problems + foreign, sum(file.stat().st_size for file in read), len(read), leftovers)


def _part_problems(part: Part) -> Iterator[str]:
    for checkpoint in range(part.n_checkpoints):
        for shard in range(part.spec.n_shards):
            try:
                yield from _shard_problems(part, checkpoint, shard)
            except BankError as error:
                yield str(error)
    try:
        if part.sealed() is None:
            yield f"{part.path} is not sealed: finish the build, then finalize"
        check_seal(part)
    except BankError as error:
        yield str(error)


def _shard_problems(part: Part, checkpoint: int, shard: int) -> Iterator[str]:
    mark = part.mark(checkpoint, shard)
    if not mark.any():
        yield f"not done: {part.place(checkpoint, shard)}"
        return
    for name, expected in zip(part.data(checkpoint), mark, strict=True):
        try:
            values = part.read(checkpoint, name, shard)
        except BankError as error:
            yield str(error)
            continue
        if not np.array_equal(content_digest(values), expected):
            yield (
                f"{part.file(checkpoint, name, shard)} is whole, but not what was committed as "
                f"{part.place(checkpoint, shard)}: it belongs elsewhere, or was altered"
            )


def _weights_problems(path: Path, settings: Settings) -> Iterator[str]:
    """Read the copies of weights; files elsewhere are not the bank's."""
    weights = Weights(path, settings, {})
    for checkpoint in settings.trajectory.checkpoints:
        if checkpoint.path is None:
            try:
                weights.stored(checkpoint.hash, step=0)
            except BankError as error:
                yield str(error)


def _metrics_problems(path: Path, settings: Settings) -> Iterator[str]:
    metrics = Metrics(path, settings.trajectory)
    for metric in range(len(metrics)):
        try:
            metrics.scale(metric)
        except BankError as error:
            yield str(error)


def _files(path: Path, settings: Settings, parts: list[Part]) -> tuple[set[Path], set[Path]]:
    """Files that were read, and files that may be there besides: shards without a mark."""
    known = {path / "zarr.json"} | {part.path.parent / "zarr.json" for part in parts}
    allowed: set[Path] = set()
    for part in parts:
        known.add(part.path / "zarr.json")
        for name, spec in part.arrays().items():
            known.add(part.path / name / "zarr.json")
            is_data = name.startswith("checkpoint_")
            if is_data:
                known.add((part.path / name).parent / "zarr.json")
            for shard in range(-(-spec.shape[0] // spec.height)):
                file = part.path / name / spec.key(shard)
                if is_data and not (part.path / name).with_name("committed").joinpath(f"c.{shard}.0.0").is_file():
                    allowed.add(file)
                else:
                    known.add(file)
    known |= _array_files(path / "metrics", settings.trajectory.diagonals)
    stored = [checkpoint.hash for checkpoint in settings.trajectory.checkpoints if checkpoint.path is None]
    known |= _array_files(path / "weights", stored)
    return known, allowed


def _array_files(group: Path, names: list[str]) -> set[Path]:
    """The files of a group of arrays."""
    known = {group / "zarr.json"} if names else set()
    for name in names:
        known.add(group / name / "zarr.json")
        try:
            array = zarr.open_array(group / name, mode="r")
        except Exception:  # named by _weights_problems or _metrics_problems
            continue
        known |= {group / name / f"c.{chunk}" for chunk in range(array.nchunks)}
    return known
