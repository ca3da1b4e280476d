"""Answers of ``score`` and ``top-k``: lines for a terminal, JSON, a page, and files of scores."""

import csv
import functools
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from source_proj._io.outputs import local_path, refused_together, require_free, write_output, write_outputs
from source_proj._io.printable import csv_cell
from source_proj.attribution.hits import Hits
from source_proj.attribution.score_files import FACTS, is_scores_array, require_told_apart
from source_proj.attribution.scores import Scores
from source_proj.attribution.words import TOWARDS, explained, id_word, plain_id, sign_of, toward
from source_proj.bank.examples import Example

__all__ = ["Answer", "require_folder", "scores_writer"]


@dataclass(frozen=True)
class Answer:
    """The strongest training examples of each query, in lists by name ("helpful", "harmful", "lowest")."""

    lists: Mapping[str, Hits]
    method: str

    @property
    def any(self) -> Hits:
        """One of the lists: what they share is in each."""
        return next(iter(self.lists.values()))

    def text(self, more: str = "") -> str:
        """Lines for people; with what is to be said of queries that are not among these."""
        hits = self.any
        lines = [f"{explained(hits.unit)}{'; +: including the example raised it' if hits.additive else ''}"]
        lines += [f"{name}: {listed.reranked}" for name, listed in self.lists.items() if listed.reranked is not None]
        for query in range(len(hits)):
            lines.append("")
            for place, (name, listed) in enumerate(self.lists.items()):
                title, named = _title(name, listed, query)
                heading, *entries = listed.lines(query, named=named)
                lines += [heading] if place == 0 else []
                lines += [f"  {title}", *entries]
        return "\n".join([*lines, *(["", more] if more else []), *hits.closing])

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON can hold it; "train" holds the highest scores, or the list that was asked for."""
        hits = self.any
        up = TOWARDS[hits.higher_is_better]
        reranked = {name: listed.reranked.facts() for name, listed in self.lists.items() if listed.reranked is not None}
        main = self.lists.get("lowest") or (self.lists[up] if len(self.lists) > 1 else hits)
        measured, queries = hits.shown.measurements, []
        for query in range(len(hits)):
            lists = {name: _entries(listed, query) for name, listed in self.lists.items()}
            queries.append(
                {"query": plain_id(hits.query_ids[query]), **_known(hits.query_example(query)),
                 **({} if measured is None else {"measurement": float(measured[query])}),
                 "train": _entries(main, query), **(lists if len(lists) > 1 else {})}
            )  # fmt: skip
        sign = sign_of(hits.unit, additive=hits.additive)
        return {"unit": hits.unit, "unit_in_words": explained(hits.unit), "sign": sign,
                "higher_is_better": hits.higher_is_better, "method": self.method,
                **({"reranked": reranked} if reranked else {}), "queries": queries}  # fmt: skip

    def write_html(self, path: Path, overwrite: bool) -> None:
        """Write a page of all queries."""
        from source_proj.report import make_hits_page, write_report

        page = make_hits_page(
            "Which training examples made the model say this?", self.lists, facts=[("method", self.method)]
        )
        write_report(page, path, overwrite=overwrite)


def _title(name: str, hits: Hits, query: int) -> tuple[str, bool]:
    """What stands over a query's list, and whether each entry is to say which way it goes."""
    if name == "lowest":
        return name, True
    towards = [toward(score, hits.higher_is_better) for score in hits.scores[query]]
    if name not in towards:
        other = TOWARDS[name != TOWARDS[True]]
        return f"most {name}: none; the least {other} of all", True
    return f"most {name}", any(each != name for each in towards)


def require_folder(flag: str, path: Path) -> None:
    """Refuse a path whose folder is not there, before any work is done for it.

    Raises:
        FileNotFoundError: it is not.
        ValueError: the path is a URL.
    """
    try:
        local_path(path)
    except ValueError as error:
        raise ValueError(f"{flag} {error}") from error
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{flag} {str(path)!r}: the directory {str(path.parent)!r} does not exist")


def scores_writer(out: Path, overwrite: bool) -> Callable[[Scores], None]:
    """What writes scores, by the name's ending; what is there is refused before any work is done."""
    writers = {".npy": _write_npy, ".zarr": _write_zarr, ".csv": _write_csv, ".parquet": _write_parquet}
    if out.suffix not in writers:
        raise ValueError(f"--out must end in one of {', '.join(writers)}, got {str(out)!r}")
    require_folder("--out", out)
    replaceable = is_scores_array if out.suffix == ".zarr" else _replaceable
    paths = [out, *([_facts_path(out)] if out.suffix == ".npy" else [])]
    refused_together(
        *(functools.partial(require_free, path, overwrite=overwrite, replaceable=replaceable) for path in paths)
    )
    return functools.partial(writers[out.suffix], out=out, overwrite=overwrite)


def _write_npy(scores: Scores, out: Path, overwrite: bool) -> None:
    facts = {
        "query_ids": [id_word(query_id) for query_id in scores.query_ids],
        "train_ids": [id_word(train_id) for train_id in scores.train_ids],
        "unit": scores.unit,
        "sign": sign_of(scores.unit, additive=scores.additive),
        "higher_is_better": scores.higher_is_better,
    }
    words = json.dumps(facts).encode()
    write_outputs(
        {_facts_path(out): words, out: lambda file: np.save(file, scores.to_numpy())},
        overwrite=overwrite,
        replaceable=_replaceable,
    )


def _facts_path(out: Path) -> Path:
    """Where the ids, unit and sign of an array in ``out`` are written."""
    return out.with_name(f"{out.name}.json")


def _replaceable(path: Path) -> bool:
    """Whether a file may be replaced: one that the user named, or one of facts that was written beside such a one."""
    if path.suffix != ".json" or not path.is_file():
        return path.is_file()
    try:
        facts = json.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(facts, dict) and set(facts) == FACTS


def _write_zarr(scores: Scores, out: Path, overwrite: bool) -> None:
    scores.to_zarr(out, overwrite=overwrite)


def _write_csv(scores: Scores, out: Path, overwrite: bool) -> None:
    require_told_apart(scores.query_ids, scores.train_ids)

    def write(file: BinaryIO) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        lines = csv.writer(text)
        lines.writerow(["query", *(csv_cell(id_word(train_id)) for train_id in scores.train_ids)])
        for query, values in zip(scores.query_ids, scores.values, strict=True):
            lines.writerow([csv_cell(id_word(query)), *map(str, values)])
        text.flush()
        text.detach()

    write_output(out, write, overwrite=overwrite)


def _write_parquet(scores: Scores, out: Path, overwrite: bool) -> None:
    scores.to_parquet(out, overwrite=overwrite)


def _entries(hits: Hits, query: int) -> list[dict[str, Any]]:
    return [
        {"id": plain_id(hit.id), "score": hit.score, "towards": toward(hit.score, hits.higher_is_better)}
        | {"rank": rank + 1, **_known(hits.train_example(query, rank))}
        for rank, hit in enumerate(hits[query])
    ]


def _known(example: Example) -> dict[str, Any]:
    """What is known of an example besides its id and score."""
    known = {
        "label": example.label or None,
        example.verb.replace(" ", "_"): example.prediction,
        "probability": example.probability,
        "text": example.text,
        "file": example.file,
        "row": dict(example.row) if example.words and example.row else None,
    }
    return {name: value for name, value in known.items() if value is not None}
