"""Pretrained models of transformers by their folder: with an adapter, with the names of their classes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from source_proj._errors import MismatchError, MissingFileError

__all__ = ["is_adapter", "label_numbers", "load_pretrained", "require_model_folder"]

_STEP = "checkpoint-"
_ADAPTER = "adapter_config.json"
_HEADS = ("classifier", "score", "classification_head")  # what PEFT saves beside an adapter, by transformers' names
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # model or owner/model; nothing else is asked of the hub
_SAVED = "give the folder that model.save_pretrained and tokenizer.save_pretrained wrote to"


def load_pretrained(name: str, *, trust_remote_code: bool = False) -> tuple[nn.Module, Any]:
    """Load a model of the class that its ``config.json`` names, in evaluation mode, and its tokenizer.

    A folder with an adapter of PEFT gives the base model that its ``adapter_config.json`` names, the adapter in place
    and alone trainable.

    Args:
        name: directory (or hub name) of the model.
        trust_remote_code: let transformers run Python code that lies in the directory. Otherwise it is refused, and
            nobody is asked on the terminal.

    Raises:
        MissingFileError: a path, or that of the adapter's base model, is no folder.
        ImportError: transformers, or peft for an adapter, is not installed.
        ValueError: the class is none of transformers', or there is no tokenizer.
        MismatchError: the adapter's configuration is damaged.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("models by name need transformers: pip install 'source-proj[hf]'") from error
    if not _HUB_NAME.fullmatch(name):
        require_model_folder(name, "the model")
    _require_one_model(Path(name))
    adapter = _adapter_settings(name)
    if adapter is None:
        base, model = name, _whole_model(transformers, name, trust_remote_code)
    else:
        base = str(adapter["base_model_name_or_path"])
        if not _HUB_NAME.fullmatch(base):
            named_by = str(Path(name) / _ADAPTER)
            require_model_folder(base, f"the base model that {named_by!r} names,", "write its folder there")
        model = _adapted_model(transformers, name, base, adapter, trust_remote_code)
    tokenizer = _tokenizer(transformers, name, base, trust_remote_code)
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # type: ignore[union-attr]
    return model.eval(), tokenizer


def require_model_folder(name: str, what: str, remedy: str = _SAVED) -> None:
    """Refuse a path where no folder is, which transformers would look for on the hub, and long.

    Args:
        name: the path.
        what: whose it is, for messages.
        remedy: what to do, for messages.

    Raises:
        MissingFileError: no folder is there.
    """
    if not Path(name).is_dir():
        raise MissingFileError(f"{what} {name!r} is no folder here: {remedy}")


def _require_one_model(folder: Path) -> None:
    """Refuse the folder of a whole run.

    Raises:
        MismatchError: names its last checkpoint.
    """
    if not folder.is_dir() or any((folder / name).is_file() for name in ("config.json", _ADAPTER)):
        return
    steps = [
        int(each.name.removeprefix(_STEP)) for each in folder.glob(f"{_STEP}*") if each.name[len(_STEP) :].isdecimal()
    ]
    if steps:
        raise MismatchError(
            f"{str(folder)!r} holds no model (no config.json), but the checkpoints of a Trainer's run: give one of "
            f"them, such as {str(folder / f'{_STEP}{max(steps)}')!r}; --hf-run without --hf-model takes the last one"
        )


def is_adapter(name: str) -> bool:
    """Whether a folder holds an adapter of PEFT, and not a whole model."""
    return (Path(name) / _ADAPTER).is_file()


def label_numbers(name: str, model: nn.Module | None = None) -> dict[str, int]:
    """Name of each class → its number, as a folder's ``config.json`` says itself; else as the model does.

    A model that was given ``id2label`` alone writes no other. In the place of a ``label2id`` that has no ``id2label``
    beside it, transformers puts names of its own.

    Raises:
        MismatchError: the file is damaged.
    """
    file = Path(name) / "config.json"
    numbers = getattr(getattr(model, "config", None), "label2id", None)
    if file.is_file():
        config = _json(file)
        own = {label: number for number, label in (config.get("id2label") or {}).items()}
        numbers = config.get("label2id") or own or numbers
    return {str(label): int(number) for label, number in (numbers or {}).items()}


def _whole_model(transformers: Any, name: str, trusted: bool) -> nn.Module:
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trusted)
    kinds = [getattr(transformers, str(architecture), None) for architecture in config.architectures or ()]
    kind: Any = next((k for k in kinds if isinstance(k, type) and issubclass(k, transformers.PreTrainedModel)), None)
    if kind is None:
        raise ValueError(f"{name!r} is a {config.architectures}, which transformers does not have: give --model")
    model: nn.Module = kind.from_pretrained(name, trust_remote_code=trusted)
    return model


def _adapted_model(transformers: Any, name: str, base: str, adapter: Mapping[str, Any], trusted: bool) -> nn.Module:
    """The base model with its adapter; a classifier's head, which the base model may lack, is the adapter's."""
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"{name!r} holds an adapter, which needs peft: pip install 'source-proj[peft]'") from error
    if adapter.get("task_type") == "SEQ_CLS":
        model = _classifier(transformers, base, peft.load_peft_weights(name, device="cpu"), trusted)
    elif adapter.get("task_type") == "CAUSAL_LM":
        model = transformers.AutoModelForCausalLM.from_pretrained(base, trust_remote_code=trusted)
    else:
        model = _whole_model(transformers, base, trusted)
    adapted: nn.Module = peft.PeftModel.from_pretrained(model, name, is_trainable=True)
    return adapted


def _classifier(transformers: Any, base: str, adapter: Mapping[str, Tensor], trusted: bool) -> nn.Module:
    """The base model as a classifier of as many classes as the adapter's head has.

    Raises:
        MismatchError: weights are in neither of the two, so that they would be random.
    """
    heads = [value.shape[0] for key, value in adapter.items() if _is_head(key)]
    classes = {"num_labels": int(heads[0]), "ignore_mismatched_sizes": True} if heads else {}
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, output_loading_info=True, trust_remote_code=trusted, **classes
    )
    absent = {*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])}
    random = sorted(name for name in absent if not any(key.endswith(name) for key in adapter))
    if random:
        raise MismatchError(
            f"{base!r} lacks {', '.join(random[:8])}, and the adapter over it does too: save the base model that it "
            "was trained on, or name them in modules_to_save"
        )
    classifier: nn.Module = model
    return classifier


def _is_head(key: str) -> bool:
    """Whether an adapter's entry is the last weight of a classifier."""
    parts = key.split(".")
    return parts[-1] == "weight" and any(part in _HEADS for part in parts) and parts[-2] != "dense"


def _adapter_settings(name: str) -> dict[str, Any] | None:
    if not is_adapter(name):
        return None
    settings = _json(Path(name) / _ADAPTER)
    if not settings.get("base_model_name_or_path"):
        raise MismatchError(
            f"{str(Path(name) / _ADAPTER)!r} names no base_model_name_or_path: write the base model's folder there"
        )
    return settings


def _tokenizer(transformers: Any, name: str, base: str, trusted: bool) -> Any:
    """The tokenizer that was saved with a model, else its base model's."""
    tokenizer = None
    for place in dict.fromkeys((name, base)):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=trusted)
            break
        except (OSError, ValueError) as error:
            failure = error
    if tokenizer is None:
        raise ValueError(f"{name!r} has no tokenizer: save it there with tokenizer.save_pretrained") from failure
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise MismatchError(f"{str(file)!r} is damaged ({type(error).__name__}: {error}): save it anew") from error
