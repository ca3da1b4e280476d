"""How the text file of a bank was read: kept beside the bank, so that queries are read alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from source_proj._errors import BankError, MismatchError
from source_proj.bank.store import Store, is_url, open_store

__all__ = ["TextSettings"]

_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")


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

    def write(self, bank: str | Path, options: Mapping[str, Any], digest: str) -> None:
        """Keep the settings beside a bank, with all options that it was built with, and what its texts were."""
        content = {"text": asdict(self), "build": dict(options), "digest": digest}
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
                f"there is no {where!r}, which a build from a text file leaves: if the bank was moved, move it along; "
                "give --model and --queries to a bank that was built otherwise"
            ) from None
        try:
            return cls(**json.loads(content)["text"])
        except (ValueError, TypeError, KeyError) as error:
            raise MismatchError(f"{where!r} is damaged ({type(error).__name__}: {error})") from error

    @staticmethod
    def copy(bank: str | Path, other: str | Path) -> None:
        """Keep what lies beside a bank beside another one that was made of it, too; nothing where nothing does."""
        (store, key), (there, own) = _beside(bank), _beside(other)
        with suppress(FileNotFoundError):
            there.put({own: store.get(key)})

    @staticmethod
    def files(bank: str | Path) -> list[tuple[Path, str]]:
        """The text files that a bank was built and appended from, and what their texts were; none if one is missing."""
        store, key = _beside(bank)
        try:
            content = json.loads(store.get(key))
            told = [(content["build"]["dataset"], content["digest"]), *content.get("appended", [])]
            found = [(Path(str(file)), str(digest)) for file, digest in told]
        except (OSError, ValueError, TypeError, KeyError):
            return []
        return found if all(file.suffix in _SUFFIXES and file.is_file() for file, _ in found) else []

    @staticmethod
    def add_file(bank: str | Path, file: Path, digest: str) -> None:
        """Note that the texts of a file were appended."""
        store, key = _beside(bank)
        content = json.loads(store.get(key))
        content.setdefault("appended", []).append([str(file.absolute()), digest])
        store.put({key: (json.dumps(content, indent=2) + "\n").encode()})


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
