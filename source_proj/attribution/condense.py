r"""A bank with one row for each example and segment in place of one a checkpoint.

All that SOURCE asks of a segment's rows is their mean over its checkpoints, and Ĥ. A bank of nothing else,

    ḡ_l(z) = (1/C) Σ_c g_c(z)  for each example z,    Ĥ_l,

gives the same scores from a C-th of the bytes, and reads as much less for each query. So the number of checkpoints,
which predicts retraining better the more there are, costs time to build and no room. Ĥ takes 2 k² bytes, or of a sketch
of B blocks 2 k²/B: less than the rows where there are more than k or so.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from source_proj._errors import BankError
from source_proj._io.executors import Executor, check_executor
from source_proj._io.hashing import hash_float32
from source_proj._io.progress import Progress, shared_bar
from source_proj.attribution.curvature import Curvature, default_curvature, require_curvature
from source_proj.attribution.ensembles import as_banks
from source_proj.attribution.fits import Fit
from source_proj.attribution.moments import mean_panels
from source_proj.attribution.operands import StageOperands, encoded_gradients, stage_start
from source_proj.attribution.source.segments import Groups, StageSegments, stage_groups
from source_proj.bank import Bank
from source_proj.bank.audits import total
from source_proj.bank.build.arguments import require_device
from source_proj.bank.capture.segments import Segments, require_room, write_segments
from source_proj.bank.codecs import find_codec
from source_proj.bank.format import Settings
from source_proj.bank.store import open_store
from source_proj.kernels.gram import packed
from source_proj.sketch import plain_modes
from source_proj.sketch.columns import kept_blocks
from source_proj.trajectory import CapturedCurvature, CaptureRecord, CheckpointRef, RunRecord
from source_proj.trajectory.counts import checked_count

__all__ = ["condense"]

_COARSE = ("int4", "int2", "int1")


def condense(
    bank: Bank,
    path: str | Path,
    *,
    segments: StageSegments | None = None,
    curvature: Curvature | None = None,
    query_points: int | None = None,
    storage: str | None = None,
    device: torch.device | str | None = None,
    executor: Executor | None = None,
    progress: Progress = True,
) -> Bank:
    """Write a bank that holds the mean rows of each segment and their curvature, and gives the same scores.

    :class:`Source`, averaged :class:`InfluenceFunction` and :class:`Hydra` ask it as they ask any other; what needs
    gradients at a single checkpoint (TracIn, TRAK, ``rerank=``, ``by_token``) wants the bank that it was made of, as do
    other segments and curvature, and more rows. Queries are differentiated at the same checkpoints. Where an example's
    own gradient at each checkpoint counts there is the segment's mean: in ``self_influence`` of several segments, and
    in Hydra, whose weights then are of segments (a tenth off where checkpoints are unevenly spread).

    Args:
        bank: a finalized bank; it stays as it is.
        path: the new bank's folder, or the URL of one in an object store; a killed call goes on when it is repeated.
        segments: how checkpoints fall into segments, as for :class:`Source`; default: the bank's.
        curvature: which Hessian is kept; default: by the task, as for :class:`Source`.
        query_points: at how many of a stage's checkpoints queries are differentiated, evenly spread, the last one among
            them; default: all. A pass over the queries each: six of 24 lose little.
        storage: the codec of the rows; default: int8, or the bank's own if that has more bits. The noise of few bits
            averages out over a mean, and does not in a mean's own code.
        device: where products are computed; default: the CPU.
        executor: computes them, as for :class:`Source`; default: this process.
        progress: as for :class:`Source`.

    Returns:
        The new bank, finalized.

    Warns:
        UserWarning: a large sketch of so few rows that Source takes its columns as one block, and here as several.

    Raises:
        BankError: the bank is unfinished or has one row a segment already; or something else is at the path, or it is
            the bank's own or within it, or cannot be written.
        TypeError: something else stands in the bank's place.
        MismatchError: a bank made of another, or with other options, is at the path.
        ValueError: segments, curvature, query_points, storage or device are none that can be had, or the bank's rows
            are in several metrics.

    Example:
        >>> import tempfile
        >>> import source_proj as sp
        >>> model, data = torch.nn.Linear(2, 2), torch.utils.data.TensorDataset(torch.eye(2), torch.tensor([0, 1]))
        >>> run = sp.Trajectory([sp.Checkpoint(model.state_dict(), step, lr=0.1) for step in (10, 20, 30)])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bank = sp.build(model, sp.Classification(), run, data, f"{folder}/bank", sketch=sp.Sketch(4))
        ...     sp.condense(bank, f"{folder}/condensed").stages
        (StageBank('train': 2 rows x 1 whole segment),)
    """
    check_executor(executor)
    require_device(device)
    if isinstance(bank, list | tuple):
        raise TypeError(f"condense takes one bank, got {len(bank)}: condense each, and give Source the list")
    as_banks(bank)
    if storage is not None:
        find_codec(storage)
    kind = _checked(bank, curvature)
    store = open_store(path)
    if store.location() == bank.store.location():
        raise BankError(f"{path} is the bank itself; give another path for the new one")
    if store.location().startswith(f"{bank.store.location()}/"):
        raise BankError(f"{path} lies within the bank {bank.path}; give a path outside of it")
    if query_points is not None:
        query_points = checked_count("query_points", query_points, 1)
    require_room(store)
    groups = stage_groups(bank, segments)
    _warn_of_few_rows(bank, groups, kind)
    reads = sum(2 * stage.n * stage.n_checkpoints for stage in bank.stages)
    with plain_modes(), shared_bar(progress, "condense", reads, "rows"):
        made = [
            [_curvature(bank, stage, segment, kind, device, executor) for segment in own]
            for stage, own in enumerate(groups)
        ]
        settings = _settings(bank, groups, kind, query_points, storage, made)
        weights = bank.weights.copies(settings.trajectory)
        content = Segments(settings, bank.notes, weights, made, bank.metrics.by_hash())
        rows = [_MeanRows(bank, stage, own, device) for stage, own in enumerate(groups)]
        condensed = write_segments(path, content, rows)
    condensed.examples = bank.examples
    return condensed


def _checked(bank: Bank, curvature: Curvature | None) -> Curvature:
    """Which curvature is kept."""
    if bank.captured:
        raise BankError(f"the bank {bank.path} has one row for each example and segment already: ask it as it is")
    if len(bank.trajectory.metrics) > 1:
        raise ValueError(
            f"the rows of {bank.path} are in {len(bank.trajectory.metrics)} metrics, and have no mean: build it with "
            "preconditioner='scalar', 'factored' or 'shared'"
        )
    kind = default_curvature([bank]) if curvature is None else curvature
    require_curvature([bank], kind)
    return kind


def _warn_of_few_rows(bank: Bank, groups: Groups, kind: Curvature) -> None:
    """Say so where Source takes the bank's columns as one block, and has to take these as several."""
    blocks = len(kept_blocks(bank.sketch))
    fits = [Fit(bank, stage, segment, kind) for stage, own in enumerate(groups) for segment in own]
    if blocks > 1 and all(fit.has_few_rows for fit in fits):
        most = max(fit.n_factors for fit in fits)
        warnings.warn(
            f"no segment of {bank.path} has more than {most} rows of {bank.sketch.dim} numbers, which Source takes as "
            f"they are; their curvature is kept in {blocks} blocks of columns, with the scores of Source(..., "
            f"blocks={blocks}): for those of the bank's own default keep the bank itself",
            UserWarning,
            stacklevel=3,
        )


