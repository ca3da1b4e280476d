"""Retraining, the judge of all attribution: paid once, kept in a zarr store, resumable and sharable."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import zarr
from numpy.typing import ArrayLike, NDArray

from source_proj._errors import MismatchError, SourceProjError, write_remedy
from source_proj._io.calls import require_callable
from source_proj._io.executors import Executor, check_executor, map_in_order
from source_proj._io.files import publish
from source_proj._io.numbers import plain_numbers, whole_number
from source_proj._io.outputs import local_path
from source_proj._io.progress import Progress, progress_bar
from source_proj.evaluate._truth_files import (
    FORMAT,
    VERSION,
    Cell,
    array_of,
    checked,
    contrast,
    create,
    digest,
    grow,
    opened,
    plain,
    read_masks,
    read_outcomes,
    record,
)
from source_proj.evaluate.retrain import half_subsets

__all__ = ["GroundTruth", "TrainMany", "TrainOne"]

TrainOne = Callable[[NDArray[np.int64], int], ArrayLike]
"""``train(kept, seed)``: train on the examples ``kept``, measure the queries ``(Q,)``."""

TrainMany = Callable[[list[NDArray[np.int64]], list[int]], ArrayLike]
"""``train(kept, seeds)``: train one model for each pair, measure the queries with each ``(len(kept), Q)``."""

Cells = list[Cell]

Job = tuple[Cells, list[NDArray[np.int64]], list[int]]
"""Cells, the examples that each keeps, and the seed of each."""

_STRIDE = 1_000_003  # seeds of subset j: seed + j, then again _STRIDE further for every retraining of it


class GroundTruth:
    """What models retrained on subsets of the training set measured of the queries.

    A folder in zarr v3: ``masks`` ``(M, N)`` and ``outcomes`` ``(M, R, Q)``, one chunk per retraining, NaN where it is
    still to be done, each with a digest that proves where it belongs. Whatever a killed process had finished stays; any
    number of processes may fill one store.
    Make one with :meth:`subsets`, :meth:`leave_one_out` or :meth:`of_masks`, each of which opens the store again where
    it is there already, and refuses one that was made for something else.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> truth = GroundTruth.subsets(f"{folder}/truth", 10, 2, count=4, retrainings=3)
        >>> truth
        GroundTruth(4 subsets of 10 examples x 3 retrainings x 2 queries, 0 of 12 retrainings done)
        >>> def train(kept, seed):  # a user's own function: train on these, return each query's measurement
        ...     return [kept.sum(), len(kept)]
        >>> truth.fill(train, progress=False).complete
        True
        >>> truth.outcomes[0, :, 1]
        array([5., 5., 5.])
    """

    def __init__(self, path: str | Path) -> None:
        self.path = local_path(path)
        self._group, attributes = checked(self.path)
        self.seed = int(cast(int, attributes["seed"]))
        self.settings: dict[str, Any] = cast(dict[str, Any], attributes["settings"])
        self.masks: NDArray[np.bool_] = read_masks(self._group, self.path)

    def __repr__(self) -> str:
        m, r, q = self.shape
        done = m * r - len(self.missing())
        return (
            f"GroundTruth({m} subsets of {self.masks.shape[1]} examples x {r} retrainings x {q} queries, "
            f"{done} of {m * r} retrainings done)"
        )

    # Making one --------------------------------------------------------------------------------------------------

    @classmethod
    def of_masks(
        cls,
        path: str | Path,
        masks: ArrayLike,
        n_queries: int,
        *,
        retrainings: int = 1,
        seed: int = 0,
        settings: Mapping[str, Any] | None = None,
    ) -> "GroundTruth":
        """Make a store for any subsets, or open the one that is there.

        Args:
            path: the store's folder.
            masks: ``(M, N)`` bool; True marks an example that is kept.
            n_queries: Q.
            retrainings: models trained on each subset, R; a store that has fewer grows, one that has more keeps them.
            seed: where the retrainings' seeds start.
            settings: whatever else decides the outcomes (model, epochs, …), JSON-able: a store made under other
                settings is refused.

        Raises:
            TypeError: if masks are not boolean, settings not JSON-able, or a number is not whole.
            ValueError: for wrong shapes or numbers, an empty subset, or a path that is a URL.
            MismatchError: if there is a store of other subsets, queries, seed or settings.
            SourceProjError: if there is something else, or a damaged store.
        """
        kept = np.asarray(plain_numbers(masks))
        n_queries, retrainings = whole_number(n_queries, "n_queries"), whole_number(retrainings, "retrainings")
        if kept.dtype != np.bool_:
            raise TypeError(f"masks must be boolean, True for a kept example; got dtype {kept.dtype}")
        if kept.ndim != 2 or kept.size == 0:
            raise ValueError(f"masks must have shape (subsets, examples), got {kept.shape}")
        if not kept.any(axis=1).all():
            empty = np.flatnonzero(~kept.any(axis=1)).tolist()
            raise ValueError(f"subsets {empty[:10]} keep no example; there is nothing to train on")
        if n_queries < 1 or retrainings < 1:
            raise ValueError(f"n_queries and retrainings must be at least 1, got {n_queries} and {retrainings}")
        description = {
            "format": FORMAT,
            "version": VERSION,
            "seed": whole_number(seed, "seed"),
            "settings": plain(settings or {}),
            "subsets": digest(kept),
            "queries": n_queries,
        }
        where = local_path(path)
        if not where.exists():
            try:
                publish(where, lambda folder: create(folder, description, kept, retrainings))
            except OSError as error:
                remedy = f"{write_remedy(error)}, or give another path"
                raise SourceProjError(f"{where} cannot be made ({error}): {remedy}") from error
        truth = cls(where)
        truth._require(description)
        if retrainings > truth.shape[1]:
            grow(truth._group, truth.path, retrainings)
        return truth

    @classmethod
    def subsets(
        cls,
        path: str | Path,
        n: int,
        n_queries: int,
        *,
        count: int = 100,
        fraction: float = 0.5,
        retrainings: int = 1,
        seed: int = 0,
        settings: Mapping[str, Any] | None = None,
    ) -> "GroundTruth":
        """Random subsets that hold a ``fraction`` of the n examples: what :func:`lds` needs.

        Args:
            path: the store's folder.
            n: number of training examples, N.
            n_queries: Q.
            count: number of subsets, M.
            fraction: the sampling ratio α, in (0, 1).
            retrainings: models trained on each subset, R.
            seed: seed of the subsets, and where the retrainings' seeds start.
            settings: see :meth:`of_masks`.
        """
        masks = half_subsets(n, count, fraction=fraction, seed=seed)
        return cls.of_masks(path, masks, n_queries, retrainings=retrainings, seed=seed, settings=settings)

    @classmethod
    def leave_one_out(
        cls,
        path: str | Path,
        n: int,
        n_queries: int,
        examples: ArrayLike,
        *,
        retrainings: int = 1,
        seed: int = 0,
        settings: Mapping[str, Any] | None = None,
    ) -> "GroundTruth":
        """All n examples, then all but one of ``examples`` at a time: what :func:`leave_one_out` needs.

        Raises:
            ValueError: see :meth:`of_masks`; also for positions outside [0, n) or named twice.
        """
        left_out, n = np.asarray(plain_numbers(examples)), whole_number(n, "n")
        whole = left_out.ndim == 1 and left_out.size > 0 and np.issubdtype(left_out.dtype, np.integer)
        if not whole or left_out.min() < 0 or left_out.max() >= n or len(np.unique(left_out)) != len(left_out):
            raise ValueError(f"examples must be different positions from 0 to {n - 1}, got {left_out.tolist()}")
        masks = np.ones((len(left_out) + 1, n), dtype=bool)
        masks[np.arange(len(left_out)) + 1, left_out] = False
        return cls.of_masks(path, masks, n_queries, retrainings=retrainings, seed=seed, settings=settings)

    # Filling it --------------------------------------------------------------------------------------------------

    def fill(
        self,
        train: TrainOne | TrainMany,
        *,
        group: int | None = None,
        executor: Executor | None = None,
        shard: tuple[int, int] = (0, 1),
        progress: Progress = True,
    ) -> "GroundTruth":
        """Retrain what is still missing; every outcome is on the disk as soon as it is known.

        Args:
            train: without ``group``, ``train(kept, seed)``: trains on the examples at positions ``kept`` and returns
                each query's measurement ``(Q,)``, as numbers or a tensor, wherever it lies. With it,
                ``train(kept, seeds)`` gets lists of up to that many, and returns ``(len(kept), Q)``: for many small
                models in one tensor program (:func:`retrain`).
            group: how many models one call trains; None for one by one.
            executor: calls ``train``: a pool of processes, Dask's ``client.get_executor()``, or anything else shaped
                like :class:`concurrent.futures.Executor` whose workers see the store's folder. Python's own pool of
                processes takes functions of a module only, Dask and submitit closures too.
            shard: ``(i, n)``: do the i-th of n shares only, for processes started by hand or by a launcher.
            progress: show a progress bar.

        Raises:
            TypeError: if the executor is none, or train cannot be called so.
            ValueError: for numbers out of range, or measurements that are no numbers or not finite; names subset and
                seed.
            MismatchError: if ``train`` returns another shape.
            SourceProjError: if workers are lost again and again.
        """
        index, shards = (whole_number(number, "shard") for number in shard)
        if not 0 <= index < shards:
            raise ValueError(f"shard must be (i, n) with 0 <= i < n, got {shard}")
        group = None if group is None else whole_number(group, "group", least=1)
        check_executor(executor)
        require_callable(train, "train", "train(kept, seed)" if group is None else "train(kept, seeds)")
        todo = [cell for cell in self.missing() if (cell[0] + cell[1] * len(self.masks)) % shards == index]
        calls = [todo[start : start + (group or 1)] for start in range(0, len(todo), group or 1)]
        with progress_bar(progress, "retrain", len(todo), "models") as bar:
            function = partial(_retrain, train, group is not None, self.path.resolve())
            for done in map_in_order(executor, function, self._jobs(calls)):
                bar.update(done)
        return self

    def missing(self) -> list[tuple[int, int]]:
        """(subset, retraining) pairs still to be done: every subset's first retraining first, then the second ones.

        Raises:
            SourceProjError: if an outcome on the disk is damaged, or not of its place.
        """
        return self._read()[1]

    def verify(self) -> list[str]:
        """Read everything, and say what is wrong, one line each: nothing, for a store that can be relied on.

        Retrainings that are still to be done are no fault.
        """
        _, _, wrong = read_outcomes(self._group, self.path)
        return [f"{self.path}: the outcome of subset {j}, retraining {r} {what}" for (j, r), what in wrong.items()]

    def seeds(self, subset: int) -> list[int]:
        """Seeds of a subset's retrainings: other ones for every subset, the same however many there are."""
        return [self._seed(subset, r) for r in range(self.shape[1])]

    # Reading it --------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int, int]:
        """Subsets M, retrainings R, queries Q."""
        m, r, q = self._array("outcomes").shape
        return m, r, q

    @property
    def complete(self) -> bool:
        """Whether every retraining is done."""
        return not self.missing()

    @property
    def outcomes(self) -> NDArray[np.float64]:
        """Measurements ``(M, R, Q)``.

        Raises:
            SourceProjError: if retrainings are missing, or damaged on the disk.
        """
        outcomes, missing = self._read()
        if missing:
            raise SourceProjError(
                f"{self.path}: {len(missing)} of {outcomes.shape[0] * outcomes.shape[1]} retrainings are missing, the "
                f"first of them subset {missing[0][0]}, retraining {missing[0][1]}: call fill(train)"
            )
        return outcomes

    # Inside ------------------------------------------------------------------------------------------------------

    def _array(self, name: str) -> zarr.Array[Any]:
        return array_of(self._group, name, self.path)

    def _read(self) -> tuple[NDArray[np.float64], Cells]:
        """Measurements ``(M, R, Q)`` and cells still to be done."""
        outcomes, missing, wrong = read_outcomes(self._group, self.path)
        if wrong:
            files = [f"outcomes/c/{j}/{r}/0" for j, r in wrong]
            (j, r), what = next(iter(wrong.items()))
            more = f" and {len(files) - 5} more" if len(files) > 5 else ""
            raise SourceProjError(
                f"{self.path}: the outcome of subset {j}, retraining {r} {what}: remove {', '.join(files[:5])}{more} "
                "in it, and fill(train) does these retrainings again"
            )
        return outcomes, missing

    def _require(self, description: Mapping[str, Any]) -> None:
        for key, wanted in description.items():
            stored = self._group.attrs.get(key)
            if stored != wanted:
                raise MismatchError(
                    f"the ground truth in {self.path} was made with {contrast(key, stored, wanted)}: "
                    "give another path, or remove it"
                )

    def _seed(self, subset: int, retraining: int) -> int:
        return self.seed + subset + _STRIDE * retraining

    def _jobs(self, calls: Sequence[Cells]) -> Iterator[Job]:
        for cells in calls:
            kept, seeds = [np.flatnonzero(self.masks[j]) for j, _ in cells], [self._seed(j, r) for j, r in cells]
            yield cells, kept, seeds


