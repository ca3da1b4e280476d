"""What every verb of this room returns: which examples, why, and the data set without (or with nothing but) them."""

from __future__ import annotations

import json
import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from source_proj._errors import MismatchError, SourceProjError, extra
from source_proj._io.html import escape, table, wrapped
from source_proj._io.outputs import from_home, local_path, require_free, write_output
from source_proj._io.printable import printable
from source_proj.attribution.words import id_of, id_word, plain_ids, plain_number
from source_proj.bank.examples import Example, Examples
from source_proj.curate.files import write_kept
from source_proj.curate.kept import annotate, take

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Cleaning"]

_FORMAT = "source-proj cleaning 1"
_SHOWN = 10


@dataclass(frozen=True, eq=False)
class Cleaning:
    """Examples of a training set that a verb proposes to drop, or to keep alone, each with its reason.

    It is a proposal: look at the examples, take back those that are right (:meth:`without`), and judge the rest by
    retraining (:func:`source_proj.curate.verify`).

    Attributes:
        what: how the examples were found, for people.
        ids: the examples' ids, the strongest case first.
        reasons: a sentence for each.
        values: numbers behind the reasons, by name, ``(n,)`` each.
        train_ids: ids of the whole training set, in its order, each once.
        selects: whether the examples named are those to keep; by default they are those to drop.
        examples: how the training examples are shown beside the reasons; None where that is not known.

    Example:
        >>> cleaning = Cleaning("by hand", ["b"], ["it is a copy of 'a'"], {}, ["a", "b", "c"])
        >>> cleaning
        Cleaning(by hand: drops 1 of 3 examples)
        >>> cleaning.kept, cleaning.apply(["first", "second", "third"])
        (array([0, 2]), ['first', 'third'])
    """

    what: str
    ids: list[Any]
    reasons: list[str]
    values: Mapping[str, np.ndarray]
    train_ids: list[Any]
    selects: bool = False
    examples: Examples | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        lengths = {"reasons": len(self.reasons), **{name: len(column) for name, column in self.values.items()}}
        for name, length in lengths.items():
            if length != len(self.ids):
                raise MismatchError(f"got {len(self.ids)} ids and {length} {name}: give one for each")
        if len(set(self.ids)) != len(self.ids):
            raise ValueError("an example is named twice: name each once")
        self._positions  # noqa: B018 (refuses unknown and repeated ids)

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[tuple[Any, str]]:
        """Yield ``(id, reason)`` for each example named."""
        yield from zip(self.ids, self.reasons, strict=True)

    def __repr__(self) -> str:
        verb = "keeps" if self.selects else "drops"
        return f"Cleaning({self.what}: {verb} {len(self)} of {len(self.train_ids)} examples)"

    def __str__(self) -> str:
        """The first examples and their reasons, made harmless for a terminal."""
        lines = [printable(repr(self))]
        for place, (its_id, reason) in enumerate(list(self)[:_SHOWN]):
            lines.append(printable(f"{id_word(its_id)}: {reason}"))
            if words := self.example(place).line:
                lines.append(printable(f"    {words}"))
        more = [] if len(self) <= _SHOWN else [f"... and {len(self) - _SHOWN} more"]
        return "\n".join([*lines, *more])

    def _repr_html_(self) -> str:
        shown = [self.example(place) for place in range(min(len(self), _SHOWN))]
        columns = {
            "example": [example._repr_html_() for example in shown],
            "id": [escape(id_word(example.id)) for example in shown],
            "label": [escape(example.label) for example in shown],
            "reason": [escape(reason) for reason in self.reasons[:_SHOWN]],
        }
        known = {name: column for name, column in columns.items() if any(column) or name in ("id", "reason")}
        left = f". The first {_SHOWN}:" if len(self) > _SHOWN else ""
        return wrapped(f"{self!r}{left}", table(list(known), zip(*known.values(), strict=True)))

    def example(self, place: int) -> Example:
        """The example named at a place, with what is known of it."""
        known, its_id = self._known, self.ids[place]
        return Example(its_id) if known is None else known.show(int(self._positions[place]), its_id)

    def with_examples(self, examples: Any, **options: Any) -> Cleaning:
        """The same with its examples shown beside the reasons, in notebooks and lines of text.

        Args:
            examples: the training set, or :class:`source_proj.Examples` of it.
            options: as for :class:`source_proj.Examples`, of a training set.

        Raises:
            MismatchError: it has another number of examples than the training set.
        """
        shown = examples if isinstance(examples, Examples) else Examples(examples, **options)
        if len(shown) != len(self.train_ids):
            raise MismatchError(
                f"got {len(shown)} examples to show for a training set of {len(self.train_ids)}: give the training set"
            )
        return replace(self, examples=shown)

    # Which --------------------------------------------------------------------------------------------------------

    @cached_property
    def _positions(self) -> np.ndarray:
        place = {train_id: position for position, train_id in enumerate(self.train_ids)}
        if len(place) != len(self.train_ids):
            again, count = Counter(self.train_ids).most_common(1)[0]
            raise ValueError(
                f"the training id {again!r} stands for {count} examples, so that it names none: give each an id of its "
                "own"
            )
        unknown = [its_id for its_id in self.ids if its_id not in place]
        if unknown:
            raise ValueError(f"unknown training ids {unknown[:5]}; the first known ones are {self.train_ids[:5]}")
        return np.array([place[its_id] for its_id in self.ids], dtype=np.int64)

    @property
    def _known(self) -> Examples | None:
        """How examples are shown, unless those given are others: a bank may have grown since it was told."""
        known = self.examples
        return known if known is not None and len(known) == len(self.train_ids) else None

    @property
    def kept(self) -> np.ndarray:
        """Positions of the examples that are kept, in the order of the training set, int64."""
        return np.flatnonzero(self._mask == self.selects)

    @property
    def dropped(self) -> np.ndarray:
        """Positions of the examples that are dropped, in the order of the training set, int64."""
        return np.flatnonzero(self._mask != self.selects)

    @property
    def _mask(self) -> np.ndarray:
        named = np.zeros(len(self.train_ids), dtype=bool)
        named[self._positions] = True
        return named

    def first(self, n: int) -> Cleaning:
        """The n strongest cases alone; all, where there are fewer.

        Raises:
            TypeError, ValueError: n is no whole number, or is negative.
        """
        if operator.index(n) < 0:
            raise ValueError(f"n must be the number of cases to take, at least 0, got {n}")
        return self._only(list(range(len(self)))[:n])

    def without(self, ids: Sequence[Any]) -> Cleaning:
        """The cases that are left when some are taken back.

        Raises:
            ValueError: an id is not among those named.
        """
        is_one = isinstance(ids, str | int) or getattr(ids, "ndim", None) == 0
        given = [id_of(its_id) for its_id in ([plain_number(ids)] if is_one else ids)]
        named, right = set(self.ids), set(given)
        unknown = [its_id for its_id in given if its_id not in named]
        if unknown:
            raise ValueError(f"{unknown[:5]} are not among the {len(self)} examples that this cleaning names")
        return self._only([place for place, its_id in enumerate(self.ids) if its_id not in right])

    def of_stage(self, name: str) -> Cleaning:
        """The part of one training stage, whose ids are no longer pairs.

        Raises:
            ValueError: the training set has no such stage.
        """
        stages = [entry[0] if isinstance(entry, tuple) else None for entry in self.train_ids]
        if name not in stages:
            raise ValueError(f"the stages are {sorted({s for s in stages if s is not None})}, got {name!r}")
        part = self._only([place for place, its_id in enumerate(self.ids) if its_id[0] == name])
        places = [place for place, entry in enumerate(self.train_ids) if entry[0] == name]
        own = [self.train_ids[place][1] for place in places]
        shown = None if self._known is None else self._known.at(places)
        return replace(part, ids=[entry[1] for entry in part.ids], train_ids=own, examples=shown)

    def _only(self, places: list[int]) -> Cleaning:
        return replace(
            self,
            ids=[self.ids[place] for place in places],
            reasons=[self.reasons[place] for place in places],
            values={name: np.asarray(column)[places] for name, column in self.values.items()},
        )

    # What becomes of the data ------------------------------------------------------------------------------------

    def apply(self, data: Any, *, split: str = "train") -> Any:
        """The data set with the kept examples alone, in their order.

        Args:
            data: the training set: a ``datasets.Dataset`` or ``DatasetDict``, a pandas frame, a list, or a map-style
                data set, of which a :class:`torch.utils.data.Subset` is returned.
            split: which split of a ``DatasetDict`` is the training set; the others stay as they are.

        Raises:
            MismatchError: the data set has another number of examples than the training set.
        """
        self._require_one_stage()
        return take(data, self.kept, len(self.train_ids), split)

    def annotate(self, data: Any, *, split: str = "train") -> Any:
        """The whole data set with new columns: whether each example is ``kept``, the ``reason``, and the numbers.

        Args:
            data: a ``datasets.Dataset`` or ``DatasetDict``, or a pandas frame; left as it is.
            split: as for :meth:`apply`.

        Raises:
            MismatchError: the data set has another number of examples than the training set.
            ValueError: it has a column of such a name already.
            TypeError: it has no columns.
        """
        self._require_one_stage()
        return annotate(data, self.columns(), len(self.train_ids), split)

    def columns(self) -> dict[str, list[Any]]:
        """What :meth:`annotate` adds: a value for each training example; None where it is not named."""
        kept = (self._mask == self.selects).tolist()
        named: dict[str, list[Any]] = {"reason": self.reasons}
        named |= {name: np.asarray(column).tolist() for name, column in self.values.items()}
        columns: dict[str, list[Any]] = {"kept": kept}
        for name, values in named.items():
            columns[name] = [None] * len(kept)
            for position, value in zip(self._positions.tolist(), values, strict=True):
                columns[name][position] = value
        return columns

    def write(
        self,
        source: str | Path,
        out: str | Path,
        *,
        overwrite: bool = False,
        encoding: str = "utf-8",
        delimiter: str = ",",
        annotated: bool = False,
    ) -> None:
        """Write the training set's file without the dropped examples; every other byte is as it was.

        Of a ``.csv`` and a ``.jsonl`` file the dropped records' bytes are left out, and nothing else: quotes, line
        ends, encoding, byte order mark, empty lines and a missing last line end stay. A ``.parquet`` file keeps its
        schema, metadata, row groups and compression. A folder that ``datasets`` saved keeps its features.

        Args:
            source: the file (or folder) that the training set was read from, a record for each example, in order.
            out: where to write it; may be the source itself, with ``overwrite``.
            overwrite: replace what is at ``out``.
            encoding: of a text file that begins with no byte order mark.
            delimiter: of a ``.csv`` file.
            annotated: leave all examples in, and add the columns of :meth:`annotate` (``.parquet`` and folders).

        Raises:
            MismatchError: the file has another number of records than the training set has examples.
            FileExistsError: something is at ``out`` that may not be overwritten.
            ValueError: the file is of another kind, two different kinds are named, or ``out`` lies within the source's
                folder or the source within it.
        """
        self._require_one_stage()
        columns = self.columns() if annotated else None
        write_kept(
            from_home(source),
            local_path(out),
            self.dropped,
            len(self.train_ids),
            columns=columns,
            overwrite=overwrite,
            encoding=encoding,
            delimiter=delimiter,
        )

    # As a table and as a file ------------------------------------------------------------------------------------

    def to_pandas(self) -> pd.DataFrame:
        """A row for each example named: ``id``, ``position``, the numbers, ``reason`` (needs the ``pandas`` extra)."""
        with extra("pandas"):
            import pandas as pd
        columns = {"position": self._positions, **self.values, "reason": np.array(self.reasons, dtype=object)}
        arrays = {name: np.asarray(column) for name, column in columns.items()}
        # Columns of nothing have their kinds all the same: positions of no rows are those of iloc, too.
        frame = pd.DataFrame({name: array.tolist() if len(self) else array for name, array in arrays.items()})
        frame.insert(0, "id", pd.Series(self.ids, dtype=object).infer_objects())
        return frame

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write ids, reasons and numbers to a ``.json`` file, which :meth:`load` reads.

        Raises:
            FileExistsError: something is there that may not be overwritten.
            TypeError: an id is no number, string, or tuple of such.
        """
        content = {
            "format": _FORMAT,
            "what": self.what,
            "selects": self.selects,
            "ids": plain_ids(self.ids),
            "reasons": self.reasons,
            "values": {name: _plain_column(column) for name, column in self.values.items()},
            "train_ids": plain_ids(self.train_ids),
        }
        encoded = json.dumps(content, indent=1).encode()
        path = local_path(path)
        require_free(path, overwrite=overwrite)
        write_output(path, encoded, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path) -> Cleaning:
        """Read what :meth:`save` wrote.

        Raises:
            SourceProjError: the file holds no cleaning.
            FileNotFoundError: there is no such file.
        """
        path = from_home(path)
        if not path.exists():
            raise FileNotFoundError(f"there is no {str(path)!r}: give the file that Cleaning.save or --list wrote")
        try:
            content = json.loads(path.read_bytes())
            if content["format"] != _FORMAT:
                raise ValueError(f"it says {content['format']!r} and not {_FORMAT!r}")
            return cls(
                str(content["what"]),
                [id_of(its_id) for its_id in content["ids"]],
                [str(reason) for reason in content["reasons"]],
                {str(name): _column(plain) for name, plain in content["values"].items()},
                [id_of(its_id) for its_id in content["train_ids"]],
                bool(content["selects"]),
            )
        except (ValueError, TypeError, KeyError, AttributeError, MismatchError) as error:
            raise SourceProjError(
                f"{str(path)!r} holds no list of a cleaning ({type(error).__name__}: {error}): give the file that "
                "Cleaning.save or --list wrote"
            ) from error

    def _require_one_stage(self) -> None:
        stages = {entry[0] for entry in self.train_ids if isinstance(entry, tuple)}
        if stages:
            raise ValueError(f"the training set has the stages {sorted(stages)}: take one by of_stage(name)")


def _plain_column(column: np.ndarray) -> list[Any]:
    """Numbers as JSON can hold them: one that is not known, NaN, is null there."""
    return [None if value != value else value for value in np.asarray(column).tolist()]


def _column(plain: Sequence[Any]) -> np.ndarray:
    """The numbers that :func:`_plain_column` made this of."""
    return np.asarray([np.nan if value is None else value for value in plain])
