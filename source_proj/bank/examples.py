"""Examples of a data set as people see them: text, picture or a small table, with label and file."""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset

from source_proj._io.html import escape, table
from source_proj._io.pictures import image_uri
from source_proj.bank.build.columns import Table, examples_of
from source_proj.task import Answer

__all__ = ["Example", "Examples", "KnownExamples"]

ClassNames = Sequence[str] | Mapping[Any, str]
Picture = tuple[int, ...] | Callable[[Any], Any]

_UNCOUNTED = -100  # transformers' label of tokens that do not count
_CELLS = 12  # numbers of a row that are shown
_MORE = "…"
_SMALL = 64  # pixels; a picture of fewer is shown pixel by pixel
_BEFORE = 12  # tokens that are shown before the one that a query asks about
_LINE = 72  # characters of an example in a line
_WORDS = 280  # characters of a text in a notebook


@dataclass(frozen=True)
class Example:
    """One example as a reader sees it.

    Attributes:
        id: its id in the training set or among the queries.
        label: its label, as words; empty where it has none.
        image: a ``data:`` address of its picture, or None.
        text: its text, shown where there is no picture.
        prediction: what the model says of it, or the class that it was asked about, as words, or None.
        row: names and values of a row of numbers, shown where there is neither picture nor text.
        file: the file that it was read from, or None.
        probability: of the prediction, or None; see :class:`Answer`.
        verb: what stands before the prediction; see :class:`Answer`.
        pixelated: whether the picture is so small that its pixels are shown as squares.
        measured: its measurement, as words; empty where that is not known.
    """

    id: Any
    label: str = ""
    image: str | None = None
    text: str | None = None
    prediction: str | None = None
    row: tuple[tuple[str, str], ...] = ()
    file: str | None = None
    probability: float | None = None
    verb: str = "predicted"
    pixelated: bool = False
    measured: str = ""

    def with_answer(self, answer: Answer, words: str) -> "Example":
        """The same with what the model said of it, or was asked about, in words."""
        return replace(self, prediction=words, probability=answer.probability, verb=answer.verb)

    @property
    def continues(self) -> bool:
        """Whether the prediction is text that goes on from the example's."""
        return self.verb == "continued by"

    @property
    def said(self) -> str:
        """What the model says of it, with what probability; empty where that was not asked."""
        if self.prediction is None:
            return ""
        words, share = (f"“{self.prediction}”", " a token") if self.continues else (self.prediction, "")
        return words if self.probability is None else f"{words} (probability {self.probability:.3g}{share})"

    @property
    def verdict(self) -> str:
        """The same after its verb, such as "predicted cat (probability 0.9)"; else what was measured."""
        return f"{self.verb} {self.said}" if self.said else self.measured

    @property
    def description(self) -> str:
        """What a screen reader says of the picture."""
        words = f"example {self.id}" + (f", label {self.label}" if self.label else "")
        return f"{words}, {self.verdict}" if self.verdict else words

    @property
    def words(self) -> str:
        """The example in one line: its text, its file, or its numbers; empty where it is a picture alone."""
        if self.text is not None:
            return " ".join(self.text.split())
        if self.file is not None:
            return self.file
        if self.row and self.row[-1][0] == _MORE:  # a long row says nothing in a line
            return ""
        return ", ".join(f"{name}={value}" for name, value in self.row)

    @property
    def line(self) -> str:
        """The same, cut where it is long."""
        return self.words if len(self.words) <= _LINE else self.words[: _LINE - 2] + " …"

    def _repr_html_(self) -> str:
        if self.image is not None:
            smooth = ";image-rendering:pixelated" if self.pixelated else ""
            size = 'style="min-width:64px;max-width:160px' + smooth + '"'
            return f'<img {size} src="{escape(self.image)}" alt="{escape(self.description)}">'
        if self.text is not None:
            text = self.text if len(self.text) <= _WORDS else self.text[:_WORDS] + " …"
            return f'<span style="white-space:pre-wrap">{escape(text)}</span>'
        if self.row:
            return table([name for name, _ in self.row], [[escape(value) for _, value in self.row]])
        return escape(self.file or "")


