"""Training sets and queries as batches in a fixed order, so that a row's place says which example it is."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    Sampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from source_proj._errors import MismatchError
from source_proj._io.progress import Progress, progress_bar
from source_proj.bank.build.collation import Collation
from source_proj.bank.build.columns import Table, examples_of, splits_of

__all__ = [
    "Batch",
    "BatchSource",
    "Span",
    "batches",
    "by_stage",
    "checked_ids",
    "dataset_size",
    "to_device",
]

Batch = Any
Span = tuple[int, int]


class BatchSource:
    """A data set that is read in its own order, in batches.

    Args:
        data: a map-style data set (``__getitem__`` and ``__len__``), or a DataLoader of one, whose ``batch_size``,
            ``collate_fn`` and workers are then used. A ``datasets.Dataset`` or a pandas frame: see
            :func:`source_proj.bank.build.columns.examples_of`.
        batch_size: examples a batch, unless a DataLoader says.

    Raises:
        TypeError: for an iterable data set, or what is no data set.
        ValueError: for an empty data set, a shuffling sampler, ``drop_last``, or a loader without batches.

    Example:
        >>> source = BatchSource(["a", "b", "c"], batch_size=2)
        >>> list(source.load([(0, 3)]))
        [(0, 2, ['a', 'b']), (2, 3, ['c'])]
    """

    def __init__(self, data: Any, batch_size: int = 64) -> None:
        if isinstance(data, DataLoader):
            _refuse_reordering(data)
            self._options = _loader_options(data)
            data, batch_size = data.dataset, data.batch_sampler.batch_size
        else:
            self._options = {"collate_fn": default_collate}
        self._data = _checked_dataset(data)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer) or batch_size < 1:
            raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
        self.batch_size = int(batch_size)
        self.n: int = len(self._data)
        if self.n == 0:
            raise ValueError(f"the data set {_name(self._data)} is empty; give at least one example")
        self._collation = Collation(self._options["collate_fn"], _name(self._data))

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the numbers of a table's examples; none of other data."""
        return tuple(self._data.columns) if isinstance(self._data, Table) else ()

    def load(self, spans: Iterable[Span]) -> Iterator[tuple[int, int, Batch]]:
        """Yield ``(start, stop, batch)`` for the examples of each span; every span begins a batch of its own.

        Spans are asked for one by one, each when its first batch is needed (a loader's workers need some ahead).
        """
        cuts = _Cuts(spans, self.batch_size)
        if self._is_plain():
            # What a loader would do by one indexing a row and one stacking a batch, at once.
            for _ in cuts:
                start, stop = cuts.given.popleft()
                yield start, stop, [tensor[start:stop].clone() for tensor in self._data.tensors]
            return
        # Its own generator: a DataLoader draws a seed for its workers, and would take it from the global one.
        options = {**self._options, "collate_fn": self._collation}
        loader: DataLoader[Any] = DataLoader(
            self._data, batch_sampler=cuts, generator=torch.Generator().manual_seed(0), **options
        )
        with torch.device("cpu"):  # where the seed is drawn, also if torch's default device is another
            batches = iter(loader)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                if cuts.given:  # what a data set raises itself, a loader takes for the end
                    raise ValueError(f"StopIteration was raised for {self._next(cuts)}; give them by index") from None
                return
            except Exception as error:
                if cuts.given:
                    error.add_note(f"raised for {self._next(cuts)}")
                raise
            yield (*cuts.given.popleft(), batch)

    def _next(self, cuts: "_Cuts") -> str:
        """The examples of the batch that is asked for."""
        start, stop = cuts.given[0]
        return f"one of the examples {start} to {stop - 1} of {_name(self._data)}, which has {self.n}"

    def _is_plain(self) -> bool:
        plain_collate = self._options["collate_fn"] is default_collate
        return type(self._data) in (TensorDataset, Table) and plain_collate and not self._options.get("num_workers")


class _Cuts(Sampler[list[int]]):
    """Spans cut into batches."""

    def __init__(self, spans: Iterable[Span], batch_size: int) -> None:
        self._spans = spans
        self._size = batch_size
        self.given: deque[Span] = deque()  # ends of the batches that were asked for and not taken from the left yet

    def __iter__(self) -> Iterator[list[int]]:
        for start, stop in self._spans:
            for low in range(start, stop, self._size):
                high = min(stop, low + self._size)
                self.given.append((low, high))
                yield list(range(low, high))


