"""A bank that was built from text files, with the model, the tokenizer and the texts that its questions need."""

from __future__ import annotations

import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from source_proj._errors import MismatchError, SourceProjError
from source_proj.bank import Bank
from source_proj.bank import open as open_bank
from source_proj.bank.examples import Examples
from source_proj.integrations.pretrained import load_pretrained, require_model_folder
from source_proj.integrations.text import TextData, TextRows, own_rows
from source_proj.integrations.text_settings import TextSettings
from source_proj.task import CausalLM, Task

__all__ = ["OwnTexts", "TextBank", "known_rows", "training_texts"]


class OwnTexts:
    """The training set of a bank of texts: words as they stand in its files, tokenised once an item is asked for.

    Args:
        rows: the texts.
        settings: how they become examples.
        model: the bank's.
        tokenizer: the model's.
    """

    def __init__(self, rows: TextRows, settings: TextSettings, model: nn.Module, tokenizer: Any) -> None:
        self._rows, self._settings, self._model, self._tokenizer = rows, settings, model, tokenizer
        self.words = rows.words

    @cached_property
    def _read(self) -> TextData:
        return TextData(self._rows.rows, self._settings, self._model, self._tokenizer)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._read[index]


class TextBank:
    """A bank that ``source-proj build --dataset`` made, opened with all that its questions need.

    Args:
        path: the bank: a folder, or an address such as ``s3://…``.
        trust_remote_code: let transformers run Python code that lies in the model's directory.

    Attributes:
        bank: the bank; lists of its examples show their texts and labels, if the files are still there.
        model: the model that it was built with. Methods put the run's weights into it themselves.
        tokenizer: the model's.
        settings: how the texts were read.

    Raises:
        BankError, MismatchError: as :func:`source_proj.open`.
        ValueError: the bank was not built from texts.
        MissingFileError: the model's folder is not there any more.

    Example:
        Ask about a file of texts, in lists that show words::

            texts = TextBank("bank")
            source = sp.Source(texts.bank, model=texts.model)
            print(source.helpful(texts.read("questions.jsonl"), k=5))
    """

    def __init__(self, path: str | Path, *, trust_remote_code: bool = False) -> None:
        self.bank: Bank = open_bank(path)
        self.settings = TextSettings.read(path)
        back = "put it back, or call this from the folder that the bank was built from"
        require_model_folder(self.settings.model, f"the model that {path} was built with,", back)
        self.model, self.tokenizer = load_pretrained(self.settings.model, trust_remote_code=trust_remote_code)
        self.bank.examples = training_texts(path, self.tokenizer, self.model)

    def __repr__(self) -> str:
        return f"TextBank({self.bank!r}, {type(self.model).__name__})"

    @property
    def training_set(self) -> Any:
        """The training examples as the model reads them, a map-style data set: documents for ``by_token``.

        Raises:
            MismatchError: their files are gone, or hold other texts now.
        """
        known = own_rows(self.bank.path)
        if known is None:
            raise MismatchError(f"{self.bank.path} does not know its texts, or their file is gone: put it back")
        return OwnTexts(known[1], self.settings, self.model, self.tokenizer)

    def read(self, data: Any, *, labelled: bool | None = None) -> TextData:
        """Read texts as the training set was: queries, or examples to append.

        Args:
            data: as for :class:`TextData`: a file, a frame, a data set, or a list of dicts.
            labelled: whether examples have labels, see :class:`TextData`; default: if any has one. A language model's
                label is its text, so that False asks about its own continuations of prompts.

        Raises:
            ValueError, MismatchError: as :class:`TextData`.
        """
        rows = TextRows(data, self.settings).rows
        if labelled is None:
            target = self.settings.text if isinstance(self.task, CausalLM) else self.settings.label
            labelled = any(row.get(target) is not None for row in rows)
        return TextData(data, self.settings, self.model, self.tokenizer, labelled)

    @property
    def task(self) -> Task:
        """The bank's task."""
        return Task.from_spec(self.bank.task_spec)


def training_texts(bank: str | Path, tokenizer: Any, model: nn.Module | None) -> Examples | None:
    """The training examples of a bank that was built from text files, as people read them, if these are still there.

    Args:
        bank: its place.
        tokenizer: the model's; None where none was loaded.
        model: the bank's; None where none was loaded, and examples are shown alone.
    """
    known = known_rows(bank)
    if known is None:
        return None
    rows, settings = known[1], TextSettings.read(bank)
    names = None if settings.labels is None else {number: name for name, number in settings.labels.items()}
    data = rows if model is None else OwnTexts(rows, settings, model, tokenizer)
    return Examples(data, class_names=names, tokenizer=tokenizer)


def known_rows(bank: str | Path) -> tuple[list[Path], TextRows] | None:
    """As `own_rows`; texts that are others now, or can't be read, are warned of and left out."""
    try:
        return own_rows(bank)
    except (SourceProjError, OSError, ValueError, ImportError) as error:
        warnings.warn(f"{error}: training examples are shown by their ids alone", UserWarning, stacklevel=3)
        return None
