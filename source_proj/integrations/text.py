"""Text files as data sets of a pretrained model, for those who write no Python."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from source_proj._errors import BankError, MismatchError
from source_proj.bank.store import Store, is_url, open_store
from source_proj.integrations.model_task import task_for
from source_proj.integrations.pretrained import label_numbers, load_pretrained
from source_proj.integrations.text_rows import text_rows
from source_proj.task import CausalLM, Regression

__all__ = ["TextData", "TextRows", "TextSettings"]

_SUFFIXES = (".csv", ".jsonl", ".ndjson", ".parquet")
_UNCOUNTED = -100  # transformers' label of tokens that do not count


@dataclass(frozen=True)
class TextSettings:
    """How a text file becomes a data set.

    Args:
        model: directory (or hub name) of the model and its tokenizer.
        text: column of the text.
        label: column of the class, a number or a name that ``labels`` knows; classification only.
        prompt: column of a text that stands before the other one, and whose tokens are not counted; language models
            only.
        max_length: tokens of an example, at most; default: the model's own limit. The tokenizer cuts what is longer,
            so that the tokens that it puts at the end stay.
        pair: column of the second text of a pair; classification only.
        labels: name of a class → its number; default: ``label2id`` of the model's ``config.json``.
    """

    model: str
    text: str = "text"
    label: str = "label"
    prompt: str | None = None
    max_length: int | None = None
    pair: str | None = None
    labels: Mapping[str, int] | None = None

    def write(self, bank: str | Path, options: Mapping[str, Any]) -> None:
        """Keep the settings beside a bank, with all options that it was built with."""
        content = {"text": asdict(self), "build": dict(options)}
        store, key = _beside(bank)
        store.put({key: (json.dumps(content, indent=2) + "\n").encode()})

    @staticmethod
    def require_place(bank: str | Path) -> None:
        """Refuse a bank beside which no settings can be kept, before any work is done.

        Raises:
            BankError: its name is too long.
        """
        _beside(bank)

    @classmethod
    def read(cls, bank: str | Path) -> TextSettings:
        """Read them back.

        Raises:
            BankError: the bank's name is too long for a file beside it.
            ValueError: there are none.
            MismatchError: they are damaged.
        """
        store, key = _beside(bank)
        where = store.location(key)
        try:
            content = store.get(key)
        except FileNotFoundError:
            raise ValueError(
                f"there is no {where!r}, which a build from a text file leaves: give --model and --queries"
            ) from None
        try:
            return cls(**json.loads(content)["text"])
        except (ValueError, TypeError, KeyError) as error:
            raise MismatchError(f"{where!r} is damaged ({type(error).__name__}: {error})") from error

    @staticmethod
    def data_set(bank: str | Path) -> Path | None:
        """The text file that a bank was built from, if that is known and still there."""
        store, key = _beside(bank)
        try:
            named = Path(str(json.loads(store.get(key))["build"]["dataset"]))
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return named if named.suffix in _SUFFIXES and named.is_file() else None


def _beside(bank: str | Path) -> tuple[Store, str]:
    """The store and the key of what is kept beside a bank."""
    if is_url(bank):
        above, _, name = str(bank).rstrip("/").rpartition("/")
        if above.endswith("/"):
            raise BankError(f"{bank} is a whole bucket, and a text bank needs a place beside it: give {bank}/name")
        return open_store(above), f"{name}.text.json"
    folder = Path(bank).absolute()
    store, key = open_store(folder.parent), f"{folder.name}.text.json"
    try:
        store.stat(key)
    except OSError as error:  # its name is longer than the bank's
        raise BankError(f"no file can be beside the bank {folder} ({error}): give it a shorter name") from error
    return store, key


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
                raise MismatchError(f"example {number} of {name} has no {missing[0]!r}, only {sorted(row)}")
        limit = settings.max_length or _limit(model, tokenizer)
        continues = not classifies and not labelled
        encoded = [_encode(tokenizer, row, settings, limit, continues) for row in rows]
        if not all(each.columns for each in encoded):
            number = next(n for n, each in enumerate(encoded, start=1) if not each.columns)
            raise MismatchError(f"example {number} of {name} has no token")
        _warn_of_cut([n for n, each in enumerate(encoded, start=1) if each.cut], len(encoded), name, limit)
        self._columns = _padded([each.columns for each in encoded], tokenizer)
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

    @classmethod
    def like(cls, bank: str | Path, data: Any, *, trust_remote_code: bool = False) -> TextData:
        """Texts read as the training set of a bank was: same columns, same tokenizer, same length.

        Args:
            bank: a bank that ``source-proj build --dataset`` made.
            data: see the class.
            trust_remote_code: let transformers run Python code that lies in the model's directory.

        Raises:
            ValueError: the bank was not built from texts; or as the class.
        """
        settings = TextSettings.read(Path(bank))
        network, tokenizer = load_pretrained(settings.model, trust_remote_code=trust_remote_code)
        return cls(data, settings, network, tokenizer)

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self._columns.items()}


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


class _Encoded(NamedTuple):
    """An example's tokens.

    Attributes:
        columns: what the tokenizer says of it, by column; empty where it has no token.
        prompt: how many of its tokens are the prompt's.
        cut: whether it has more tokens than were taken.
    """

    columns: Mapping[str, list[int]]
    prompt: int
    cut: bool


def _warn_of_cut(numbers: Sequence[int], count: int, name: str, limit: int) -> None:
    if numbers:
        warnings.warn(
            f"{len(numbers)} of the {count} texts of {name} have more than {limit} tokens and were cut, example "
            f"{numbers[0]} first: what is said of them is said of their beginning. The length is max_length= "
            "(--max-length on the command line), by default the most that model and tokenizer take",
            UserWarning,
            stacklevel=3,
        )


def _encode(tokenizer: Any, row: Mapping[str, Any], settings: TextSettings, limit: int, continues: bool) -> _Encoded:
    """The tokens of an example, cut by itself."""
    if continues:  # an end-of-text token of the tokenizer's would stop the model at once
        columns, prompt, cut = _after_prompt(tokenizer, str(row[settings.prompt or settings.text]), "", limit)
        return _Encoded({key: values[:prompt] for key, values in columns.items()}, prompt, cut)
    text = str(row[settings.text])
    if settings.prompt is not None:
        return _after_prompt(tokenizer, str(row[settings.prompt]), text, limit)
    second = () if settings.pair is None else (str(row[settings.pair]),)
    columns = _columns_of(tokenizer(text, *second, truncation=True, max_length=limit))
    full = len(columns.get("input_ids", ())) >= limit
    cut = full and len(tokenizer(text, *second, verbose=False)["input_ids"]) > limit
    return _Encoded(columns, 0, cut)


def _columns_of(encoding: Mapping[str, Any]) -> dict[str, list[int]]:
    """Token columns of an encoding; nothing where it has no token."""
    return {key: list(value) for key, value in encoding.items()} if encoding["input_ids"] else {}


def _after_prompt(tokenizer: Any, prompt: str, text: str, limit: int) -> _Encoded:
    """A text behind its prompt, the tokenizer's own first and last tokens around both; the text's end is cut."""
    whole = tokenizer(prompt, return_special_tokens_mask=True)
    tokens, special = list(whole["input_ids"]), list(whole["special_tokens_mask"])
    ordinary = [place for place, is_special in enumerate(special) if not is_special]
    end = ordinary[-1] + 1 if ordinary else len(tokens)  # what follows the last ordinary token closes an example
    body = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    head, tail = tokens[:end], tokens[end:]
    inner = (head + body)[: max(0, limit - len(tail))]
    joined = (inner + tail)[:limit]
    columns = {"input_ids": joined, "attention_mask": [1] * len(joined)} if joined else {}
    return _Encoded(columns, min(len(head), len(inner)), len(head) + len(body) + len(tail) > limit)


def _padded(encoded: list[Mapping[str, list[int]]], tokenizer: Any) -> dict[str, Tensor]:
    """Columns ``(N, longest)`` of what the model reads; padding is masked."""
    padding = {"input_ids": int(tokenizer.pad_token_id), "attention_mask": 0, "token_type_ids": 0}
    length = max(len(columns["input_ids"]) for columns in encoded)
    whole = {
        key: [columns[key] + [value] * (length - len(columns[key])) for columns in encoded]
        for key, value in padding.items()
        if all(key in columns for columns in encoded)
    }
    return {key: torch.tensor(rows, dtype=torch.int64, device="cpu") for key, rows in whole.items()}


def _limit(model: nn.Module, tokenizer: Any) -> int:
    """Longest sequence that the model takes; tokenizers without a limit say so by an absurd number."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return min(int(positions or 512), int(tokenizer.model_max_length))


def _class(value: Any, numbers: Mapping[str, int], classes: int, example: int, data: str) -> int:
    """Number of a class that is given by its name or its number.

    Raises:
        MismatchError: it is neither.
    """
    name = str(value).strip()
    if name in numbers:
        return int(numbers[name])
    number = int(value) if isinstance(value, bool | float) and value == int(value) else name
    if str(number).isdecimal() and int(number) < classes:
        return int(number)
    raise MismatchError(
        f"example {example} of {data} has the class {value!r}; the model knows 0 to {classes - 1} and "
        f"{list(numbers)[:20]}"
    )


def _number(value: Any, example: int, data: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise MismatchError(f"example {example} of {data} has the label {value!r}, and a number is needed") from None