def batches(
    data: Any,
    batch_size: int = 64,
    start: int = 0,
    stop: int | None = None,
    *,
    device: torch.device | str | None = None,
    progress: Progress = False,
    description: str = "examples",
) -> Iterator[tuple[int, Batch]]:
    """Yield ``(position of the first example, batch)`` over a data set or DataLoader, in its own order.

    Args:
        data: see :class:`BatchSource`, which also says what is refused.
        batch_size: examples a batch; a DataLoader brings its own.
        start: first example.
        stop: end of the examples; default: all.
        device: where the tensors go; default: where they are.
        progress: show a progress bar after two seconds; False for none, or a function of (description, done, total).
        description: what the bar says.

    Example:
        >>> data = TensorDataset(torch.arange(5))
        >>> [(first, batch[0].tolist()) for first, batch in batches(data, 2)]
        [(0, [0, 1]), (2, [2, 3]), (4, [4])]
    """
    source = BatchSource(data, batch_size)
    stop = source.n if stop is None else stop
    if not 0 <= start <= stop <= source.n:
        raise ValueError(f"start {start} and stop {stop} do not lie in order within the data set's {source.n} examples")
    with progress_bar(progress, description, stop - start, "examples") as bar:
        for low, high, batch in source.load([(start, stop)]):
            yield low, batch if device is None else to_device(batch, device)
            bar.update(high - low)


def dataset_size(data: Any) -> int:
    """Number of examples of a data set or DataLoader that :func:`batches` can read; refuses what that refuses."""
    return BatchSource(data).n


def by_stage(given: Any, names: Sequence[str], what: str) -> list[Any]:
    """What belongs to each stage: entries of a mapping, or the one thing for the one stage."""
    if splits_of(given) and set(given) >= set(names):  # the splits of other names are for other uses
        return [given[name] for name in names]
    if isinstance(given, Mapping) and (len(names) > 1 or set(given) == set(names)):
        if set(given) != set(names):
            raise ValueError(f"{what} has entries {list(given)}, and the stages are {list(names)}; give one each")
        return [given[name] for name in names]
    if len(names) > 1 and given is not None:
        raise TypeError(
            f"the trajectory has the stages {list(names)}: give {what} as {{stage name: ...}}, "
            f"got {type(given).__name__}"
        )
    return [given] * len(names)


def to_device(batch: Batch, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
    """The batch with every tensor on a device, and of a type if it is of floats; what is no tensor stays."""
    if isinstance(batch, Tensor):
        return batch.to(device, dtype if batch.is_floating_point() else None, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device, dtype) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device, dtype) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(value, device, dtype) for value in batch)
    return batch.to(device) if hasattr(batch, "to") else batch


def checked_ids(ids: Sequence[Any] | np.ndarray | None, start: int, n: int, stage: str) -> np.ndarray:
    """Ids ``(n,)`` of a stage's examples: int64, or an object array of strings; ``start, start + 1, …`` by default.

    Raises:
        MismatchError: their number is not that of the examples.
        TypeError: they are not all integers, or not all strings; or they have no order.
        ValueError: one occurs twice, does not fit 64 bits, or is no text that can be stored.
    """
    if ids is None:
        return np.arange(start, start + n, dtype=np.int64)
    if isinstance(ids, set | frozenset | Mapping | str | bytes):
        raise TypeError(
            f"ids must be in the order of the examples, got a {_name(ids)} for stage {stage!r}; give a list of them"
        )
    values = [given.item() if isinstance(given, np.generic | Tensor) else given for given in ids]
    if len(values) != n:
        raise MismatchError(f"stage {stage!r} has {n} examples and {len(values)} ids; give each example its id")
    strings = all(isinstance(value, str) for value in values)
    for value in values:
        _check_id(value, stage, string=strings)
    if len(set(values)) != n:
        seen: set[Any] = set()
        twice = next(value for value in values if value in seen or seen.add(value))  # type: ignore[func-returns-value]
        raise ValueError(f"id {twice!r} occurs twice in stage {stage!r}; ids must be unique")
    return np.array(values, dtype=object if strings else np.int64)


def _check_id(value: Any, stage: str, *, string: bool) -> None:
    if string:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"id {value!r} of stage {stage!r} holds half a surrogate pair, which UTF-8 cannot store "
                f"({error.reason}); give another id"
            ) from error
    elif isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"ids must all be integers or all be strings, got {value!r} in stage {stage!r}")
    elif not -(1 << 63) <= value < 1 << 63:
        raise ValueError(f"id {value} of stage {stage!r} does not fit 64 bits; make the ids strings")


