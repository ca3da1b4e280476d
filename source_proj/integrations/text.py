"""Text files as data sets of a pretrained model, for those who write no Python."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from source_proj._errors import MismatchError
from source_proj.integrations.model_task import task_for
from source_proj.integrations.pretrained import label_numbers
from source_proj.integrations.text_rows import lacking, text_rows
from source_proj.integrations.text_settings import TextSettings
from source_proj.integrations.text_tokens import Encoded, encode, padded, token_limit
from source_proj.task import CausalLM, Regression

__all__ = ["TextData", "TextRows", "TextsChangedError", "own_rows", "require_own_texts"]

_UNCOUNTED = -100  # transformers' label of tokens that do not count
_DIGITS = 20  # of a class's number, at most


class TextsChangedError(MismatchError):
    """A file is no longer what a bank was built from."""


class TextRows:
    """Texts as people read them: the words of each example, and its label.

    Args:
        data: see :class:`TextData`.
        settings: which columns.

    Attributes:
        name: what the data are called in messages.
        rows: the examples, by the names of the columns.

    Raises:
        ValueError: another type of file.
        MismatchError: a damaged one, or it holds no example.
    """

    def __init__(self, data: Any, settings: TextSettings) -> None:
        self.name, self.rows = text_rows(data)
        self._settings = settings
        if not self.rows:
            raise MismatchError(f"{self.name} holds no example")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def digest(self) -> str:
        """What texts and labels are, in their order."""
        settings, found = self._settings, hashlib.sha256()
        columns = [settings.prompt, settings.text, settings.pair, settings.label]
        for row in self.rows:
            found.update(json.dumps([row.get(name) for name in columns if name is not None], default=str).encode())
        return found.hexdigest()

    def words(self, index: int) -> tuple[str, Any]:
        """Text and label of an example; what stands before the text, or is paired with it, is part of the text."""
        row, settings = self.rows[index], self._settings
        columns = [settings.prompt, settings.text, settings.pair]
        label = row.get(settings.label)
        if isinstance(label, str) and label.strip().isdecimal():
            label = int(label)
        return " ".join(str(row[name]) for name in columns if name is not None and row.get(name) is not None), label


class TextData:
    """Texts as a map-style data set: what the tokenizer gives, padded to the longest example, and labels.

    Args:
        data: a ``.jsonl`` file (one object a line), a ``.csv`` one (with a header), a ``.parquet`` one, a folder that
            ``datasets`` saved, a ``datasets.Dataset``, a pandas frame, or a list of dicts.
        settings: which columns, and how long.
        model: says whether examples are classified or continued.
        tokenizer: the model's.
        labelled: whether examples have labels. Without, questions are asked about what the model itself says of them:
            a language model gets the prompts (or, where there is no such column, the texts) and goes on.

    Raises:
        ValueError: another type of file.
        MismatchError: a damaged one, a missing column, an unknown class, or an example without tokens; the message
            names the example.
    """

    def __init__(
        self, data: Any, settings: TextSettings, model: nn.Module, tokenizer: Any, labelled: bool = True
    ) -> None:
        self._texts = TextRows(data, settings)
        name, rows, self.words = self._texts.name, self._texts.rows, self._texts.words
        task = task_for(model)
        classifies = not isinstance(task, CausalLM)
        for number, row in enumerate(rows, start=1):
            missing = [name for name in _needed(settings, classifies, labelled) if row.get(name) is None]
            if missing:
                raise lacking(missing[0], row, number, name, _option(missing[0], settings))
            _require_words(row, settings, number, name)
        limit = settings.max_length or token_limit(model, tokenizer)
        continues = not classifies and not labelled
        encoded = [encode(tokenizer, row, settings, limit, continues) for row in rows]
        if not all(each.columns for each in encoded):
            number = next(n for n, each in enumerate(encoded, start=1) if not each.columns)
            raise MismatchError(f"example {number} of {name} has no token")
        if not classifies and labelled:
            _require_two_tokens(encoded, name)
        _warn_of_cut([n for n, each in enumerate(encoded, start=1) if each.cut], len(encoded), name, limit)
        self._columns = padded([each.columns for each in encoded], tokenizer)
        if not labelled:
            return
        if isinstance(task, Regression):
            targets = [_number(row[settings.label], n, name) for n, row in enumerate(rows, 1)]
            self._columns["labels"] = torch.tensor(targets, dtype=torch.float32, device="cpu")
        elif classifies:
            numbers = label_numbers(settings.model, model) if settings.labels is None else settings.labels
            classes = int(getattr(model.config, "num_labels", len(numbers)))
            members = [_class(row[settings.label], numbers, classes, n, name) for n, row in enumerate(rows, start=1)]
            self._columns["labels"] = torch.tensor(members, dtype=torch.int64, device="cpu")
        else:
            self._columns.pop("token_type_ids", None)  # of pairs; language models would embed them as words
            uncounted = self._columns["attention_mask"] == 0
            for mask, each in zip(uncounted, encoded, strict=True):
                mask[: each.prompt] = True
            self._columns["labels"] = self._columns["input_ids"].masked_fill(uncounted, _UNCOUNTED)

    @property
    def digest(self) -> str:
        """What texts and labels are, in their order."""
        return self._texts.digest

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self._columns.items()}


def own_rows(bank: str | Path) -> tuple[list[Path], TextRows] | None:
    """The text files that a bank was built and appended from, and their rows; None where one is not known, or gone.

    Raises:
        TextsChangedError: the texts of one are no longer those that the bank was made of.
    """
    known = TextSettings.files(bank)
    if not known:
        return None
    settings, parts = TextSettings.read(bank), []
    for file, digest in known:
        parts.append(TextRows(file, settings))
        if parts[-1].digest != digest:
            raise TextsChangedError(
                f"{str(file)!r} is no longer the file that {bank} was built from: its texts are others"
            )
    files = [file for file, _ in known]
    return files, parts[0] if len(parts) == 1 else TextRows([row for part in parts for row in part.rows], settings)


def require_own_texts(bank: str | Path, rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """Refuse a training set whose records are not those of a bank of texts, one by one: others would be dropped.

    Labels may be others, as corrected ones are. Nothing is compared where the bank does not know its texts.

    Args:
        bank: its place.
        rows: the records.
        name: what they are called.

    Raises:
        MismatchError: names the first record that differs, and what to give.
        TextsChangedError: as `own_rows`.
    """
    known = own_rows(bank) if TextSettings.files(bank) else None
    if known is None:
        return
    settings, own = TextSettings.read(bank), known[1].rows
    built = f"the bank {bank} was built from {', '.join(repr(str(file)) for file in known[0])}"
    remedy = "give the records as the bank has them, in the same order"
    columns = [column for column in (settings.prompt, settings.text, settings.pair) if column is not None]
    for number, (there, here) in enumerate(zip(own, rows, strict=False), start=1):
        for column in columns:
            if str(there.get(column)) != str(here.get(column)):
                raise MismatchError(
                    f"record {number} of {name} is another than the bank's: its {column!r} is "
                    f"{here.get(column)!r:.80}, and {there.get(column)!r:.80} there. {built}: {remedy}"
                )
    if len(own) != len(rows):
        raise MismatchError(f"{name} has {len(rows)} records, and the bank {len(own)}. {built}: {remedy}")


def _needed(settings: TextSettings, classifies: bool, labelled: bool) -> list[str]:
    """Columns that every example must have.

    Raises:
        ValueError: a column was named that this kind of model has no use for.
    """
    if classifies and settings.prompt is not None:
        raise ValueError(f"the prompt column {settings.prompt!r} is for language models: name a pair column instead")
    if not classifies and settings.pair is not None:
        raise ValueError(f"the pair column {settings.pair!r} is for classifiers: name a prompt column instead")
    text = None if not labelled and settings.prompt is not None else settings.text
    named = (text, settings.label if classifies and labelled else None, settings.prompt, settings.pair)
    return [name for name in named if name is not None]


def _option(column: str, settings: TextSettings) -> str:
    """What names a column in Python and on the command line."""
    options = {"text": "--text-column", "label": "--label-column", "prompt": "--prompt-column"}
    field = next((field for field in options if getattr(settings, field) == column), "pair")
    return f"TextSettings({field}=...) ({options.get(field, '--text-pair-column')} of source-proj build)"


def _require_words(row: Mapping[str, Any], settings: TextSettings, example: int, data: str) -> None:
    """Refuse what is no text, or no letter of any.

    Raises:
        MismatchError: it is; names the example.
    """
    for column in (settings.prompt, settings.text, settings.pair):
        value = None if column is None else row.get(column)
        nothing = isinstance(value, float) and math.isnan(value)  # of a frame whose rows became dicts
        if nothing or isinstance(value, Mapping | list | tuple | bool | bytes):
            raise MismatchError(
                f"example {example} of {data} has no text in {column!r} but {value!r:.80}: write it as one string"
            )
        if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise MismatchError(
                f"the text of example {example} of {data} in {column!r} holds half of a letter (a lone surrogate, as "
                f"of a string that was cut within an emoji): {value!r:.80}"
            )


def _require_two_tokens(encoded: Sequence[Encoded], name: str) -> None:
    """Refuse a text of which a language model predicts nothing.

    Raises:
        MismatchError: names the first.
    """
    for number, each in enumerate(encoded, start=1):
        if len(each.columns["input_ids"]) < 2:
            raise MismatchError(
                f"example {number} of {name} has one token, and a language model predicts each from those before it: "
                "leave the example out"
            )


def _warn_of_cut(numbers: Sequence[int], count: int, name: str, limit: int) -> None:
    if numbers:
        warnings.warn(
            f"{len(numbers)} of the {count} texts of {name} have more than {limit} tokens and were cut, example "
            f"{numbers[0]} first: what is said of them is said of their beginning. The length is max_length= "
            "(--max-length on the command line), by default the most that model and tokenizer take",
            UserWarning,
            stacklevel=3,
        )


def _class(value: Any, numbers: Mapping[str, int], classes: int, example: int, data: str) -> int:
    """Number of a class that is given by its name or its number.

    Raises:
        MismatchError: it is neither.
    """
    name = str(value).strip()
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    in_digits = any(known.strip().isdecimal() for known in numbers)
    if isinstance(value, int) and not isinstance(value, bool) and int(numbers.get(str(value), value)) != value:
        raise MismatchError(
            f"example {example} of {data} has the class {value}, which may be a number or the name of class "
            f"{numbers[str(value)]}: write names as text, in quotes"
        )
    if name in numbers and isinstance(value, str | bool):
        return int(numbers[name])
    number = int(value) if isinstance(value, int) else None
    if number is None and not in_digits and name.isdecimal() and len(name) < _DIGITS:
        number = int(name)
    if number is not None and 0 <= number < classes:
        return number
    raise MismatchError(
        f"example {example} of {data} has the class {value!r}; the model knows 0 to {classes - 1} and "
        f"{list(numbers)[:20]}"
    )


def _number(value: Any, example: int, data: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise MismatchError(f"example {example} of {data} has the label {value!r}, and a number is needed") from None
