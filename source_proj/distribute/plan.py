"""What a build will cost, before it is paid for: from a few timed batches, the sizes of the model and the data."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from source_proj._io.printable import bytes_in_words
from source_proj._io.progress import progress_bar
from source_proj.attribution.curvature import default_curvature
from source_proj.attribution.source.sizes import SegmentSize, fit_peak, fitted_bytes, search_peak
from source_proj.bank import Bank, build
from source_proj.bank.build.agreement import MOST_EXAMPLES
from source_proj.bank.build.arguments import require_arguments
from source_proj.bank.build.columns import Table, examples_of
from source_proj.bank.build.data import BatchSource, by_stage, checked_ids
from source_proj.bank.build.parameters import AGREEMENT, NONE, weighting_of
from source_proj.bank.format import Settings, storage_of
from source_proj.bank.layout import PartSpec, default_shard_rows, part_arrays
from source_proj.sketch import Sketch, exact_sketch
from source_proj.sketch.columns import blocks_of, default_blocks
from source_proj.task import Task
from source_proj.trajectory import Trajectory
from source_proj.trajectory.placement import unwrapped

__all__ = ["Plan", "plan"]

_BATCHES = 4  # of a trial build, spread over the data
_LARGEST_DIM = 16384  # beyond, a row of two bits a number takes more bytes than one of the default
_CHECKPOINTS = 6  # of the paper's runs
_SHARDS_A_WORKER = 4  # fewer, and workers wait for the last one
_KINDS = ((1, 1), (_BATCHES, 2), (_BATCHES, 1))  # batches and shards of trial builds
_TRIALS, _PATIENCE = 3, 2.0  # of a kind, and seconds after which one is enough: noise is of short ones


@dataclass(frozen=True)
class Plan:
    """What a build will cost; times are of this machine and device.

    Attributes:
        examples: training examples of all stages.
        passes: passes over a stage's data: one for each of its checkpoints, and one more for each draw of a sampled
            label, which is a backward pass alone where the task is built in.
        parameters: numbers that are attributed through.
        workers: processes that share the work.
        setup_seconds: what every worker does before its first row, and the sealing.
        shard_seconds: for a shard, besides its batches: its proof, its commit.
        batch_seconds: for a batch, median over trials.
        batches: of all passes.
        shards: of all passes.
        bytes: on disk, by what they hold, before compression; "fits" are those that Source makes on first use.
        build_peak: bytes of memory at most while it is built, on the CPU, or the GPU if it is on one; None if unknown.
        fit_peak: bytes of memory while Source is fitted, besides what the process has.
        search_peak: bytes of memory while queries are scored with Source's default ``memory``, besides what the process
            has, the queries and their scores.
        dim: suggested size of the sketch, at most as many numbers as parameters.
        storage: suggested codec.
        checkpoints: suggested number of checkpoints a stage.
        shard_rows: suggested rows a shard.
    """

    examples: int
    passes: int
    parameters: int
    workers: int
    setup_seconds: float
    shard_seconds: float
    batch_seconds: float
    batches: int
    shards: int
    bytes: Mapping[str, int]
    build_peak: int | None
    fit_peak: int
    search_peak: int
    dim: int
    storage: str
    checkpoints: int
    shard_rows: int

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of all workers together, by what takes them."""
        return {
            "gradients": self.batches * self.batch_seconds,
            "shards": self.shards * self.shard_seconds,
            "setup": self.workers * self.setup_seconds,
        }

    @property
    def seconds(self) -> float:
        """Seconds of all workers together."""
        return sum(self.parts.values())

    @property
    def seconds_each(self) -> float:
        """Seconds of each worker, if they are as fast as this one and wait for nothing."""
        return self.seconds / self.workers

    @property
    def dominates(self) -> str:
        """What takes most of the time."""
        return max(self.parts, key=lambda name: self.parts[name])

    @property
    def _limit(self) -> str:
        return f" ({exact_sketch(self.parameters)})" if self.dim == self.parameters else ""

    def __str__(self) -> str:
        share = self.parts[self.dominates] / self.seconds
        peak = "unknown" if self.build_peak is None else bytes_in_words(self.build_peak)
        largest = max(self.bytes, key=lambda name: self.bytes[name])
        total = sum(self.bytes.values())
        workers, seconds = "1 worker", _time(self.seconds)
        if self.workers > 1:
            workers = f"{self.workers} workers"
            seconds = f"{_time(self.seconds_each)} of each worker, {seconds} of all together"
        return "\n".join(
            [
                f"{self.examples} examples, {self.parameters} parameters, {self.passes} passes, {workers}",
                f"  time      {seconds}: {share:.0%} is {self.dominates}",
                f"  disk      {bytes_in_words(total)}, of which {largest} {self.bytes[largest] / total:.0%}",
                f"  memory    build {peak}; fit {bytes_in_words(self.fit_peak)} and search "
                f"{bytes_in_words(self.search_peak)} more than the model",
                f"  suggested sketch of {self.dim}{self._limit}, {self.storage}, "
                f"{self.checkpoints} checkpoints a stage, {self.shard_rows} rows a shard",
            ]
        )


