"""The bank's format, version 3.

A bank is a folder, or what else a store (`source_proj.bank.store`) makes of a place, that holds one zarr v3 group,
readable with plain zarr (``zarr.open_group(path)``). The key words MUST, MUST NOT and MAY are those of RFC 2119.

**Tree**::

    /                                   attributes: format, version, settings, versions, checkpoint_paths,
                                        parameter_choice, modules, columns, base, task_code
    /weights/<hash>                     uint8: safetensors file of a checkpoint that was given as a dict
    /metrics/<hash>                     float32: P^½ of a metric (18); only where optimizers were preconditioned
    /curvature/<hash>                   float32: Ĥ of a segment (23); only where rows are of whole segments
    /stage_<s>/                         attributes: name
    /stage_<s>/part_<p>/                attributes: start, n, batch_size, shard_rows, id_type
    /stage_<s>/part_<p>/ids             (n,)
    /stage_<s>/part_<p>/seal            (2, 32) uint8
    /stage_<s>/part_<p>/checkpoint_<c>/ attributes: step, hash
        rows           (n, k)           sketched gradients R∇o of the outputs, encoded
        scale          (n,)    float32  only if the codec has scales (all but float32)
        d1             (n,)    float32  ℓ'(o)
        d2             (n,)    float32  ℓ''(o), only where settings say second_derivative
        fisher_weight  (n,)    float32  what ℓ'(o) is times in the empirical Fisher, only where settings say so
        batch_hashes   (m, 32) uint8    m = ⌈n / batch_size⌉
        audit          (⌈n / shard_rows⌉, 1024) uint8: JSON of what was audited of a shard, with spaces behind
        fisher_rows    (n·D, k)         sketched gradients of sampled labels, draw j of row i at i·D + j; only if D > 0
        fisher_scale   (n·D,)  float32  only if D > 0 and their codec has scales
        <name>_metric_<m>               rows, scale, fisher_rows and fisher_scale once more, in each metric m that is
                                        crossed from here (18)
        committed      (⌈n / shard_rows⌉, A, 32) uint8: the commit marks; A counts the arrays above that are there
    /fits/                              MAY be there: spectra and matrices that were fitted, no part of the bank

**Root**

1. ``format`` MUST be "source-proj bank", ``version`` MUST be 3; a reader MUST refuse anything else, and say what
   it found.
2. ``settings`` MUST hold exactly: sketch, parameters, task, trajectory, storage (the name of a codec of
   `source_proj.bank.codecs`), sampled_fisher (D, the number of draws), second_derivative, fisher_weight, gradients,
   autocast. The sketch's ``backend`` is "portable", or "fast-jl" with the count ``multiprocessors`` of the device
   beside it: a reader that cannot make that library's matrix for that count MUST refuse the bank, and say both counts.
   ``parameters`` MUST hold names and shapes, and MAY hold ``weights``, a number for each parameter, from 1e-6 to 1e6,
   that its gradients were multiplied by, with ``weighted_by``, "agreement" or "given".
   ``trajectory`` MUST hold exactly the entries of `source_proj.trajectory.record.RunRecord`, each of its type.
3. ``versions`` says what software made the bank, ``parameter_choice`` in words which parameters are attributed.
   ``modules`` MAY say how many modules of each kind the model has, and ``columns`` which numbers the examples of a
   table hold, by name and in order; ``base`` MAY hold two numbers for each tensor that adapters' checkpoints do not
   hold, as `source_proj.bank.base_weights` makes them, and ``task_code`` hashes of a task's own functions, by name: a
   reader compares them with what it is asked with. It MUST NOT
   depend on them otherwise, and no fingerprint covers them.
4. The root's ``zarr.json`` MUST appear last, if it is absent, after all other metadata, ids, weights and metrics; so
   MUST a part's own, after all that lies below it. What is there already MUST be compared, and a writer whose own
   differs MUST NOT go on. A writer MUST NOT change any of it later. Where the root, or a part's group, is absent, a
   reader MUST take the bank, or the part, for absent.
20. Links MUST NOT be in a bank; a reader MUST refuse it, and a writer MUST NOT write through one.
21. Sizes of objects follow from the metadata, exactly or within bounds (`ArraySpec.size_range`); a reader MUST compare
    them before it allocates what metadata claim.

**Stages and parts**

5. There MUST be one group ``stage_<s>`` for every stage of the trajectory, in its order, with at least ``part_0``.
   Parts are numbered without gaps; each further one holds appended rows. A part's ``start`` MUST be the number of rows
   before it.
6. ``shard_rows`` MUST be a multiple of ``batch_size``: rows of a shard depend on no other shard.
7. ``id_type`` MUST be "int64" or "string", and ids MUST be unique within a stage.
8. Shapes, types, chunks, shards and codecs MUST be those of `source_proj.bank.layout`. Shard i of each array holds
   everything of the part's rows [i·shard_rows, (i+1)·shard_rows), in the one object ``c.i`` (``c.i.0``, ``c.i.0.0``).
9. Every chunk MUST carry a CRC-32C, and every shard index too.

**Rows**

10. Row z of ``rows`` times its scale is the sketched gradient of the output. int8 MUST lie in [-127, 127]; the fill
    values (-128, and NaN for floating point) MUST NOT occur among rows or scales: they show what was never written.
    int4, int2 and int1 are packed in ⌈k·b / 8⌉ bytes a row, and a row is the levels that they name, rotated back, times
    its scale: `source_proj.bank.codecs.lloyd_max` says in which order, `source_proj.kernels.rotation` by which matrix.
    ``fisher_rows`` MUST be int4 where storage is int8, else as storage says.
11. ``batch_hashes`` holds the SHA-256 of each batch's data, and MUST be the same at all checkpoints.

20. ``audit`` holds for each shard: examples (batches of every function counted), audited_batches, audited_examples,
    worst_error (relative, of the law of `source_proj.gradients.proof`), and general: {reason: examples} of those that
    went by the general path. It MUST be the same whoever makes the shard, and rests on nothing outside of it.

**Metrics**

18. A preconditioned optimizer's rows are R P^½ ∇o for a diagonal P. ``metrics`` of the ``trajectory`` lists the
    metrics, null for the identity, else a hash: the SHA-256, in hex, of the diagonal of P^½ in the order of
    ``parameters`` (little-endian float32). ``metrics`` of each stage holds the index of each checkpoint's metric. Those
    of a stage whose ``preconditioner`` is neither "shared" nor "per_segment" hold, for each parameter of two axes or
    more, p (the first axis) and then q (all others, C order), whose outer product is the diagonal's part; their hash is
    that of the word "factored" (ASCII) followed by the numbers. Of a stage without a preconditioner, or with a number
    in its place, such a P is 0 for the parameters that the stage did not move and another one did, and else 1.
19. A checkpoint crosses the metrics of earlier ones (of its own and earlier stages) that are not its own, and MUST hold
    its rows in these too.

**Rows of whole segments**

23. Where a stage of the ``trajectory`` has a ``capture``, its rows were captured while it trained, or are the means of
    those of another bank. There is one checkpoint for each segment, and its rows are the loss gradients of the segment,
    weighted as `source_proj.bank.capture.sums` says, or their mean over its checkpoints: ``d1`` MUST be 1,
    ``batch_hashes`` all zeros, as no data were read again. ``curvature`` lists the hash of each segment's Ĥ, ``kind``
    says which curvature that is, "empirical_fisher", "sampled_fisher" or "gauss_newton", and ``query_points`` the
    weights at which queries are differentiated. Such a bank MUST have no ``fisher_rows``, no second derivatives and one
    metric.
24. An Ĥ is that of each of the ⌈k / 4096⌉ blocks of columns, of which block b of B has the columns ⌊b k / B⌋ to
    ⌊(b + 1) k / B⌋ (one block where the sketch is exact), and of each block the panels of 384 rows from the diagonal
    on, as `source_proj.kernels.gram` packs them, one after the other; what lies below the diagonal in a panel is of no
    meaning. Its hash is the SHA-256, in hex, of its numbers (little-endian float32).

**Commits**

12. A commit mark is, for one checkpoint and shard, the SHA-256 of each array's decoded bytes of that shard
    (little-endian, C order, rows that exist only), the arrays in the order listed above. All zeros: not done.
13. A mark MUST be written after the shard's data are on the disk, and only if it is absent. What is marked MUST NOT be
    written with other bits, by whomever: so a writer MUST put its data under names of its own first, and then the
    object ``committed/c.i.0.0.choice.partial``, 32 bytes that these names share and the mark, only if it is absent. If
    there is no mark now, it MUST put the data of the choice that is there where they belong, and then the choice's
    mark. The choice MUST NOT be removed before there is a mark. A writer that finds a mark MUST keep what is there.
14. Objects MUST appear whole under their names. Those that end in ".partial" are writers' own, or left by killed ones;
    a reader MUST ignore them.
22. A reader MUST compare a shard's data with their mark before it takes rows from them, for every version of an object.

**Seals**

15. A part without mark of zeros is complete, and gets its seal, which MUST be written only if it is absent: 32 bytes of
    SHA-256 over settings (paths aside), the part's name and attributes, ids and marks, and 32 bytes over the canonical
    JSON of the metadata of root, weights, metrics, stage and part. All zeros: not sealed. A bank is finalized when
    every part is sealed; a reader MUST NOT take rows from any other bank.
16. A reader MUST refuse a sealed part of which either hash does not match.
17. The bank's fingerprint is the SHA-256, in hex, of the parts' content seals in order.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from source_proj._errors import BankError
from source_proj.bank.codecs import Codec, find_codec
from source_proj.gradients.space import LEAST_WEIGHT
from source_proj.sketch import Sketch
from source_proj.trajectory import RunRecord

__all__ = ["FORMAT", "VERSION", "Settings", "canonical", "sha256", "storage_of"]

FORMAT = "source-proj bank"
VERSION = 3

_OF_SAMPLED = {"int8": "int4"}
_WIDEST = {"int8": 4096, "int4": 8192}  # numbers a row in 4,096 bytes

_LISTED = 5


def storage_of(storage: str | None, sketch: Mapping[str, Any], size: int) -> str:
    """The name of a codec, by default the one of most bits that keeps a row in 4,096 bytes, or int2.

    In as many bytes, more numbers of fewer bits predict retraining better (examples/paper/LABORATORY.md, study l): a
    row of k <= 4,096 is int8, up to 8,192 it is int4, and beyond int2. Rows that are not projected are int8, and so are
    those of a sketch that is larger than the gradient: most of their numbers are zeros, which zstd packs in int8, and
    which the few levels of other codecs lie beside.

    Args:
        storage: a codec's name, or None for the default.
        sketch: ``Sketch.spec()``.
        size: d, of the gradients.

    Example:
        >>> [storage_of(None, Sketch(dim).spec(), 100_000) for dim in (4096, 8192, 16384)]
        ['int8', 'int4', 'int2']
    """
    if storage is not None:
        return storage
    exact = sketch["kind"] == "identity" or sketch["dim"] >= size
    return next((name for name, most in _WIDEST.items() if exact or sketch["dim"] <= most), "int2")


def require_weights(parameters: Mapping[str, Any]) -> None:
    """Refuse weights of parameters that are not positive numbers, one a parameter.

    Raises:
        ValueError: says what was found.
    """
    if "weights" not in parameters:
        return
    weights, names = parameters["weights"], parameters.get("names", [])
    least, most = LEAST_WEIGHT, 1 / LEAST_WEIGHT
    if (
        not isinstance(weights, list)
        or len(weights) != len(names)
        or not all(
            isinstance(weight, int | float) and not isinstance(weight, bool) and least <= weight <= most
            for weight in weights
        )
    ):
        raise ValueError(
            f"the parameters' weights are {weights!r:.200}, and must be a number for each, {least} to {most:g}"
        )


@dataclass(frozen=True)
class Settings:
    """What the rows of a bank depend on besides the data; the bank's ``settings`` attribute.

    Attributes:
        sketch: ``Sketch.spec()``.
        parameters: ``ParameterSpace.spec()``.
        task: ``Task.spec()``.
        trajectory: the run's record.
        storage: name of the codec of its rows.
        sampled_fisher: draws of sampled labels.
        second_derivative: whether the task gives ℓ''.
        fisher_weight: whether the task gives a factor of ℓ' for the empirical Fisher.
        gradients: "auto", "hooks" or "general".
        autocast: None, "bfloat16" or "float16".
    """

    sketch: dict[str, Any]
    parameters: dict[str, Any]
    task: dict[str, Any]
    trajectory: RunRecord
    storage: str
    sampled_fisher: int
    second_derivative: bool
    fisher_weight: bool
    gradients: str
    autocast: str | None

    def __post_init__(self) -> None:
        find_codec(self.storage)
        for name, value in vars(self).copy().items():
            if name == "trajectory":
                continue
            # as JSON gives them back: tuples become lists, keys strings
            try:
                plain = json.loads(json.dumps(value, allow_nan=False))
            except (TypeError, ValueError) as error:
                raise TypeError(f"{name} {value!r} cannot be written down as JSON: {error}") from error
            object.__setattr__(self, name, plain)
        draws = self.sampled_fisher
        if isinstance(draws, bool) or not isinstance(draws, int) or draws < 0:
            raise ValueError(f"sampled_fisher must be a number of draws, 0 or more, got {draws!r}")

    @classmethod
    def from_json(cls, entries: Any) -> "Settings":
        """Read the attribute back.

        Raises:
            BankError: entries are missing, unknown, or of the wrong type.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(entries, Mapping) or sorted(entries) != sorted(names):
            given = sorted(entries) if isinstance(entries, Mapping) else entries
            raise BankError(f"its settings are {given!r}, and must be {sorted(names)}")
        for name in ("sketch", "parameters", "task"):
            if not isinstance(entries[name], Mapping):
                raise BankError(f"its setting {name!r} is {entries[name]!r}, and must be an object")
        try:
            Sketch.require_spec(entries["sketch"])
            require_weights(entries["parameters"])
            return cls(**{**entries, "trajectory": RunRecord.from_json(entries["trajectory"])})
        except (TypeError, ValueError) as error:
            raise BankError(f"its settings are malformed: {error}") from error

    @property
    def codec(self) -> Codec:
        """How rows are stored."""
        return find_codec(self.storage)

    @property
    def sampled_codec(self) -> Codec:
        """How rows of sampled labels are stored: coarser, as their errors average out in the curvature they are for."""
        return find_codec(_OF_SAMPLED.get(self.storage, self.storage))

    @property
    def row_bytes(self) -> int:
        """Bytes of the larger of an example's two arrays at a checkpoint: its row, and its rows of sampled labels."""
        k = int(self.sketch["dim"])
        return max(self.codec.row_bytes(k), self.sampled_fisher * self.sampled_codec.row_bytes(k))

    def to_json(self) -> dict[str, Any]:
        """The ``settings`` attribute."""
        return {**vars(self), "trajectory": self.trajectory.to_json()}

    def identity(self) -> dict[str, Any]:
        """The settings without the paths of checkpoints: their hashes say what they are, wherever they lie."""
        identity: dict[str, Any] = _without_paths(self.to_json())
        return identity

    def differences(self, other: "Settings") -> list[str]:
        """Name each entry that differs, with its value in ``self`` and in ``other``."""
        texts = _differences("", self.identity(), other.identity())
        if any(text.startswith("task.") for text in texts):  # which these two follow from
            texts = [text for text in texts if not text.startswith(("second_derivative ", "fisher_weight "))]
        return texts[:_LISTED]


def canonical(value: Any) -> bytes:
    """JSON with one spelling for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def sha256(*parts: bytes) -> bytes:
    """SHA-256 over parts, each with its length before it: no two lists of parts give one text."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(entry) for key, entry in value.items() if not (key == "path" and "hash" in value)}
    if isinstance(value, list):
        return [_without_paths(entry) for entry in value]
    return value


def _differences(name: str, there: Any, here: Any) -> list[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        texts = []
        for key in dict.fromkeys([*there, *here]):
            texts += _differences(f"{name}.{key}" if name else key, there.get(key), here.get(key))
        return texts
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        return [
            text for i, pair in enumerate(zip(there, here, strict=True)) for text in _differences(f"{name}[{i}]", *pair)
        ]
    return [] if there == here else [f"{name} is {_short(there)} there and {_short(here)} here"]


def _short(value: Any) -> str:
    """A value for a message; of a hash its beginning."""
    return re.sub(r"[0-9a-f]{64}", lambda digest: f"{digest[0][:12]}…", repr(value))
