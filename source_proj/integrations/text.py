"""Text files and pretrained models of transformers, for those who write no Python."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from source_proj._errors import MismatchError
from source_proj._io.files import write_file
from source_proj.task import CausalLM, Classification, Task

__all__ = ["TextData", "TextSettings", "load_pretrained", "task_for"]

_UNCOUNTED = -100  # transformers' label of tokens that do not count


@dataclass(frozen=True)
class TextSettings:
    """How a text file becomes a data set.

    Args:
        model: directory (or hub name) of the model and its tokenizer.
        text: column of the text.
        label: column of the class, a number or a name that the model's ``label2id`` knows; classification only.
        prompt: column of a text that stands before the other one, and whose tokens are not counted; language models
            only.
        max_length: tokens of an example, at most; default: the model's own limit.
    """

    model: str
    text: str = "text"
    label: str = "label"
    prompt: str | None = None
    max_length: int | None = None

    def write(self, bank: Path, options: Mapping[str, Any]) -> None:
        """Keep the settings beside a bank, with all options that it was built with."""
        content = {"text": asdict(self), "build": dict(options)}
        write_file(_beside(bank), (json.dumps(content, indent=2) + "\n").encode())

    @classmethod
    def read(cls, bank: Path) -> TextSettings:
        """Read them back.

        Raises:
            ValueError: there are none.
            MismatchError: they are damaged.
        """
        file = _beside(bank)
        if not file.is_file():
            raise ValueError(
                f"there is no {str(file)!r}, which a build from a text file leaves: give --model and --queries"
            )
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8"))["text"])
        except (ValueError, TypeError, KeyError) as error:
            raise MismatchError(f"{str(file)!r} is damaged ({type(error).__name__}: {error})") from error


def _beside(bank: Path) -> Path:
    bank = bank.absolute()
    return bank.with_name(f"{bank.name}.text.json")


def load_pretrained(name: str) -> tuple[nn.Module, Any]:
    """Load a model of the class that its ``config.json`` names, in evaluation mode, and its tokenizer.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the class is none of transformers', or there is no tokenizer.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("models by name need transformers: pip install 'source-proj[hf]'") from error
    config = transformers.AutoConfig.from_pretrained(name)
    kind = next((getattr(transformers, one) for one in config.architectures or () if hasattr(transformers, one)), None)
    if kind is None:
        raise ValueError(f"{name!r} is a {config.architectures}, which transformers does not have: give --model")
    model: nn.Module = kind.from_pretrained(name)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name!r} has no tokenizer: save it there with tokenizer.save_pretrained") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # type: ignore[union-attr]
    return model.eval(), tokenizer


def task_for(model: nn.Module) -> Task:
    """Classification or language modelling, by the name of the model's class.

    Raises:
        ValueError: it is of another kind.
    """
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        return Classification()
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return CausalLM()
    raise ValueError(f"{name} is no sequence classifier and no causal language model: give --task, --model and --data")


class TextData:
    """A text file as a map-style data set: tokens padded to the longest example, attention mask, labels.

    Args:
        file: ``.jsonl`` (one object a line) or ``.csv`` (with a header).
        settings: which columns, and how long.
        model: says whether examples are classified or continued.
        tokenizer: the model's.

    Raises:
        ValueError: another type of file, a missing column, an unknown class, or an example without tokens; the message
            names the line.
    """

    def __init__(self, file: str | Path, settings: TextSettings, model: nn.Module, tokenizer: Any) -> None:
        path = Path(file)
        rows = list(_rows(path))
        if not rows:
            raise ValueError(f"{str(path)!r} holds no example")
        classifies = isinstance(task_for(model), Classification)
        needed = [settings.text, *([settings.label] if classifies else [settings.prompt] if settings.prompt else [])]
        for number, row in enumerate(rows, start=1):
            missing = [name for name in needed if row.get(name) is None]
            if missing:
                raise ValueError(f"example {number} of {str(path)!r} has no {missing[0]!r}, only {sorted(row)}")
        limit = settings.max_length or _limit(model, tokenizer)
        prompts = [[] if settings.prompt is None else _encode(tokenizer, str(row[settings.prompt])) for row in rows]
        bodies = [_encode(tokenizer, str(row[settings.text]), special=settings.prompt is None) for row in rows]
        tokens = [(prompt + body)[:limit] for prompt, body in zip(prompts, bodies, strict=True)]
        if not all(tokens):
            raise ValueError(f"example {[bool(one) for one in tokens].index(False) + 1} of {str(path)!r} has no token")
        length = max(map(len, tokens))
        pad = int(tokenizer.pad_token_id)
        self._tokens = torch.tensor([one + [pad] * (length - len(one)) for one in tokens])
        self._mask = torch.tensor([[1] * len(one) + [0] * (length - len(one)) for one in tokens])
        if classifies:
            self._labels = torch.tensor([_class(row[settings.label], model, n, path) for n, row in enumerate(rows, 1)])
        else:
            self._labels = self._tokens.masked_fill(self._mask == 0, _UNCOUNTED)
            for labels, prompt in zip(self._labels, prompts, strict=True):
                labels[: len(prompt)] = _UNCOUNTED

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._tokens[index], "attention_mask": self._mask[index], "labels": self._labels[index]}


def _rows(path: Path) -> Iterable[Mapping[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"the data set {str(path)!r} does not exist")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        yield from csv.DictReader(text.splitlines(keepends=True))
    elif path.suffix in (".jsonl", ".ndjson"):
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                try:
                    yield dict(json.loads(line))
                except (ValueError, TypeError) as error:
                    raise ValueError(f"line {number} of {str(path)!r} is no JSON object: {error}") from error
    else:
        raise ValueError(f"the data set {str(path)!r} must be a .jsonl or .csv file")


def _encode(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def _limit(model: nn.Module, tokenizer: Any) -> int:
    """Longest sequence that the model takes; tokenizers without a limit say so by an absurd number."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return min(int(positions or 512), int(tokenizer.model_max_length))


def _class(value: Any, model: nn.Module, number: int, path: Path) -> int:
    known: Mapping[str, int] = getattr(model.config, "label2id", None) or {}
    classes = int(getattr(model.config, "num_labels", len(known)))
    found = known.get(str(value))
    if found is None and str(value).strip().isdecimal() and int(value) < classes:
        found = int(value)
    if found is None:
        raise ValueError(
            f"example {number} of {str(path)!r} has the class {value!r}; the model knows 0 to {classes - 1} and "
            f"{list(known)[:20]}"
        )
    return found