def _retrain(train: Callable[..., ArrayLike], grouped: bool, path: Path, job: Job) -> int:
    """Train, check and write; return the number of retrainings.

    Where there is an executor its workers run this: what one has measured is on the disk, whatever happens to the
    others or to the process that started them.
    """
    cells, kept, seeds = job
    returned = train(kept, seeds) if grouped else [train(kept[0], seeds[0])]
    try:
        measured = np.asarray(plain_numbers(returned), dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"training on subset {cells[0][0]} with seed {seeds[0]} returned what holds no measurements ({error}): "
            "return a number for each query, as an array, a list or a tensor"
        ) from error
    queries = int(cast(int, opened(path)[1]["queries"]))
    if measured.shape != (len(cells), queries):
        raise MismatchError(
            f"train returned measurements of shape {measured.shape if grouped else measured.shape[1:]} for "
            f"{len(cells)} model(s) and {queries} queries; it must measure every query"
        )
    finite = np.isfinite(measured)
    whole = [i for i, row in enumerate(finite) if row.all()]
    record(path, [cells[i] for i in whole], measured[whole])
    if not finite.all():
        model, query = np.argwhere(~finite)[0]
        raise ValueError(
            f"training on subset {cells[model][0]} with seed {seeds[model]} measured {measured[model, query]} for "
            f"query {query} ({(~finite).sum()} such in this call); did it diverge?"
        )
    return len(cells)
