"""From the options of ``score`` and ``top-k`` to a method and its queries; loads what their help needs not."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from source_proj._errors import MismatchError
from source_proj._io.executors import Executor
from source_proj.attribution.attributor import Attributor
from source_proj.attribution.hits import Hits
from source_proj.attribution.methods import (
    ArnoldiInfluence,
    DataInf,
    GradCos,
    GradDot,
    Hydra,
    InfluenceFunction,
    TracIn,
    Trak,
)
from source_proj.attribution.source import Source
from source_proj.attribution.streaming import checked_out, stream_hits
from source_proj.attribution.words import sign_of
from source_proj.bank import Bank
from source_proj.bank import open as open_bank
from source_proj.bank.examples import Examples, Picture
from source_proj.cli.answers import require_folder
from source_proj.cli.options import Method
from source_proj.cli.parsing import load_object, make_task, parse_damping, parse_picture, parse_segments, parse_target
from source_proj.cli.text import ask_about, class_numbers, own_queries
from source_proj.integrations.text_bank import TextBank, training_texts
from source_proj.task import Task

__all__ = ["METHODS", "ask", "check_one_list", "named_examples", "stream_list", "training_examples", "verbs_of"]

METHODS: dict[Method, Callable[..., Attributor]] = {
    Method.source: Source,
    Method.tracin: TracIn,
    Method.hydra: Hydra,
    Method.trak: Trak,
    Method.influence: InfluenceFunction,
    Method.arnoldi: ArnoldiInfluence,
    Method.datainf: DataInf,
    Method.grad_dot: GradDot,
    Method.grad_cos: GradCos,
}

_OPTIONS: dict[str, Callable[[Any], Any]] = {
    "segments": parse_segments,
    "curvature": lambda chosen: chosen.value.replace("-", "_"),
    "damping": parse_damping,
    "blocks": int,
    "average": bool,
    "query_gradient": str,
    "ridge": float,
    "rank": int,
    "damping_factor": float,
}


def ask(options: Mapping[str, Any], executor: Executor | None = None, *, own: bool = False) -> tuple[Attributor, Any]:
    """The method that a command's options describe, and its queries; its banks know how their examples are shown.

    Args:
        options: those of the command, by name.
        executor: what the method gives its work to; None for this process.
        own: where no queries are named, ask about examples of the bank's own file.

    Raises:
        ValueError: an option has no meaning for the method, is missing, or is said twice.
        MismatchError: ``--data`` is another training set than the bank's.
    """
    paths: list[str] = options["bank"]
    target = parse_target(options["target"], class_numbers(paths[0]))
    named = not own or any(options[name] for name in ("model", "queries", "dataset", "per_token"))
    rows, ids = (options["dataset"], None) if named else own_queries(paths[0])
    network, queries, texts = ask_about(
        paths[0],
        options["model"],
        options["queries"],
        rows,
        options["per_token"],
        options["trust_remote_code"],
        own_answers=target == "predicted",
    )
    banks = [open_bank(path) for path in paths]
    banks[0].examples = training_examples(
        paths[0],
        banks[0].n_rows,
        options["data"],
        parse_picture(options["picture"]),
        texts,
    )
    method = options["method"]
    made = METHODS[method](
        banks,
        model=network,
        task=_task(banks[0], options["task"], target),
        batch_size=options["batch_size"],
        device=options["device"],
        executor=executor,
        progress=options["progress"],
        **_method_options(method, options),
    )
    return made, queries if ids is None else made.sketch(queries, ids)


def verbs_of(method: Attributor, queries: Any, k: int, rerank: int | None) -> dict[str, Callable[[], Hits]]:
    """What lists the k strongest examples, by the lists' names; with corrected scores where M is given.

    Raises:
        ValueError: the method corrects no scores.
    """
    if rerank is None:
        features = method.sketch(queries)
        plain = {"helpful": method.helpful, "harmful": method.harmful, "lowest": method.bottom_k}
        return {name: partial(verb, features, k) for name, verb in plain.items()}
    if not isinstance(method, Source):
        raise ValueError(f"--rerank has no meaning for {type(method).__name__}; leave it out, or take --method source")
    corrected = {"helpful": method.helpful, "harmful": method.harmful, "lowest": method.bottom_k}
    return {name: partial(verb, queries, k, rerank=rerank) for name, verb in corrected.items()}


def check_one_list(options: Mapping[str, Any]) -> None:
    """Refuse what cannot be streamed by ``top-k --out``, before any work is done for it.

    Raises:
        ValueError: no list is named, or an option of answers in memory is given; or as `checked_out`.
        FileExistsError, FileNotFoundError, ImportError: as `checked_out`.
    """
    if options["most"] is None and not options["lowest"]:
        raise ValueError("--out holds one list: say --most helpful, --most harmful or --lowest")
    for name in ("html", "rerank"):
        if options[name] is not None:
            raise ValueError(f"--{name} keeps all queries in memory, and --out streams them: leave one of them out")
    require_folder("--out", options["out"])
    checked_out(options["out"], "hits", overwrite=options["overwrite"], more=(".csv",), name="--out")


def stream_list(method: Attributor, queries: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Stream the list that was named to ``--out``; return what is to be said of it."""
    named, k, out = "lowest" if options["lowest"] else options["most"].value, options["k"], options["out"]
    highest = named != "lowest" and (named == "helpful") == method.higher_is_better
    count = stream_hits(method, queries, k, out, highest=highest, overwrite=options["overwrite"])
    sign = sign_of(method.unit, additive=method.additive)
    return {"out": out, "queries": count, "k": k, "list": named, "unit": method.unit, "sign": sign,
            "higher_is_better": method.higher_is_better, "method": options["method"].value}  # fmt: skip


