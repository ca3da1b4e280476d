"""What is kept of queries: the sketched gradients of their measurements, computed once and saved where that helps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from source_proj._errors import MismatchError, MissingFileError
from source_proj._io.loading import load_safetensors
from source_proj._io.outputs import from_home, local_path, write_output
from source_proj._io.printable import counted
from source_proj.attribution.words import id_of, plain_ids
from source_proj.bank import Bank
from source_proj.bank.examples import Examples
from source_proj.task import Answers, Task
from source_proj.trajectory import Checkpoint

__all__ = ["QueryFeatures", "SketchedQueries", "checked_features", "point_key", "subject_of"]

_FORMAT = "source-proj query features 3"


@dataclass(frozen=True)
class QueryFeatures:
    """Sketched measurement gradients of Q queries: compute them once, ask many methods.

    Attributes:
        rows: by :func:`point_key`, R∇m(q) at these weights (R P^½ ∇m(q) in a metric P), each ``(Q, k)`` float32.
        ids: Q query ids.
        sketch: the sketch's description; a bank's must equal it.
        answers: what the model said of the queries, where it was asked about that and not about their targets.
        examples: how the queries are shown; None where only their features are known.
        subject: what else the gradients are of, see :func:`subject_of`; None where nobody said.
        measurements: m(q) at the bank's final weights ``(Q,)`` float32; None where no gradient is taken there.
        whole: how many queries were asked, where these are some of them; 0 where they are all.
    """

    rows: dict[str, Tensor]
    ids: list[Any]
    sketch: dict[str, Any]
    answers: Answers | None = None
    examples: Examples | None = field(default=None, repr=False, compare=False)
    subject: dict[str, str] | None = None
    measurements: Tensor | None = field(default=None, repr=False, compare=False)
    whole: int = field(default=0, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"QueryFeatures({self._described()})"

    def _described(self) -> str:
        queries = f"{len(self)} {'query' if len(self) == 1 else 'queries'}"
        return f"{queries}, k={self.sketch.get('dim')}, at {counted(len(self.rows), 'checkpoint')}"

    @property
    def asked(self) -> int:
        """How many queries are asked in all, of which these are the ones at hand."""
        return max(self.whole, len(self.ids))

    def at(self, checkpoint: Checkpoint, metric: str | None = None) -> Tensor:
        """Return the rows ``(Q, k)`` taken at a checkpoint, in the metric of a hash.

        Raises:
            MismatchError: if these features were not computed at that checkpoint, or not in that metric.
        """
        rows = self.rows.get(point_key(checkpoint, metric))
        if rows is None:
            known = [" in metric ".join(part[:12] for part in key.split(":")) for key in self.rows]
            wanted = " in metric ".join(part[:12] for part in point_key(checkpoint, metric).split(":"))
            raise MismatchError(
                f"these query features were taken at weights {known}, and are needed at "
                f"{wanted} (step {checkpoint.step}); compute them with the method's own sketch(queries)"
            )
        return rows

    def only(self, places: Sequence[int]) -> QueryFeatures:
        """Those of the queries at some places."""
        return QueryFeatures(
            {point: rows[list(places)] for point, rows in self.rows.items()},
            [self.ids[place] for place in places],
            self.sketch,
            None if self.answers is None else self.answers.at(places),
            None if self.examples is None else self.examples.at(places),
            self.subject,
            None if self.measurements is None else self.measurements[list(places)],
            self.asked,
        )

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write these features to a file; see :meth:`SketchedQueries.save`."""
        SketchedQueries([self]).save(path, overwrite=overwrite)

    @staticmethod
    def load(path: str | Path) -> SketchedQueries:
        """Read what :meth:`SketchedQueries.save` wrote; every verb of a method on these banks takes it for queries.

        Raises:
            MissingFileError: there is no such file.
            MismatchError: it holds no features, or was damaged.
        """
        return SketchedQueries(_read(from_home(path)))