def plan(
    model: nn.Module,
    task: Task,
    trajectory: Trajectory,
    train_set: Any,
    *,
    sketch: Sketch = Sketch(),  # noqa: B008 (frozen)
    batch_size: int = 64,
    device: torch.device | str | None = None,
    storage: str | None = None,
    workers: int = 1,
    disk: float | None = None,
    shard_rows: int | None = None,
    **options: Any,
) -> Plan:
    """Say what a build would cost, by building banks of four batches in a temporary folder.

    Args:
        model: as for :func:`source_proj.build`, and so are the other arguments but these.
        task: the task.
        trajectory: the run; its checkpoints are all read.
        train_set: the data; four batches a stage of it are read, from its beginning to its end.
        sketch: the projection.
        batch_size: examples a batch; a DataLoader brings its own.
        device: where the model runs.
        storage: how rows are stored; default: by k.
        workers: processes that will share the work.
        disk: bytes that the bank may take, for the suggested size of the sketch.
        shard_rows: rows a shard.
        options: further ones of :func:`source_proj.build`, such as ``parameters=``.

    Raises:
        ValueError: ``workers`` or ``disk`` is no positive number, or ``shard`` is given; and as
            :func:`source_proj.build`.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(f"workers must be a number of at least 1, got {workers!r}")
    if disk is not None and (isinstance(disk, bool) or not isinstance(disk, int | float) or not disk > 0):
        raise ValueError(f"disk must be a positive number of bytes, such as 10e9, got {disk!r}")
    if options.get("shard") is not None:
        raise ValueError(f"plan times a whole build, got shard={options['shard']!r}: leave it out, and give workers=")
    model = unwrapped(model)
    require_arguments(model=model, task=task, trajectory=trajectory, sketch=sketch)
    names = [stage.name for stage in trajectory.stages]
    data = dict(zip(names, by_stage(train_set, names, "train_set"), strict=True))
    sources = {name: BatchSource(given, batch_size) for name, given in data.items()}
    for given, name in zip(by_stage(options.get("ids"), names, "ids"), names, strict=True):
        checked_ids(given, 0, sources[name].n, name)

    counts, sizes_of = [len(stage.checkpoints) for stage in trajectory.stages], [s.n for s in sources.values()]
    weighting = weighting_of(options.get("parameter_weights"), task, sketch, trajectory, sizes_of)
    apart: dict[str, Any] = {"progress": False, "ids": None}  # the ids are of more examples than a trial has
    if weighting == AGREEMENT:  # measured once, of as many examples whatever the size
        apart["parameter_weights"] = NONE

    def trial(batches: int, shards: int) -> tuple[float, Bank]:
        small = {name: _sample(data[name], source, batches) for name, source in sources.items()}
        rows = {source.batch_size for source in sources.values()}
        height = batches // shards * max(rows)
        with TemporaryDirectory() as folder:
            start = time.perf_counter()
            bank = build(
                model, task, trajectory, small, Path(folder) / "bank", sketch=sketch, batch_size=batch_size,
                device=device, storage=storage, shard_rows=height, **{**options, **apart},
            )  # fmt: skip
            return time.perf_counter() - start, bank

    times: dict[tuple[int, int], float] = {}
    with progress_bar(options.get("progress", True), "plan", 1 + len(_KINDS), "builds") as bar:
        trial(1, 1)  # the first calls of everything
        bar.update(1)
        for kind in _KINDS:
            tried = [trial(*kind)]
            while len(tried) < _TRIALS and sum(seconds for seconds, _ in tried) < _PATIENCE:
                tried.append(trial(*kind))
            times[kind], bank = min(seconds for seconds, _ in tried), tried[0][1]
            bar.update(1)
    settings = bank.settings
    counted = [stage.n_checkpoints for stage in bank.stages]
    passes = sum(counted)
    batch = max((times[_BATCHES, 1] - times[1, 1]) / (_BATCHES - 1), 0.0) / passes
    shard = max(times[_BATCHES, 2] - times[_BATCHES, 1], 0.0) / passes
    setup = max(times[1, 1] - passes * (batch + shard), 0.0)
    if weighting == AGREEMENT:
        looked_at = [count * min(n, MOST_EXAMPLES) for count, n in zip(counts, sizes_of, strict=True) if count > 1]
        setup += batch * sum(looked_at) / batch_size / workers
    heights = [default_shard_rows(source.n, source.batch_size, settings, shard_rows) for source in sources.values()]
    specs = [
        PartSpec(0, source.n, source.batch_size, height, "int64")
        for source, height in zip(sources.values(), heights, strict=True)
    ]
    sizes = _bytes(settings, specs)
    segments, height = _segments(bank, specs), max(heights)
    few_rows = all(segment.takes_gram(sketch.dim) for segment in segments)
    blocks = blocks_of(sketch.dim, default_blocks(sketch, few_rows=few_rows))
    suggested = _suggested(settings, specs, storage, disk)
    return Plan(
        examples=sum(spec.n for spec in specs),
        passes=passes * (1 + settings.sampled_fisher),
        parameters=sum(_numbers(settings)),
        workers=workers,
        setup_seconds=setup,
        shard_seconds=shard,
        batch_seconds=batch,
        batches=sum(count * -(-spec.n // spec.batch_size) for count, spec in zip(counted, specs, strict=True)),
        shards=sum(count * spec.n_shards for count, spec in zip(counted, specs, strict=True)),
        bytes={**sizes, "fits": fitted_bytes(segments, blocks)},
        build_peak=_peak(bank, specs),
        fit_peak=fit_peak(segments, blocks, height),
        search_peak=search_peak(segments, sketch.dim, height, settings.codec),
        dim=suggested.sketch["dim"],
        storage=suggested.storage,
        checkpoints=min(_CHECKPOINTS, max(counted)),
        shard_rows=_suggested_rows(specs, counted, workers),
    )


def _sample(data: Any, source: BatchSource, batches: int) -> Any:
    """Some whole batches of a data set, spread over it."""
    size = min(source.batch_size, source.n)
    starts = [place * (source.n - size) // max(1, batches - 1) for place in range(batches)]
    rows = [row for start in starts for row in range(start, start + size)]
    given = examples_of(data.dataset if isinstance(data, DataLoader) else data)
    if type(given) in (TensorDataset, Table):
        small: Any = TensorDataset(*(tensor[rows] for tensor in given.tensors))
    else:
        small = Subset(given, rows)
    if not isinstance(data, DataLoader):
        return small
    return DataLoader(small, source.batch_size, collate_fn=data.collate_fn, num_workers=data.num_workers)


def _numbers(settings: Settings) -> list[int]:
    shapes: Sequence[Sequence[int]] = settings.parameters["shapes"]
    return [torch.Size(shape).numel() for shape in shapes]


def _bytes(settings: Settings, specs: Sequence[PartSpec]) -> dict[str, int]:
    """Bytes of a bank's arrays by what they hold, as they are before compression."""
    sizes = {"rows": 0, "scalars and hashes": 0, "marks": 0}
    for stage, spec in enumerate(specs):
        _, _, data, marks = part_arrays(settings, stage, spec)
        for arrays in data:
            for name, array in arrays.items():
                kind = "rows" if "rows" in name else "scalars and hashes"
                sizes[kind] += torch.Size(array.shape).numel() * getattr(torch, array.dtype).itemsize
        sizes["marks"] += sum(torch.Size(array.shape).numel() for array in marks)
    return sizes


