"""Whether a function that makes batches leaves every example in its place, and by itself.

Of a function f nobody knows what it does. It is given the same examples in another order, each alone, and some of them
elsewhere, and what it makes of them is compared, column by column.
"""

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from source_proj.bank.build.batch_hash import batch_hash

__all__ = ["Change", "change_of_places"]

Change: TypeAlias = Literal["moved", "shuffled", "mixed"]

_REPEATS = 20  # before what a function makes is said to be no draw: of two labels, one order in two is the other one
_FEW = 6  # examples, of which every two are exchanged
_ROUNDING = 1e-3  # of the largest value of a row; half precision rounds by half as much

_Path: TypeAlias = tuple[Any, ...]  # the keys and numbers under which a column lies in a batch


@dataclass(frozen=True)
class _Column:
    """What a batch holds for each example in one place."""

    values: Any
    digests: list[bytes]


_Rows: TypeAlias = dict[_Path, _Column]
_Make: TypeAlias = Callable[[Sequence[int]], _Rows]


def change_of_places(collate: Callable[[Any], Any], examples: list[Any], seed: int) -> Change | None:
    """What a function does to the places of examples, as far as can be told.

    Args:
        collate: makes a batch of a list of examples; what it draws from the global generators is drawn again later.
        examples: at least two; copies of them are given.
        seed: of the other orders.

    Returns:
        "moved" where a row is, alone, another example's; "shuffled" where the order is drawn; "mixed" where a row
        becomes another one when others change their places; None for none of these, or where nothing can be told.
    """

    def collated(places: Sequence[int]) -> Any:
        return collate([copy.deepcopy(examples[place]) for place in places])

    with _generators_kept():
        whole = collated(range(len(examples)))
        batch = _rows_of(_columns(whole, len(examples), ()), len(examples))

        def make(places: Sequence[int]) -> _Rows:
            return _rows_of(_columns_at(collated(places), len(places), batch), len(places))

        draw = random.Random(seed)
        for order in (_other_order(len(examples), draw), list(reversed(range(len(examples))))):
            elsewhere = make(order)
            # Two examples that change places do so also in the batch of a function that itself makes them do so.
            suspect = [path for path in batch if len(order) == 2 or not _follows(batch, elsewhere, path, order)]
            if suspect:
                return _judged(make, batch, elsewhere, order, suspect, draw)
        return None


def _judged(
    make: _Make, batch: _Rows, elsewhere: _Rows, order: list[int], suspect: list[_Path], draw: random.Random
) -> Change | None:
    steady, shuffled = _repeated(make, batch, suspect)
    # What another example is put beside, as a negative of a pair, is still the row of the one that stays.
    stays = any(_all_differ(batch[path]) for path in batch if path in steady or path not in suspect)
    if shuffled and not stays:
        return "shuffled"
    others, mixed = _not_by_themselves(make, batch, steady, draw)
    mixed += [path for path in shuffled if len(order) > 2 and _all_differ(batch[path])]
    stays = any(_all_differ(batch[path]) for path in batch if path not in suspect)
    if not stays and _shows_others(make, batch, elsewhere, order, others):
        return "moved"
    return "mixed" if mixed else None


def _follows(batch: _Rows, elsewhere: _Rows, path: _Path, order: list[int]) -> bool:
    """Whether a column's rows went where their examples went."""
    if path not in elsewhere:
        return True  # nothing to compare
    return elsewhere[path].digests == [batch[path].digests[place] for place in order]


def _same(batch: _Rows, other: _Rows, path: _Path) -> bool:
    return path not in other or batch[path].digests == other[path].digests


def _repeated(make: _Make, batch: _Rows, suspect: list[_Path]) -> tuple[list[_Path], list[_Path]]:
    """The columns that come out the same each time, and those that do but for the order of their rows."""
    places = range(len(next(iter(batch.values())).digests))
    steady, alike = list(suspect), list(suspect)
    for _ in range(_REPEATS):
        again = make(places)
        steady = [path for path in steady if _same(batch, again, path)]
        alike = [path for path in alike if path in again and _as_set(again[path]) == _as_set(batch[path])]
        if not alike:
            break
    varied = [path for path in alike if path not in steady and _tells_apart(batch[path].digests)]
    return steady, varied