class Examples:
    """How the examples of a data set are shown, in notebooks, on the command line and on pages.

    Args:
        data: map-style data set or DataLoader of (input, label) or of dicts, a mapping of them by stage, or inputs
            alone.
        picture: how an input becomes a picture: the shape that it is given, such as (8, 8) for 64 pixels in a row, or
            a function. Default: arrays ``(H, W)``, ``(1, H, W)`` or ``(3, H, W)`` and their like are pictures;
            nothing else is guessed.
        class_names: names of the classes; default: the data set's own ``classes``, else labels as they are.
        columns: names of the numbers of a row; default: those of a frame's columns, else x0, x1, …
        tokenizer: whose ``decode`` makes a text of ``input_ids``.

    Attributes:
        sources: the data sets or DataLoaders that were given, one a stage.

    Example:
        >>> shown = Examples([("good film", 1), ("bad film", 0)], class_names=["no", "yes"]).show(0, id="a")
        >>> shown.text, shown.label
        ('good film', 'yes')
    """

    def __init__(
        self,
        data: Any,
        *,
        picture: Picture | None = None,
        class_names: ClassNames | None = None,
        columns: Sequence[str] | None = None,
        tokenizer: Any = None,
    ) -> None:
        parts = list(data.values()) if isinstance(data, Mapping) and not _is_columns(data) else [data]
        self.sources: list[Any] = parts
        self._parts: list[Any] = [_shown_of(part.dataset if isinstance(part, DataLoader) else part) for part in parts]
        self.picture, self.class_names, self.columns, self.tokenizer = picture, class_names, columns, tokenizer

    def like(self, data: Any) -> "Examples":
        """Another data set's examples, shown in the same way."""
        return Examples(
            data, picture=self.picture, class_names=self.class_names, columns=self.columns, tokenizer=self.tokenizer
        )

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __repr__(self) -> str:
        return f"Examples({len(self)} of {', '.join(type(part).__name__ for part in self._parts)})"

    def at(self, places: Sequence[int]) -> "Examples":
        """Those at some places, in that order."""
        return self.like(Subset(ConcatDataset(self._parts), list(places)))

    def said(self, value: Any) -> str:
        """What a model said: the name of a class, or the text of its tokens."""
        if isinstance(value, list):
            return str(self.tokenizer.decode(value)) if self.tokenizer is not None else f"tokens {value}"
        names = self.class_names if self.class_names is not None else getattr(self._parts[0], "classes", None)
        return _name(value, names)

    def tokens(self, index: int) -> list[str] | None:
        """Each token of an example in words, those that are predicted as its labels have them; None where unknown.

        Raises:
            IndexError: there is no such example.
        """
        part, place = self._place(index)
        given, labels = _split(part[place])
        ids = given.get("input_ids") if isinstance(given, Mapping) else given
        if self.tokenizer is None or ids is None or np.ndim(ids) != 1:
            return None
        predicted = ids if np.shape(labels) != np.shape(ids) else labels
        pairs = zip(predicted, ids, strict=True)
        return [str(self.tokenizer.decode([int(read if token == _UNCOUNTED else token)])) for token, read in pairs]

    def show(self, index: int, id: Any, prediction: Any = None) -> Example:
        """The example at a place, of all stages together.

        Raises:
            IndexError: there is none.
        """
        return self._show(*self._place(index), id, prediction)

    def _place(self, index: int) -> tuple[Any, int]:
        """The stage's data set that an example is of, and its place there."""
        place = index
        for part in self._parts:
            if place < len(part):
                return part, place
            place -= len(part)
        raise IndexError(f"there is no example {index} among {len(self)}")

    def searched(self) -> Iterator[tuple[str, str]]:
        """Text and label of each example in order, without making its picture: what a search looks at."""
        for part in self._parts:
            for index in range(len(part)):
                base, place = _origin(part, index)
                names = self.class_names if self.class_names is not None else getattr(base, "classes", None)
                given, label = base.words(place) if hasattr(base, "words") else _split(part[index])
                yield self._text(given) or "", _name(label, names)

    def _show(self, data: Any, index: int, id: Any, prediction: Any) -> Example:
        base, place = _origin(data, index)
        names = self.class_names if self.class_names is not None else getattr(base, "classes", None)
        said = None if prediction is None else _name(prediction, names)
        if hasattr(base, "words"):  # a file of texts, which knows them
            text, label = base.words(place)
            return Example(id, _name(label, names), text=text, prediction=said)
        given, label = _split(data[index])
        samples = getattr(base, "samples", None)  # torchvision's folders of pictures
        file = str(samples[place][0]) if isinstance(samples, list) and isinstance(samples[place], tuple) else None
        text = self._text(given)
        value = given.get("pixel_values", given.get("image")) if isinstance(given, Mapping) else given
        image = None if text is not None else self._image(value)
        columns = self.columns if self.columns is not None else base.columns if isinstance(base, Table) else None
        row = () if text is not None or image is not None else _row(value, columns)
        size = min(np.shape(self._shaped(value))[-2:], default=0) if image is not None else 0
        return Example(id, _name(label, names), image, text, said, row, file, pixelated=0 < size < _SMALL)

    def _text(self, given: Any) -> str | None:
        if isinstance(given, str):
            return given
        if isinstance(given, Mapping) and isinstance(given.get("text"), str):
            return str(given["text"])
        tokens = given.get("input_ids") if isinstance(given, Mapping) else given
        if self.tokenizer is None or tokens is None:
            return None
        asked = _asked_token(given)
        if asked is not None:
            place, token = asked
            return f"{self.tokenizer.decode(tokens[max(0, place - _BEFORE) : place])} → {self.tokenizer.decode(token)}"
        if isinstance(given, Mapping) and given.get("attention_mask") is not None:
            tokens = [int(t) for t, read in zip(tokens, given["attention_mask"], strict=True) if read]
        return str(self.tokenizer.decode(tokens))

    def _shaped(self, value: Any) -> Any:
        if callable(self.picture):
            return self.picture(value)
        if self.picture is not None:
            pixels = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
            try:
                return pixels.reshape(self.picture)
            except ValueError:
                raise ValueError(
                    f"an input of {pixels.size} numbers has no shape {self.picture}: give one of as many, picture= "
                    "(--picture)"
                ) from None
        return value

    def _image(self, value: Any) -> str | None:
        try:
            return None if value is None else image_uri(self._shaped(value))
        except ImportError:  # without Pillow there are no pictures
            return None