class SketchedQueries(list[QueryFeatures]):
    """The features of some queries, one entry a bank of the method that sketched them."""

    def __repr__(self) -> str:
        if not self:
            return "SketchedQueries()"
        return f"SketchedQueries({self[0]._described()}{f'; {len(self)} banks' if len(self) > 1 else ''})"

    @property
    def ids(self) -> list[Any]:
        """Q query ids."""
        return self[0].ids

    @property
    def measurements(self) -> Tensor | None:
        """The queries' measurements ``(Q,)``, the mean over the banks; None where one bank's are not known."""
        known = [features.measurements for features in self if features.measurements is not None]
        return torch.stack(known).mean(0) if known and len(known) == len(self) else None

    def part(self, start: int, stop: int) -> SketchedQueries:
        """Those of the queries start to stop."""
        return self.only(range(start, min(stop, len(self.ids))))

    def only(self, places: Sequence[int]) -> SketchedQueries:
        """Those of the queries at some places."""
        return SketchedQueries(features.only(places) for features in self)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the features, ids and the model's answers to one safetensors file, whole or not at all.

        Args:
            path: the file.
            overwrite: replace a file that has this name.

        Raises:
            FileExistsError: something is there that may not be overwritten.
            TypeError: an id is no number, string or tuple of such.
        """
        tensors: dict[str, Tensor] = {}
        for number, features in enumerate(self):
            tensors |= {f"{number}/rows/{point}": rows.contiguous() for point, rows in features.rows.items()}
            if features.measurements is not None:
                tensors[f"{number}/measurements"] = features.measurements.contiguous()
            if features.answers is not None:
                tensors[f"{number}/answers"] = features.answers.values.contiguous()
                tensors[f"{number}/probabilities"] = features.answers.probabilities.contiguous()
        answers = [features.answers for features in self]
        facts = json.dumps(
            {
                "ids": [plain_ids(features.ids) for features in self],
                "sketches": [features.sketch for features in self],
                "subjects": [features.subject for features in self],
                "answers": [None if a is None else {"padding": a.padding, "chosen": a.chosen} for a in answers],
            }
        )
        metadata = {"format": _FORMAT, "facts": facts, "sha256": _digest(tensors, facts)}
        write_output(local_path(path), save(tensors, metadata), overwrite=overwrite)


def subject_of(bank: Bank, task: Task) -> dict[str, str]:
    """What gradients of queries are of, beside weights and sketch: parameters with their weights, measurement, numbers.

    A loss's normalizer is of the training set and does not enter a measurement.
    """
    measured = {key: value for key, value in task.spec().items() if key != "normalizer"}
    measured["target"] = getattr(task, "target", None)  # which a spec, being of training, leaves out
    said = {"parameters": bank.space_spec, "measurement": measured, "autocast": bank.autocast}
    return {
        name: hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
        for name, what in said.items()
    }


def checked_features(
    features: list[QueryFeatures], sketches: Sequence[Mapping[str, Any]], subjects: Sequence[Mapping[str, str]]
) -> SketchedQueries:
    """Features of given sketches and subjects, one for each bank that a method averages.

    Raises:
        MismatchError: there are more or fewer than banks, or one is of another sketch, of other parameters, of other
            weights of these, or of another measurement.
    """
    if len(features) != len(sketches):
        raise MismatchError(f"got features for {len(features)} banks, and this method averages {len(sketches)}")
    for queried, sketch, subject in zip(features, sketches, subjects, strict=True):
        if queried.sketch != sketch:
            raise MismatchError(
                f"features of {queried.sketch} do not fit the bank's {sketch}: compute them by this method's own "
                "sketch(queries)"
            )
        others = [name for name, what in (queried.subject or subject).items() if subject.get(name) != what]
        if others:
            raise MismatchError(
                f"these query features are not the bank's in {' and '.join(others)}: "
                "compute them by this method's own sketch(queries)"
            )
    return SketchedQueries(features)


def point_key(checkpoint: Checkpoint, metric: str | None) -> str:
    """Name of a point where queries are differentiated: the weights' hash, and the metric's where there is one."""
    return checkpoint.hash() if metric is None else f"{checkpoint.hash()}:{metric}"


def _read(path: Path) -> list[QueryFeatures]:
    if not path.is_file():
        raise MissingFileError(f"there is no file {str(path)!r}: save features there by features.save(path)")
    tensors = load_safetensors(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != _FORMAT:
        raise MismatchError(f"{str(path)!r} holds no query features, but {metadata.get('format')!r}: save them anew")
    if metadata["sha256"] != _digest(tensors, metadata["facts"]):
        raise MismatchError(f"the query features {str(path)!r} are damaged: compute and save them anew")
    facts = json.loads(metadata["facts"])
    return [
        QueryFeatures(
            _rows_of(tensors, f"{number}/rows/"),
            [id_of(given) for given in ids],
            sketch,
            None if told is None else Answers(tensors[f"{number}/answers"], tensors[f"{number}/probabilities"], **told),
            subject=subject,
            measurements=tensors.get(f"{number}/measurements"),
        )
        for number, (ids, sketch, told, subject) in enumerate(
            zip(*(facts[name] for name in ("ids", "sketches", "answers", "subjects")), strict=True)
        )
    ]


def _rows_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): rows for name, rows in tensors.items() if name.startswith(prefix)}


def _digest(tensors: Mapping[str, Tensor], facts: str) -> str:
    digest = hashlib.sha256(facts.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