def _method_options(method: Method, options: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: read(options[name]) for name, read in _OPTIONS.items() if options[name] not in (None, False)}
    known = inspect.signature(METHODS[method]).parameters
    for name in given:
        if name not in known:
            raise ValueError(f"--{name.replace('_', '-')} has no meaning for --method {method.value}; leave it out")
    return given


def _task(bank: Bank, name: str | None, target: str | int | None) -> Task | None:
    """The task that was named, or the bank's own about what the model says, or another class than the labels'."""
    if target is None or (target == "predicted" and bank.task_spec["name"] == "causal_lm"):
        return None if name is None else make_task(name)
    if target == "predicted" and name is None and bank.task_spec["name"] == "regression":
        return Task.from_spec({**bank.task_spec, "measurement": "prediction"})
    if name is not None or bank.task_spec["name"] != "classification":
        task = name or bank.task_spec["name"]
        if task == "causal_lm":
            raise ValueError(f"--target of a language model is label or predicted, got the class {target}")
        raise ValueError(
            f"--target is for classification, predictions of a regression and language models' continuations, got the "
            f"task {task}"
        )
    return Task.from_spec({**bank.task_spec, "target": target})


def training_examples(
    bank: str,
    n: int,
    data: str | None,
    picture: Picture | None = None,
    texts: TextBank | None = None,
) -> Examples | None:
    """How the n training examples are shown: by the data that was named, or by the text file that the bank knows.

    Args:
        bank: its place.
        n: its examples.
        data: names a data set, a DataLoader, or :class:`Examples` of one.
        picture: how inputs become pictures.
        texts: the bank as one of texts, where that was opened.

    Raises:
        MismatchError: the data are of another length, so that some would stand under the ids of others.
        ValueError: as :func:`named_examples`.
    """
    if data is None:
        known = training_texts(bank, None, None) if texts is None else texts.bank.examples
        return known if picture is None or known is not None else Examples([], picture=picture)
    shown = named_examples(data, picture)
    if len(shown) != n:
        raise MismatchError(f"--data {data!r} gives {len(shown)} examples and the bank has {n}: name its training set")
    return shown


def named_examples(data: str, picture: Picture | None = None) -> Examples:
    """The examples of a data set, a DataLoader, or :class:`Examples` that ``--data`` names.

    Raises:
        ValueError: a picture's shape is given beside examples that have theirs.
    """
    named = load_object(data, "--data")
    if not isinstance(named, Examples):
        return Examples(named, picture=picture)
    if picture is not None:
        raise ValueError(f"--data {data!r} gives Examples, which say how they are shown: leave --picture out")
    return named