def _curvature(
    bank: Bank,
    stage: int,
    checkpoints: Sequence[int],
    kind: Curvature,
    device: torch.device | str | None,
    executor: Executor | None,
) -> Tensor:
    """Ĥ of a segment, flat: of each block of columns, one after the other."""
    blocks = kept_blocks(bank.sketch)
    of_blocks = mean_panels(bank.stages[stage], checkpoints, blocks, kind, device=device or "cpu", executor=executor)
    pairs = zip(of_blocks, blocks, strict=True)
    return torch.cat([packed(panels).div_(columns.scale).float().cpu() for panels, columns in pairs])


def _settings(
    bank: Bank,
    groups: Groups,
    kind: CapturedCurvature,
    query_points: int | None,
    storage: str | None,
    curvature: Sequence[Sequence[Tensor]],
) -> Settings:
    place = bank.weights.placed
    records = []
    for stage, own, flat in zip(bank.trajectory.stages, groups, curvature, strict=True):
        cut = replace(
            stage,
            checkpoints=tuple(map(place, stage.checkpoints)),
            final=place(stage.final),
            segments=tuple(map(tuple, own)),
        )
        hashes, points = tuple(map(hash_float32, flat)), _evenly(cut.checkpoints, query_points)
        records.append(replace(cut.captured(hashes, kind), capture=CaptureRecord(points, hashes, kind)))
    return replace(
        bank.settings,
        trajectory=RunRecord(tuple(records), bank.trajectory.metrics),
        storage=storage or ("int8" if bank.storage in _COARSE else bank.storage),
        sampled_fisher=0,
        second_derivative=False,
        fisher_weight=False,
    )


def _evenly(checkpoints: Sequence[CheckpointRef], count: int | None) -> tuple[CheckpointRef, ...]:
    """So many of some checkpoints, the last one among them."""
    wanted = min(count or len(checkpoints), len(checkpoints))
    return tuple(checkpoints[round(len(checkpoints) * (place + 1) / wanted) - 1] for place in range(wanted))


@dataclass(frozen=True)
class _MeanRows:
    """The mean rows of a stage's segments; see `SegmentRows`."""

    bank: Bank
    stage: int
    segments: Sequence[Sequence[int]]
    device: torch.device | str | None

    @property
    def ids(self) -> np.ndarray:
        """Ids of its examples, of all parts."""
        ids = self.bank.stages[self.stage].ids
        return np.array(ids, dtype=object if isinstance(ids[0], str) else np.int64)

    def rows(self, segment: int, start: int, stop: int) -> Tensor:
        """The mean loss gradients of some examples."""
        first, dim = stage_start(self.bank, self.stage), self.bank.sketch.dim
        read = partial(encoded_gradients, checkpoints=self.segments[segment], device=self.device)
        operands = StageOperands(self.bank, self.stage, read).between(first + start, first + stop)
        return torch.cat([operand.decoded(dim).cpu() for operand in operands])

    def audit(self, segment: int) -> Mapping[str, Any]:
        """The audits of all checkpoints' rows together."""
        parts = self.bank.stages[self.stage].parts
        return total(part.audit(checkpoint) for part in parts for checkpoint in self.segments[segment])
