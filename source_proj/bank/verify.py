"""Read every byte of a bank and say what is wrong where."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from source_proj._errors import BankError
from source_proj.bank.fits import FitCache
from source_proj.bank.format import Settings
from source_proj.bank.read.curvature import read_curvature
from source_proj.bank.read.metrics import Metrics
from source_proj.bank.read.objects import list_objects, object_info
from source_proj.bank.read.part import Part
from source_proj.bank.read.root import find_parts, read_root
from source_proj.bank.read.weights import Weights
from source_proj.bank.store import Store, open_store

__all__ = ["VerifyReport", "fingerprint_of", "verify"]


@dataclass(frozen=True)
class VerifyReport:
    """What :func:`verify` found.

    Attributes:
        path: the bank's folder, or its URL.
        problems: one line each: what is wrong, and where; none for a whole, finalized bank.
        bytes_read: bytes of all files that were read and compared.
        files: number of these files.
        leftovers: temporary files of killed processes, and fits of other content; harmless, and removed by
            ``finalize``.
    """

    path: Path | str
    problems: list[str]
    bytes_read: int
    files: int
    leftovers: list[Path | str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(path: str | Path) -> VerifyReport:
    """Read every byte of a bank and say what is wrong where.

    Metadata are compared with what the settings want, chunks with their checksums, shards with their commit marks,
    copies of weights with their hashes, seals with all that they cover; files that do not belong are named. Shards that
    are not committed yet count as missing. Fits are compared with their digests; those of other content of the bank
    count as leftovers.
    """
    name = path
    try:
        store = open_store(path)
        name = store.folder or store.location()
        settings = read_root(store).settings
        there = list_objects(store)
        parts = [part for s in range(len(settings.trajectory.stages)) for part in find_parts(store, settings, s)]
    except BankError as error:
        return VerifyReport(name, [str(error)], 0, 0)
    problems = [problem for part in parts for problem in _part_problems(part)]
    problems += _weights_problems(store, settings)
    problems += _metrics_problems(store, settings)
    problems += _curvature_problems(store, settings)
    fits = _fits(store, parts)
    problems += fits.problems()
    beside = {key for key in there if key.startswith("fits/")}
    known, allowed = _keys(store, settings, parts)
    counts = Counter(part.name.split("/")[0] for part in parts)
    begun = tuple(f"{stage}/part_{count}/" for stage, count in counts.items())  # of an append, without its group yet
    left = [key for key in there if key.startswith(begun)]
    foreign = [key for key in there if key not in known | allowed | beside and key not in left]
    problems += [f"{store.location(key)} does not belong to the bank: move it elsewhere" for key in foreign]
    sizes = [info.size for key in there if key in known and (info := object_info(store, key)) is not None]
    left += [key for key in store.leftovers() if not key.startswith("fits/")]
    kind = str if store.folder is None else Path
    leftovers = [*(kind(store.location(key)) for key in sorted(left)), *fits.leftovers()]
    return VerifyReport(name, problems, sum(sizes), len(sizes), leftovers)


def fingerprint_of(seals: Sequence[tuple[bytes, bytes]]) -> str:
    """SHA-256, in hex, of the seals of all parts of a bank."""
    return hashlib.sha256(b"".join(seal[0] for seal in seals)).hexdigest()


def _fits(store: Store, parts: Sequence[Part]) -> FitCache:
    try:
        seals = [seal for part in parts if (seal := part.sealed()) is not None]
    except BankError:  # named by _part_problems
        seals = []
    return FitCache(store.folder, fingerprint_of(seals) if len(seals) == len(parts) else None)


def _part_problems(part: Part) -> Iterator[str]:
    for checkpoint in range(part.n_checkpoints):
        for shard in range(part.spec.n_shards):
            try:
                yield from _shard_problems(part, checkpoint, shard)
            except BankError as error:
                yield str(error)
    try:
        if part.sealed() is None:
            yield f"{part.location} is not sealed: finish the build, then finalize"
        part.check_seal()
    except BankError as error:
        yield str(error)


def _shard_problems(part: Part, checkpoint: int, shard: int) -> Iterator[str]:
    if not part.mark(checkpoint, shard).any():
        yield f"not done: {part.place(checkpoint, shard)}"
        return
    for name in part.data(checkpoint):
        try:
            part.read(checkpoint, name, shard)
        except BankError as error:
            yield str(error)


def _weights_problems(store: Store, settings: Settings) -> Iterator[str]:
    """Read the copies of weights; files elsewhere are not the bank's."""
    weights = Weights(store, settings, {})
    for checkpoint in settings.trajectory.checkpoints:
        if checkpoint.path is None:
            try:
                weights.stored(checkpoint.hash, step=0)
            except BankError as error:
                yield str(error)


def _metrics_problems(store: Store, settings: Settings) -> Iterator[str]:
    metrics = Metrics(store, settings)
    for metric in range(len(metrics)):
        try:
            metrics.scale(metric)
        except BankError as error:
            yield str(error)


def _curvature_problems(store: Store, settings: Settings) -> Iterator[str]:
    for digest in settings.trajectory.curvatures:
        try:
            read_curvature(store, digest)
        except BankError as error:
            yield str(error)


def _keys(store: Store, settings: Settings, parts: list[Part]) -> tuple[set[str], set[str]]:
    """Objects that were read, and objects that may be there besides: shards without a mark."""
    known = {"zarr.json"} | {f"{part.name.split('/')[0]}/zarr.json" for part in parts}
    allowed: set[str] = set()
    for part in parts:
        known.add(f"{part.name}/zarr.json")
        known |= {f"{part.name}/{name}/zarr.json" for name in part.arrays()}
        known |= {f"{part.name}/checkpoint_{checkpoint}/zarr.json" for checkpoint in range(part.n_checkpoints)}
        known |= {f"{part.name}/{name}/{part.arrays()[name].key(0)}" for name in ("ids", "seal")}
        for checkpoint in range(part.n_checkpoints):
            for shard in range(part.spec.n_shards):
                of_shard = known if part.is_done(checkpoint, shard) else allowed
                of_shard |= {part.key(checkpoint, name, shard) for name in (*part.data(checkpoint), "committed")}
    known |= _array_keys(store, "metrics", settings.trajectory.scales)
    known |= _array_keys(store, "curvature", settings.trajectory.curvatures)
    copies = [checkpoint.hash for checkpoint in settings.trajectory.checkpoints if checkpoint.path is None]
    known |= _array_keys(store, "weights", copies)
    return known, allowed


def _array_keys(store: Store, group: str, names: list[str]) -> set[str]:
    """The objects of a group of arrays of one axis."""
    known = {f"{group}/zarr.json"} if names else set()
    for name in names:
        known.add(f"{group}/{name}/zarr.json")
        shards = [key for key in list_objects(store, f"{group}/{name}") if key.rpartition("/")[2].startswith("c.")]
        known |= {f"{group}/{name}/c.{shard}" for shard in range(len(shards))}  # fewer or other ones were named above
    return known