def _as_set(column: _Column) -> list[bytes]:
    return sorted(column.digests)


def _all_differ(column: _Column) -> bool:
    return len(set(column.digests)) == len(column.digests)


def _tells_apart(digests: Sequence[Any]) -> bool:
    """Whether most are different, so that one that is met again is the same example's: labels of few classes aren't."""
    return 2 * len(set(digests)) > len(digests)


def _shows_others(make: _Make, batch: _Rows, elsewhere: _Rows, order: list[int], steady: list[_Path]) -> bool:
    """Whether a row of either batch is what another example is alone, and not what its own is."""
    alone = [_made_alone(make, place) for place in range(len(order))]
    known = [rows for rows in alone if rows]
    columns = [path for path in steady if all(path in rows for rows in [elsewhere, *known])]
    if len(known) > 1:  # no numbers of places
        columns = [path for path in columns if len({rows[path].digests[0] for rows in known}) > 1]
    if not columns or not _tells_apart([tuple(rows[path].digests[0] for path in columns) for rows in known]):
        return False

    def is_of(rows: _Rows, row: int, own: _Rows) -> bool:
        return bool(own) and all(_padded(rows[path].values[row], own[path].values[0]) for path in columns)

    # In either one they may be in order by chance.
    for rows, places in ((batch, range(len(order))), (elsewhere, order)):
        foreign = [row for row, place in enumerate(places) if not is_of(rows, row, alone[place])]
        if foreign and all(any(is_of(rows, row, own) for own in known) for row in foreign):
            return True
    return False


def _made_alone(make: _Make, place: int) -> _Rows:
    """The rows of one example; none where the function makes no batch of it."""
    try:
        return make([place])
    except Exception:  # of a function that needs several, or leaves this one out
        return {}


def _not_by_themselves(
    make: _Make, batch: _Rows, steady: list[_Path], draw: random.Random
) -> tuple[list[_Path], list[_Path]]:
    """The columns whose rows are not made of the example in their place alone, and those made of others beside it.

    The first ones include what does not change with the examples at all, as numbers of places, or where it sorts them.
    """
    count = len(next(iter(batch.values())).digests)
    if count == 2 or not steady:
        return steady, []
    fewer = make(range(count - 1)), make(range(1, count))  # time in front may be as long as the batch is large
    columns = [path for path in steady if all(path in rows for rows in fewer)]
    others, mixed = set(), set()
    for moving in _moving(count, draw):
        order = list(range(count))
        for place, other in pairwise([*moving, moving[0]]):
            order[place] = other
        changed = make(order)
        staying = [place for place in range(count) if place not in moving]
        for path in columns:
            after = changed.get(path, batch[path])
            if not all(_close(batch[path].values[row], after.values[row]) for row in staying):
                mixed.add(path)
            elif all(batch[path].digests[row] == after.digests[row] for row in moving):
                others.add(path)
    return [path for path in columns if path in others | mixed], [path for path in columns if path in mixed]


