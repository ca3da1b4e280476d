"""Text files in the place of Python: options of a build, and of questions to its bank."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from source_proj._errors import MismatchError, SourceProjError
from source_proj.bank import open as open_bank
from source_proj.cli.parsing import load_model, load_object, make_task, needed, with_options
from source_proj.integrations import (
    TextData,
    TextRows,
    TextsChangedError,
    TextSettings,
    load_pretrained,
    own_rows,
    require_own_texts,
    task_for,
    trainable_parameters,
)
from source_proj.integrations.callback_log import is_callback_dir
from source_proj.integrations.pretrained import is_adapter, label_numbers, require_model_folder
from source_proj.integrations.text_bank import TextBank, known_rows
from source_proj.integrations.text_rows import text_rows
from source_proj.integrations.trainer_data import check_training_set
from source_proj.integrations.trainer_folders import trainer_folders
from source_proj.task import CausalLM, Task, TokenQueries

__all__ = [
    "TextOptions",
    "ask_about",
    "class_numbers",
    "is_complete",
    "label_column_of",
    "note_appended",
    "own_file",
    "own_queries",
    "require_own_records",
]

_OWN_QUERIES = 200  # examples of a bank's own file that stand in for queries


@dataclass(frozen=True)
class TextOptions:
    """What was said of model, run and text file."""

    hf_model: str | None
    hf_run: str | None
    dataset: Path | None
    text_column: str
    label_column: str
    prompt_column: str | None
    max_length: int | None
    text_pair_column: str | None
    steps: tuple[int, ...] | None
    trust_remote_code: bool = False

    @property
    def given(self) -> bool:
        """Whether a text file or a pretrained model was named."""
        return self.dataset is not None or self.hf_model is not None

    @property
    def settings(self) -> TextSettings:
        """Settings of the data set; the model is the run's last checkpoint, unless another one is named.

        Raises:
            ValueError: neither is named.
            MissingFileError: the model's folder is not there.
        """
        if self.hf_model is not None:
            require_model_folder(self.hf_model, "--hf-model")
        if self.hf_model is None and self.hf_run is None:
            raise ValueError("--dataset needs --hf-model (or --hf-run), which has the tokenizer")
        trained = None if self.hf_run is None else self._last_checkpoint(self.hf_run)
        model = self.hf_model or str(trained)
        return TextSettings(
            str(Path(model).absolute()) if Path(model).is_dir() else model,  # wherever queries are asked from
            self.text_column,
            self.label_column,
            self.prompt_column,
            self.max_length,
            self.text_pair_column,
            label_numbers(str(trained or model)) or None,
        )

    def _last_checkpoint(self, run: str) -> Path | None:
        """Folder of the run's last checkpoint to use; None if the run was recorded by a callback."""
        if is_callback_dir(run):
            return None
        return trainer_folders(run, self.steps)[0][-1].path

    def build_from(
        self, model: str | None, data: str | None, task: str | None, task_options: Iterable[str]
    ) -> tuple[nn.Module, Any, Task]:
        """The model, its training set and the task, from a text file or from ``module:function``.

        Raises:
            ValueError: something is missing, said twice, or wrong.
        """
        if not self.given:
            names = needed(model, "--model"), needed(data, "--data")
            network, made = load_model(names[0]), make_task(task or "classification", task_options)
            return network, load_object(names[1], "--data"), made
        if model is not None or data is not None:
            raise ValueError("--model and --data have no meaning beside --hf-model and --dataset: leave one pair out")
        if self.dataset is None:
            raise ValueError("--hf-model needs --dataset FILE, a .jsonl or .csv file")
        if not self.dataset.exists():  # before a model is loaded
            raise FileNotFoundError(f"the data set {str(self.dataset)!r} does not exist")
        settings = self.settings
        network, tokenizer = load_pretrained(settings.model, trust_remote_code=self.trust_remote_code)
        training_set = TextData(self.dataset, settings, network, tokenizer)
        if self.hf_run is not None:
            check_training_set(self.hf_run, len(training_set), str(self.dataset))
        if task is not None:
            return network, training_set, make_task(task, task_options)
        return network, training_set, with_options(task_for(network, self.hf_run), task_options)

    def parameters_of(self, network: nn.Module, given: Sequence[str] | None) -> Sequence[str] | None:
        """The parameters to attribute through: those given, else an adapter's, if the run trained one."""
        if given is not None or not self.given or not is_adapter(self.settings.model):
            return given
        return trainable_parameters(network)

    def require_place(self, bank: str) -> None:
        """Refuse a bank beside which the settings cannot be kept."""
        if self.given:
            TextSettings.require_place(bank)

    def write_beside(self, bank: str, options: Mapping[str, Any], training_set: Any, *, keep: bool) -> None:
        """Keep the settings beside the bank, with all options of the build, if it was one from a text file.

        Args:
            bank: its place.
            options: those of the command.
            training_set: what was read by them.
            keep: whether settings that are there stay, as of a bank that was complete before.
        """
        if not isinstance(training_set, TextData) or self.dataset is None:
            return
        if keep:
            with suppress(ValueError):  # there are none, as after a kill
                TextSettings.read(bank)
                return
        plain = {key: value if isinstance(value, int | float | list) else str(value) for key, value in options.items()}
        given = {key: value for key, value in plain.items() if options[key] is not None}
        given["dataset"] = str(self.dataset.absolute())
        self.settings.write(bank, given, training_set.digest)