def _segments(bank: Bank, specs: Sequence[PartSpec]) -> list[SegmentSize]:
    """The segments that the trajectory names, of all examples."""
    sizes: list[SegmentSize] = []
    metrics: set[int] = set()
    draws = bank.settings.sampled_fisher if default_curvature([bank]) == "sampled_fisher" else 1
    for stage, spec in zip(bank.stages, specs, strict=True):
        for cut in stage.record.cut():
            sizes.append(SegmentSize(spec.n, len(cut.checkpoints), len(metrics - {cut.metric}), draws))
            metrics.add(cut.metric)
    return sizes


def _peak(bank: Bank, specs: Sequence[PartSpec]) -> int | None:
    """Memory that building took here, and the buffers of whole shards, two in turn and one encoded."""
    trial = _shard_bytes(bank.settings, [stage.parts[0].spec for stage in bank.stages])
    buffers = 3 * max(0, _shard_bytes(bank.settings, specs) - trial)
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit + buffers


def _shard_bytes(settings: Settings, specs: Sequence[PartSpec]) -> int:
    return max(spec.shard_rows for spec in specs) * settings.row_bytes


def _suggested(settings: Settings, specs: Sequence[PartSpec], storage: str | None, disk: float | None) -> Settings:
    """The largest k that makes sense: scores get better with it up to here, and it must fit the disk.

    A power of two; or the number of parameters where these are few: a sparse sketch of as many numbers is exact.
    """
    numbers = sum(_numbers(settings))
    dim = min(_LARGEST_DIM, numbers)
    while True:
        sketch = {**settings.sketch, "dim": dim}
        sized = replace(settings, sketch=sketch, storage=storage_of(storage, sketch, numbers))
        if dim == 1 or disk is None or sum(_bytes(sized, specs).values()) <= disk:
            return sized
        dim = 1 << (dim - 1).bit_length() - 1  # the next power of two below


def _suggested_rows(specs: Sequence[PartSpec], counted: Sequence[int], workers: int) -> int:
    """Rows a shard, fewer than the default where there would be too few shards for the workers."""
    spec = max(specs, key=lambda part: part.n)
    wanted = max(1, _SHARDS_A_WORKER * workers // sum(counted))
    rows = min(spec.shard_rows, -(-spec.n // wanted))
    return max(1, rows // spec.batch_size) * spec.batch_size


def _time(seconds: float) -> str:
    units = [(86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds")]
    for size, name in units:
        if seconds >= size:
            return f"{seconds / size:.1f} {name}"
    return f"{1e3 * seconds:.0f} ms"