def _checked_dataset(data: Any) -> Any:
    data = examples_of(data)
    if isinstance(data, IterableDataset):
        raise TypeError(
            f"{_name(data)} is an IterableDataset, whose examples have no fixed place; give a map-style data set: "
            "list(data) where it fits into memory, or load_dataset without streaming=True"
        )
    if isinstance(data, Iterator):
        raise TypeError(f"a {_name(data)} gives its examples once, and each checkpoint reads them: give list(...)")
    if isinstance(data, tuple | list):
        _refuse_batch(data)
    if isinstance(data, Mapping) and data and all(map(_is_column, data.values())):
        raise TypeError(
            f"got a {_name(data)} of the columns {[*map(str, data)][:5]} as a data set; give a list of its rows, "
            "[{name: column[i] for name, column in batch.items()} for i in range(n)], or [example] if it is a single "
            "example"
        )
    if isinstance(data, Mapping):
        raise TypeError(
            f"{_name(data)} of {[*map(str, data)][:5]} is no data set, and no batch unless tensors with examples in "
            "front are among them: give a list of one mapping an example, or tell a tokenizer return_tensors='pt'"
        )
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise TypeError(f"{_name(data)} is no map-style data set (with __getitem__ and __len__) and no DataLoader")
    return data


def _is_column(part: Any) -> bool:
    return isinstance(part, Tensor | np.ndarray) and part.ndim > 0


def _refuse_batch(data: Sequence[Any]) -> None:
    """Refuse what is one batch, or one example, and no sequence of examples.

    In a list tensors may be examples, which have as many dims each, though rows of several lengths.

    Raises:
        TypeError: says what it is taken for, and how it is given.
    """
    held = [isinstance(part, Tensor | np.ndarray) for part in data]
    if not any(held):
        return
    if not all(held):
        if all(isinstance(part, Tensor | np.ndarray | np.generic | int | float) for part in data):
            raise TypeError(f"got a {_name(data)} of arrays and numbers as a data set: of one example give [example]")
    elif isinstance(data, tuple) or len({part.ndim for part in data}) > 1:
        tensors = all(isinstance(part, Tensor) for part in data)
        what, given = ("tensors", "tensors") if tensors else ("numpy arrays", "map(torch.from_numpy, arrays)")
        raise TypeError(
            f"got a {_name(data)} of {len(data)} {what} as a data set; give TensorDataset(*{given}), or [example] if "
            "it is a single example"
        )


def _refuse_reordering(loader: DataLoader[Any]) -> None:
    if isinstance(loader.dataset, IterableDataset):
        _checked_dataset(loader.dataset)
    remedy = "rows would lose their ids; give DataLoader(dataset, batch_size=...) without shuffle, sampler or drop_last"
    by = next(kind for kind in type(loader).__mro__ if "__iter__" in vars(kind))
    if by is not DataLoader and not by.__module__.startswith("accelerate."):  # whose own moves batches to a device
        raise ValueError(
            f"the DataLoader is a {_name(loader)}, whose own __iter__ may give other batches than its data set's: do "
            "what it does in the data set or in collate_fn"
        )
    if loader.batch_sampler is None or type(loader.batch_sampler) is not BatchSampler:
        found = "batch_size=None" if loader.batch_sampler is None else f"a {_name(loader.batch_sampler)}"
        raise ValueError(f"the DataLoader has {found}: {remedy}")
    batches = loader.batch_sampler  # it was given, or made of the loader's own sampler
    if type(batches.sampler) is not SequentialSampler:
        raise ValueError(f"the DataLoader has a {_name(batches.sampler)}: {remedy}")
    data: Any = loader.dataset
    if hasattr(data, "__len__") and len(batches.sampler) != len(data):
        raise ValueError(
            f"the DataLoader has a SequentialSampler of {len(batches.sampler)} examples, and its data set has "
            f"{len(data)}: to take some of them, give Subset(dataset, range(...)) without a sampler"
        )
    if batches.drop_last:
        raise ValueError(f"the DataLoader has drop_last=True: {remedy}")


def _loader_options(loader: DataLoader[Any]) -> dict[str, Any]:
    names = ("collate_fn", "num_workers", "pin_memory", "timeout", "worker_init_fn", "prefetch_factor")
    return {
        **{name: getattr(loader, name) for name in names},
        "multiprocessing_context": loader.multiprocessing_context,
    }


def _name(thing: Any) -> str:
    return type(thing).__name__
