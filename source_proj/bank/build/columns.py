"""Data sets with named columns, ``datasets.Dataset`` and pandas frames, as examples that a model can take."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

__all__ = ["Table", "arranged", "examples_of", "query_split", "splits_of"]

_LABELS = ("labels", "label", "target")
_TOKENS = "input_ids"


def examples_of(data: Any) -> Any:
    """A map-style data set of tensors for a ``datasets.Dataset`` or a pandas frame; whatever else is given, itself.

    A table, whose columns are all numbers, becomes (input, target): one float32 vector of the columns in their order,
    and the label. A ``datasets.Dataset`` of other columns becomes dicts of tensors, as transformers' Trainer takes
    them: ``label`` is called ``labels``, and columns of text are left out beside token columns; token sequences without
    labels are left so. One with a format or a transform of its own (``set_format``, ``set_transform``) is used as it
    is.

    Raises:
        ValueError: there is no label column, or several; or a column of text that nothing has tokenised.
        TypeError: the data are the splits of a ``DatasetDict``.
    """
    if splits_of(data):
        raise TypeError(f"the data have the splits {list(data)}: give one of them, as in data[{next(iter(data))!r}]")
    if _is_frame(data):
        names = [str(name) for name in data.columns]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"the column {twice!r} is there twice (names are compared as text): rename one of them")
        return _table({name: data.iloc[:, place].to_numpy() for place, name in enumerate(names)})
    if not _is_dataset(data) or data.format["type"] is not None:
        return data
    columns = dict(data.features)
    kinds = {name: str(getattr(feature, "dtype", "")) for name, feature in columns.items()}
    texts = [name for name, kind in kinds.items() if kind in ("string", "large_string")]
    if _TOKENS not in columns and texts:
        raise ValueError(
            f"the columns {texts} are text, which no model takes: tokenise them as the run did, by data.map(tokenizer) "
            "or source_proj.integrations.TextData"
        )
    if all(_is_number(kind) for kind in kinds.values()):
        numbers = data.with_format("numpy")
        return _table({name: np.asarray(numbers[:][name]) for name in columns})
    unlabelled = _TOKENS in columns and not any(name in _LABELS for name in columns)  # a collate_fn may make labels
    return _Rows(
        data, [name for name in columns if name not in texts], None if unlabelled else _label_of(list(columns))
    )


def splits_of(data: Any) -> Mapping[str, Any] | None:
    """The splits of a ``datasets.DatasetDict``; None for all else."""
    return data if isinstance(data, Mapping) and _is_from("datasets", data) else None


def query_split(data: Any) -> Any:
    """The queries of a ``datasets.DatasetDict``, its only split beside ``train``; whatever else is given, itself.

    Raises:
        ValueError: there is no such split, or several.
    """
    splits = splits_of(data)
    if splits is None:
        return data
    others = [name for name in splits if name != "train"]
    if len(others) != 1:
        raise ValueError(f"the data have the splits {list(splits)}: say which are the queries, as in data['test']")
    return splits[others[0]]


class _Rows:
    """Rows of a ``datasets.Dataset`` as dicts of tensors.

    Args:
        data: the data set.
        names: the columns to take.
        label: which of them is the label; None where none is.
    """

    def __init__(self, data: Any, names: Sequence[str], label: str | None) -> None:
        self._data = data.with_format("torch", columns=list(names))
        self._label = label

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = dict(self._data[index])
        if self._label is not None:
            row["labels"] = row.pop(self._label)
        return row


class Table(TensorDataset):
    """Rows of numbers with their labels.

    Args:
        inputs: ``(N, d)`` float32.
        targets: ``(N,)``.
        columns: names of the d numbers.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, columns: Sequence[str]) -> None:
        super().__init__(inputs, targets)
        self.columns = list(columns)

    def arranged(self, columns: Sequence[str]) -> "Table":
        """The same numbers in the order of these names.

        Raises:
            ValueError: one is missing, or there are others; names them.
        """
        missing = [name for name in columns if name not in self.columns]
        others = [name for name in self.columns if name not in columns]
        if missing or others:
            found = [*([f"lack {missing}"] if missing else []), *([f"have {others} besides"] if others else [])]
            raise ValueError(
                f"the training set has the columns {list(columns)}, and these examples {' and '.join(found)}: give "
                "those"
            )
        return Table(self.tensors[0][:, [self.columns.index(name) for name in columns]], self.tensors[1], columns)


def arranged(data: Any, columns: Sequence[str]) -> Any:
    """A table, or a frame, with its numbers in the order of these names; whatever else is given, itself."""
    table = examples_of(data)
    return table.arranged(columns) if columns and isinstance(table, Table) else data


def _table(columns: Mapping[str, np.ndarray]) -> Table:
    """Numbers ``(N, d)`` float32 and labels ``(N,)``, int64 where they are whole numbers or truth values."""
    label = _label_of(list(columns))
    for name, column in columns.items():
        if not _is_number(str(column.dtype)):
            remedy = "give the numbers of classes" if name == label else "turn it into numbers, or leave it out"
            raise ValueError(f"the column {name!r} holds {column.dtype} and no numbers: {remedy}")
    names = [name for name in columns if name != label]
    if not names:
        raise ValueError(f"the data have the label column {label!r} and no other: there is nothing to learn from")
    inputs = torch.from_numpy(np.stack([columns[name].astype(np.float32) for name in names], axis=1))
    targets = columns[label]
    if np.issubdtype(targets.dtype, np.floating) and np.isnan(targets).any():
        rows = np.flatnonzero(np.isnan(targets))
        raise ValueError(
            f"{len(rows)} of {len(targets)} labels are missing (NaN in the column {label!r}, at the rows "
            f"{rows[:10].tolist()}): drop these rows, as by frame.dropna(subset=[{label!r}]), or fill them"
        )
    kind = np.float32 if np.issubdtype(targets.dtype, np.floating) else np.int64
    return Table(inputs, torch.from_numpy(targets.astype(kind)), names)


def _label_of(names: Sequence[str]) -> str:
    labels = [name for name in names if name in _LABELS]
    if len(labels) != 1:
        raise ValueError(
            f"the columns are {list(names)}, of which {labels or 'none'} may be the label: call one of them 'label'"
        )
    return labels[0]


def _is_number(kind: str) -> bool:
    return kind.startswith(("int", "uint", "float", "bool"))


def _is_frame(data: Any) -> bool:
    return _is_from("pandas", data) and hasattr(data, "iloc") and hasattr(data, "columns")


def _is_dataset(data: Any) -> bool:
    """Whether it is a ``datasets.Dataset``; a streamed one has no length, and no rows by number."""
    return _is_from("datasets", data) and hasattr(data, "features") and hasattr(data, "__len__")


def _is_from(package: str, data: Any) -> bool:
    """Whether an object's class, or one that it inherits from, is a package's; the package is not imported for it."""
    return any(kind.__module__.split(".")[0] == package for kind in type(data).__mro__)