def _shown_of(data: Any) -> Any:
    """A table as the build reads it; all else as it is."""
    try:
        read = examples_of(data)
    except (TypeError, ValueError):
        return data
    return read if isinstance(read, Table) else data


def _is_columns(data: Mapping[Any, Any]) -> bool:
    """Whether a mapping holds columns of one data set, not data sets by stage."""
    return bool(data) and all(isinstance(value, Tensor | np.ndarray) for value in data.values())


def _origin(data: Any, index: int) -> tuple[Any, int]:
    """The data set that a subset is one of, and the place there."""
    while True:
        if hasattr(data, "dataset") and hasattr(data, "indices"):
            data, index = data.dataset, int(data.indices[index])
        elif isinstance(data, ConcatDataset):
            part = bisect_right(data.cumulative_sizes, index)
            index -= data.cumulative_sizes[part - 1] if part else 0
            data = data.datasets[part]
        else:
            return data, index


def _split(item: Any) -> tuple[Any, Any]:
    """Input and label of an item; the label is None where it has none."""
    if isinstance(item, Mapping):
        return item, item.get("labels", item.get("label"))
    if isinstance(item, tuple | list):
        return (item[0], item[1]) if len(item) > 1 else (item[0], None)
    return item, None


def _asked_token(given: Any) -> tuple[int, Any] | None:
    """Place and token of a query about a single token."""
    labels = given.get("labels") if isinstance(given, Mapping) else None
    if not isinstance(labels, Tensor) or labels.ndim != 1:
        return None
    counted = (labels != _UNCOUNTED).nonzero()[:, 0].tolist()
    return (counted[0], labels[counted[0]]) if len(counted) == 1 else None


def _row(value: Any, columns: Sequence[str] | None) -> tuple[tuple[str, str], ...]:
    """The first numbers of a row, with their names."""
    if not isinstance(value, Tensor | np.ndarray) or value.ndim != 1:
        return ()
    numbers = value.tolist()
    names = [f"x{place}" for place in range(len(numbers))] if columns is None else list(columns)
    shown = [(str(name), f"{number:.4g}") for name, number in zip(names, numbers, strict=False)][:_CELLS]
    return tuple([*shown, (_MORE, f"{len(numbers) - _CELLS} more")] if len(numbers) > _CELLS else shown)


def _name(label: Any, class_names: ClassNames | None) -> str:
    if not isinstance(label, int | str):  # which most are, and a search reads them all
        if hasattr(label, "item") and math.prod(label.shape) == 1:
            label = label.item()
        if label is None or np.ndim(label) > 0:  # of a sequence, its tokens are the labels
            return ""
    if class_names is None or isinstance(label, str):
        return f"{label:.4g}" if isinstance(label, float) else str(label)
    if isinstance(class_names, Sequence) and isinstance(label, int) and label < 0:
        return str(label)  # -1 stands for no label in many data sets, and not for the last class
    try:
        return str(class_names[label])
    except (KeyError, IndexError, TypeError):
        return str(label)


class KnownExamples:
    """The attribute of a bank that holds its :class:`Examples`, or None; it takes nothing else."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_{name}"

    def __get__(self, instance: Any, owner: type | None = None) -> Examples | None:
        return None if instance is None else instance.__dict__.get(self._name)

    def __set__(self, instance: Any, examples: Any) -> None:
        if examples is not None and not isinstance(examples, Examples):
            kind = type(examples).__name__
            raise TypeError(f"bank.examples must be source_proj.Examples, got {kind}: give Examples(train_set)")
        instance.__dict__[self._name] = examples