def _moving(count: int, draw: random.Random) -> list[list[int]]:
    """Places whose examples move on by one: every two of few, else random halves, each with the other half."""
    if count <= _FEW:
        return [list(two) for two in combinations(range(count), 2)]
    orders = [draw.sample(range(count), count) for _ in range(3)]
    return [half for order in orders for half in (order[: count // 2], order[count // 2 :])]


def _close(row: Any, other: Any) -> bool:
    """Whether rows are the same, but for the rounding of sums in another order."""
    if batch_hash([row]) == batch_hash([other]):
        return True
    if not isinstance(row, Tensor | np.ndarray) or not isinstance(other, Tensor | np.ndarray):
        return False
    row, other = _tensor(row), _tensor(other)
    if row.shape != other.shape or not row.is_floating_point() or not other.is_floating_point():
        return False
    return bool((row - other).abs().max() <= _ROUNDING * row.abs().max())


def _tensor(row: Tensor | np.ndarray) -> Tensor:
    return row if isinstance(row, Tensor) else torch.from_numpy(np.array(row))


def _other_order(count: int, draw: random.Random) -> list[int]:
    """An order that is told from itself after a reversal, or after all have moved on by one."""
    order = list(range(count))
    while True:
        draw.shuffle(order)
        backwards = [count - 1 - order[count - 1 - place] for place in range(count)]
        onwards = [(order[(place + 1) % count] - 1) % count for place in range(count)]
        if order != list(range(count)) and (count == 2 or order not in (backwards, onwards)):
            return order


def _padded(row: Any, alone: Any) -> bool:
    """Whether a row is what was made of its example alone, with one value more often at the ends of its dims."""
    if not isinstance(row, Tensor | np.ndarray) or not isinstance(alone, Tensor | np.ndarray):
        return batch_hash(row) == batch_hash(alone)
    row, alone = _tensor(row), _tensor(alone)
    if row.dtype != alone.dtype or row.dim() != alone.dim() or not alone.numel():
        return False
    if any(long < short for long, short in zip(row.shape, alone.shape, strict=True)):
        return False
    in_front = tuple(slice(0, size) for size in alone.shape)
    at_end = tuple(slice(long - size, long) for long, size in zip(row.shape, alone.shape, strict=True))
    return any(_is_within(row, alone, part) for part in (in_front, at_end))


def _is_within(row: Tensor, alone: Tensor, part: tuple[slice, ...]) -> bool:
    rest = torch.ones(row.shape, dtype=torch.bool, device=row.device)
    rest[part] = False
    padding = row[rest]
    return batch_hash(row[part]) == batch_hash(alone) and bool((padding == padding[:1]).all())


def _rows_of(columns: Iterable[tuple[_Path, Any]], count: int) -> _Rows:
    """Columns of a batch, by where they lie; those of things that cannot be compared are left out."""
    rows = {}
    for path, column in columns:
        try:
            rows[path] = _Column(column, [batch_hash([column[row]]) for row in range(count)])
        except TypeError:
            continue
    return rows


def _columns_at(batch: Any, count: int, paths: Iterable[_Path]) -> Iterator[tuple[_Path, Any]]:
    """What lies in the places that columns had in another batch, and has one entry for each example here, too."""
    for path in paths:
        column = batch
        for key in path:
            column = column[key]
        if not isinstance(column, Tensor | np.ndarray | Sequence) or not getattr(column, "ndim", 1):
            continue
        if len(column) == count:
            yield path, column


def _columns(batch: Any, count: int, path: _Path) -> Iterator[tuple[_Path, Any]]:
    """What has one entry for each example.

    Raises:
        ValueError: nothing has.
    """
    if isinstance(batch, PackedSequence):
        raise ValueError("its examples are mixed")
    if isinstance(batch, Tensor | np.ndarray):
        if batch.ndim and len(batch) == count:
            yield path, batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from _columns(value, count, (*path, key))
    elif isinstance(batch, list | tuple):
        yield from _columns_of_list(batch, count, path)


def _columns_of_list(batch: Sequence[Any], count: int, path: _Path) -> Iterator[tuple[_Path, Any]]:
    within = [
        [] if isinstance(value, Mapping) and len(batch) == count else list(_columns(value, count, (*path, place)))
        for place, value in enumerate(batch)
    ]
    if len(batch) == count and not all(within):
        yield path, batch  # a list of the examples; or of two columns of two, of which one is by step
    else:
        yield from (column for columns in within for column in columns)


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Nothing is drawn within from the generators that belong to all."""
    states, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002 (what functions draw from)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(states)
        np.random.set_state(numpys)  # noqa: NPY002