def is_complete(bank: str) -> bool:
    """Whether a bank is there already, and complete."""
    try:
        return open_bank(bank).finalized
    except (SourceProjError, OSError):
        return False


def ask_about(
    bank: str,
    model: str | None,
    queries: str | None,
    dataset: Path | list[Mapping[str, Any]] | None,
    per_token: bool,
    trust_remote_code: bool = False,
    own_answers: bool = False,
) -> tuple[nn.Module, Any, TextBank | None]:
    """The model, the queries, and the bank of texts, else None.

    They come from a text file, read as the training set was, or from ``module:function``.

    Queries of a text file without labels, or all where ``own_answers`` are asked for, are about what the model itself
    says.

    Raises:
        ValueError: something is missing or said twice, or single tokens are asked of a classifier.
    """
    if dataset is None:
        if per_token:
            raise ValueError("--per-token belongs to --dataset; for others use source_proj.TokenQueries")
        names = needed(model, "--model"), needed(queries, "--queries")
        return load_model(names[0]), load_object(names[1], "--queries"), None
    if model is not None or queries is not None:
        raise ValueError("--model and --queries have no meaning beside --dataset: leave one or the other out")
    texts = TextBank(bank, trust_remote_code=trust_remote_code)
    task = texts.task
    data = texts.read(dataset, labelled=False if own_answers and isinstance(task, CausalLM) else None)
    if not per_token:
        return texts.model, data, texts
    if not isinstance(task, CausalLM):
        raise ValueError(f"--per-token belongs to language models, and the bank's task is {task.name}: leave it out")
    return texts.model, TokenQueries(data, task), texts


def own_queries(bank: str) -> tuple[list[Mapping[str, Any]], list[Any]]:
    """Rows and ids of examples of a bank's own file, evenly spread, in the place of queries that nobody named.

    Raises:
        ValueError: the bank knows no file, or it has changed; says what to give.
    """
    ids = open_bank(bank).ids
    try:
        known = own_rows(bank)
    except MismatchError as error:
        raise ValueError(f"{error}: give queries by --dataset FILE") from error
    if known is None:
        raise ValueError(
            f"{bank} does not know its training set's file, whose examples could be asked about: give --model and "
            "--queries, or --dataset FILE to a bank that was built from texts"
        )
    files, rows = known[0], known[1].rows
    if len(rows) != len(ids):
        raise ValueError(
            f"{', '.join(map(repr, map(str, files)))} hold {len(rows)} examples and {bank} {len(ids)}: give queries by "
            "--dataset FILE"
        )
    count = min(_OWN_QUERIES, len(rows))
    places = [place * len(rows) // count for place in range(count)]
    return [rows[place] for place in places], [ids[place] for place in places]


def own_file(bank: str | Path) -> Path | None:
    """The text file that a bank was built from, if it is the only one, still there and as it was; else warns of it."""
    known = known_rows(bank)
    return known[0][0] if known is not None and len(known[0]) == 1 else None


def require_own_records(bank: str, file: Path, *, encoding: str, delimiter: str) -> None:
    """Refuse a training set's file that is not, record by record, what a bank of texts was built from.

    The file that the bank was built from is read once; others are compared with it. Where the bank's own texts are gone
    nothing is compared, and where they changed that is warned of.

    Raises:
        MismatchError: names the first record that differs, and what to give.
    """
    settings = _settings_of(bank)
    known = [] if settings is None else TextSettings.files(bank)
    if settings is None or not known:
        return
    name, rows = text_rows(file, encoding=encoding, delimiter=delimiter)
    if len(known) == 1 and TextRows(rows, settings).digest == known[0][1]:
        return
    try:
        require_own_texts(bank, rows, name)
    except TextsChangedError as error:
        if any(file.samefile(own) for own, _ in known):
            raise MismatchError(
                f"{error}, or are in another order, and other examples than those of the list could be dropped: put "
                "the file back as it was, or build a bank of it as it is"
            ) from error
        warnings.warn(f"{error}: the records of {name} are not compared with them", UserWarning, stacklevel=3)


def label_column_of(bank: str) -> str:
    """Name of the labels' column, as a bank of texts was told, or as it is by default."""
    settings = _settings_of(bank)
    return "label" if settings is None else settings.label


def class_numbers(bank: str) -> dict[str, int]:
    """Name of each class → its number, of a bank of texts; none where they have no names."""
    settings = _settings_of(bank)
    return {} if settings is None else dict(settings.labels or {})


def _settings_of(bank: str) -> TextSettings | None:
    """How a bank's texts were read; None where it is of no texts."""
    try:
        return TextSettings.read(bank)
    except (SourceProjError, OSError, ValueError):
        return None


def note_appended(bank: str, file: Path, appended: TextData, total: int) -> None:
    """Keep beside a bank which texts were appended to it, where all others' are known.

    Args:
        bank: its place.
        file: what was read.
        appended: its examples.
        total: examples of the bank, with these.
    """
    known = known_rows(bank)
    if known is not None and len(known[1]) + len(appended) == total:
        TextSettings.add_file(bank, file, appended.digest)
