"""Mutations of a folder's files: what disks, copies, editors and strangers do to them."""

import collections
import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import torch

__all__ = ["EVERYWHERE", "OF_BANKS", "OF_TENSORS", "Entry", "Files", "Mutation", "Odd", "write"]

VALUES = [
    None, True, -1, 0, 1, 2**31, 10**8, 10**10, 2**63, 10**400, 0.5, -1e308, float("nan"), float("inf"), "", "x", "1",
    "../..", "\ud800", "\x1b[2J", "a" * 100_000, [], [0], [[]], {}, {"": None}, [None] * 1000,
]  # fmt: skip


@dataclass(frozen=True)
class Odd:
    """What stands in a file's place, or is longer than one keeps in memory."""

    kind: Literal["link", "folder", "pipe", "hole"]
    target: str = ""
    content: bytes = b""

    def make(self, path: Path) -> None:
        """Put it there."""
        if self.kind == "link":
            path.symlink_to(self.target)
        elif self.kind == "folder":
            path.mkdir()
        elif self.kind == "pipe":
            os.mkfifo(path)
        else:
            path.write_bytes(self.content)
            os.truncate(path, len(self.content) + (5 << 28))


Entry = bytes | Odd
Files = dict[str, Entry]
Mutation = Callable[[random.Random, Files], str]
"""Changes files in place, and says what it did; "forged" begins what no digest can tell from the true one."""


def write(files: Files, root: Path) -> None:
    """Make the files below a folder; those that lie in what is no folder any more are left out."""
    for name, entry in sorted(files.items(), key=lambda item: isinstance(item[1], Odd)):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(entry, bytes):
            path.write_bytes(entry)
        else:
            entry.make(path)


def plain(files: Files, ends: tuple[str, ...] = ("",)) -> dict[str, bytes]:
    """The files that are files, by name."""
    return {name: c for name, c in sorted(files.items()) if isinstance(c, bytes) and name.endswith(ends)}


def some(draw: random.Random, files: Files, *ends: str) -> tuple[str, bytes]:
    """A file with its content, metadata as often as data."""
    known = plain(files, ends or ("",)) or {"new": b""}
    kinds = [[n for n in known if n.endswith(".json")], [n for n in known if not n.endswith(".json")]]
    name = draw.choice(draw.choice([kind for kind in kinds if kind]))
    return name, known[name]


# Of any files ----------------------------------------------------------------------------------------------------


def flipped(draw: random.Random, files: Files) -> str:
    """Some bits."""
    name, before = some(draw, files)
    content = bytearray(before)
    for _ in range(draw.choice([1, 1, 1, 2, 50])):
        if content:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    files[name] = bytes(content)
    return f"bits of {name}"


def cut(draw: random.Random, files: Files) -> str:
    """The end of a file gone, or more of it there."""
    name, content = some(draw, files)
    size = len(content)
    length = draw.choice([0, 1, size // 2, max(0, size - 1), draw.randrange(size + 1)])
    files[name] = content[:length] if draw.random() < 0.7 else content + content[:length]
    return f"length of {name}"


def swapped(draw: random.Random, files: Files) -> str:
    """Two files in each other's place, alike if possible."""
    name, content = some(draw, files)
    known = plain(files) or {name: content}
    alike = [n for n in known if n != name and n.rpartition("/")[0].rpartition("/")[2] in name]
    alike = [n for n in alike if len(known[n]) == len(content)] or alike or list(known)
    other = draw.choice(alike)
    files[name], files[other] = known[other], content
    return f"swap of {name} and {other}"


def overwritten(draw: random.Random, files: Files) -> str:
    """One file over another."""
    (name, content), (other, _) = some(draw, files), some(draw, files)
    files[other] = content
    return f"{name} over {other}"


def removed(draw: random.Random, files: Files) -> str:
    """A file, or all below a folder, gone."""
    name, _ = some(draw, files)
    folder = name.rpartition("/")[0] if draw.random() < 0.4 else name
    for gone in [n for n in files if n == name or (folder and n.startswith(f"{folder}/"))]:
        del files[gone]
    return f"removal of {folder}"


def added(draw: random.Random, files: Files) -> str:
    """A file that does not belong."""
    folder = some(draw, files)[0].rpartition("/")[0]
    names = ["c.7.0", "x.partial", "zarr.json", "note", "c.0.0.0.choice.partial", "step_00000001.pt", "c/9/9/0"]
    name = f"{folder}/{draw.choice(names)}".lstrip("/")
    if not any(other.startswith(f"{name}/") or name.startswith(f"{other}/") for other in files):
        files[name] = draw.choice([b"", b"{}", draw.randbytes(40), some(draw, files)[1]])
    return f"a new {name}"


def replaced(draw: random.Random, files: Files) -> str:
    """A link, a folder, a pipe or a file with a hole of over a gibibyte in a file's place."""
    name, content = some(draw, files)
    other = os.path.relpath(some(draw, files)[0], os.path.dirname(name))
    targets = [os.path.basename(name), other, "/dev/zero", "/dev/null", "nowhere", ".", "/"]
    odd = draw.choice([Odd("link", draw.choice(targets)), Odd("folder"), Odd("pipe"), Odd("hole", content=content)])
    files[name] = odd
    return f"a {odd.kind} {odd.target} for {name}"


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Ways to all entries of a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way for key, entry in inner for way in ((*path, key), *leaves(entry, (*path, key)))]


def edited(draw: random.Random, files: Files) -> str:
    """An entry of some metadata replaced, removed, doubled, or nested deep."""
    name, content = some(draw, files, ".json")
    try:
        document = json.loads(content)
        *way, last = draw.choice(leaves(document))
    except (ValueError, IndexError, RecursionError):  # no document, or an empty one
        return flipped(draw, files)
    inner = document
    for key in way:
        inner = inner[key]
    action = draw.random()
    if action < 0.15:
        del inner[last]
    elif action < 0.25 and isinstance(inner, dict):
        inner["another"] = inner[last]
    elif action < 0.4 and isinstance(inner[last], int | float) and not isinstance(inner[last], bool):
        inner[last] += draw.choice([-1, 1, 10**10])
    elif action < 0.5:
        inner[last] = "DEEP"
    else:
        inner[last] = draw.choice(VALUES)
    text = json.dumps(document)
    if action > 0.9 and isinstance(inner, dict) and last in inner:  # the same key once more, with what was there
        text = text.replace(f"{json.dumps(last)}:", f"{json.dumps(last)}: 7, {json.dumps(last)}:", 1)
    files[name] = text.replace('"DEEP"', "[" * 50_000 + "]" * 50_000).encode()
    return f"{[*way, last]} of {name}"


EVERYWHERE: list[Mutation] = [
    flipped, flipped, cut, swapped, overwritten, removed, added, replaced, edited, edited, edited,
]  # fmt: skip


# Of banks and ground truths --------------------------------------------------------------------------------------


def rechecked(draw: random.Random, files: Files) -> str:
    """Other content under a right checksum."""
    known = {n: c for n, c in plain(files).items() if not n.endswith(".json") and "rows" not in n and len(c) > 4}
    if not known:
        return flipped(draw, files)
    name = draw.choice(list(known))
    body = bytearray(known[name][:-4])
    body[draw.randrange(len(body))] ^= 1 << draw.randrange(8)
    files[name] = bytes(body) + struct.pack("<I", google_crc32c.value(bytes(body)))
    return f"content of {name}"


def claiming(draw: random.Random, files: Files) -> str:
    """More rows, or retrainings, than there are, in all metadata alike."""
    before, after = draw.choice([(90, 10**8), (90, 10**10), (90, 91), (32, 10**9), (30, 10**8), (12, 10**9)])
    for name, content in plain(files, ("zarr.json",)).items():
        with contextlib.suppress(ValueError, RecursionError):  # of what another mutation made
            files[name] = json.dumps(exchanged(json.loads(content), before, after)).encode()
    for name in [n for n in files if "/seal/c." in n]:
        if draw.random() < 0.5:
            del files[name]
    return f"{after} for {before} everywhere"


def exchanged(value: Any, before: int, after: int) -> Any:
    """A document with one number for another."""
    if isinstance(value, dict):
        return {key: exchanged(entry, before, after) for key, entry in value.items()}
    if isinstance(value, list):
        return [exchanged(entry, before, after) for entry in value]
    return after if value == before and not isinstance(value, bool) else value


OF_BANKS: list[Mutation] = [*EVERYWHERE, swapped, rechecked, claiming]


# Of files of tensors ---------------------------------------------------------------------------------------------


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, way: str) -> None:
        self.way = way

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.way,)


def saved(content: Any) -> bytes:
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def nested(levels: int) -> dict[str, Any]:
    """Dicts in dicts."""
    content: dict[str, Any] = {}
    for _ in range(levels):
        content = {"model": content}
    return content


def endless() -> dict[str, Any]:
    """A dict that holds itself."""
    content: dict[str, Any] = {}
    content["model"] = content
    return content


def altered_tensors(draw: random.Random, content: Any) -> Any:
    """A state with a tensor of another type, shape, layout or size."""
    odd: list[Callable[[torch.Tensor], Any]] = [
        lambda t: t.to(torch.complex64), lambda t: t.to(torch.int32), lambda t: t.double(), lambda t: t.half(),
        lambda t: t.reshape(-1), lambda t: t[..., None], lambda t: t.to("meta"), lambda t: t.to_sparse(),
        lambda t: t.new_zeros(1).expand(1 << 20, 1 << 20), lambda t: t.new_zeros(()).expand(t.shape),
        lambda t: t.new_empty(0), lambda t: t * float("nan"), lambda t: -1 - t.abs(), lambda t: t.tolist(),
        lambda t: None, lambda t: "x",
    ]  # fmt: skip
    change = draw.choice(odd)
    if isinstance(content, torch.Tensor):
        enormous = content.numel() > 1 << 20  # by an earlier change; to compute with it would take all memory
        return None if enormous else change(content)
    if not isinstance(content, dict | list) or not content:
        return draw.choice([None, -1, "x", [], {}])
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    key = draw.choice(keys)
    action = draw.random()
    if action < 0.1 and isinstance(content, dict):
        del content[key]
    elif action < 0.2 and isinstance(content, dict):
        content[draw.choice([5, "another", ("a",), None])] = content[key]
    else:
        content[key] = altered_tensors(draw, content[key])
    return content


def hostile(draw: random.Random, files: Files) -> str:
    """A file of torch's that runs code, claims much, is nested deep, or holds what it should not."""
    name, before = some(draw, files, ".pt")
    way = "pwned"  # in the working directory
    choices: list[Callable[[], bytes]] = [
        lambda: pickle.dumps(Hostile(way)),
        lambda: pickle.dumps({"model": Hostile(way)}, protocol=2),
        lambda: saved({"weight": Hostile(way)}),
        lambda: saved(collections.OrderedDict(a=torch.zeros(1), b=Hostile(way))),
        lambda: rezipped(before, lambda inner: inner.replace(b"ctorch.", b"cposix.")),
        lambda: rezipped(before, lambda inner: inner.replace(b"K\x08", b"J\xff\xff\xff\x7f")),
        lambda: rezipped(before, lambda inner: b"(" * 100_000 + inner),
        lambda: saved({"weight": torch.zeros(1).expand(1 << 40)}),
        lambda: saved({f"w{i}": torch.zeros(1).expand(1 << 23) for i in range(1000)}),
        lambda: saved(nested(draw.choice([3, 30, 300]))),
        lambda: saved(endless()),
        lambda: saved(draw.choice([None, 5, [], {}, "x", torch.zeros(3), {"model": 3}, {5: torch.zeros(2)}])),
    ]
    files[name] = draw.choice(choices)()
    return f"something hostile for {name}"


def rezipped(before: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """A file of torch's with another pickle in it."""
    after = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(before)) as old, zipfile.ZipFile(after, "w") as new:
            for entry in old.namelist():
                inner = old.read(entry)
                new.writestr(entry, change(inner) if entry.endswith("data.pkl") else inner)
    except (zipfile.BadZipFile, NotImplementedError, EOFError):
        return before[::-1]
    return after.getvalue()


def retyped(draw: random.Random, files: Files) -> str:
    """A tensor of another type, shape, layout or size."""
    name, before = some(draw, files, ".pt")
    try:
        content = torch.load(io.BytesIO(before), weights_only=True)
    except Exception:  # of what another mutation made
        content = {"weight": torch.zeros(2, 2)}
    files[name] = saved(altered_tensors(draw, content))
    return f"tensors of {name}"


def safetensors_header(draw: random.Random, files: Files) -> str:
    """Another header of a safetensors file, or another length of it."""
    name, before = some(draw, files, ".safetensors")
    try:
        (length,) = struct.unpack("<Q", before[:8])
        header = json.loads(before[8 : 8 + length])
        key = draw.choice([key for key in header if key != "__metadata__"])
        entry, field = header[key], draw.choice(["dtype", "shape", "data_offsets"])
        kinds = {
            "dtype": ["C64", "F64", "I32", "BOOL", "F4", "x", None, 5],
            "shape": [[], [10**12], [-1], [0], [2**63], entry["shape"][::-1], "x", None],
            "data_offsets": [[0, 2**60], [4, 0], [0, 0], [-1, 8], "x", [0]],
        }
        entry[field] = draw.choice(kinds[field])
        text = json.dumps(header).encode()
    except (struct.error, ValueError, IndexError, KeyError, TypeError):  # of what another mutation made
        return flipped(draw, files)
    claimed = draw.choice([len(text)] * 4 + [2**60, 0, len(text) + 1])
    files[name] = struct.pack("<Q", claimed) + text + before[8 + length :]
    return f"the header of {name}"


def forged_run(draw: random.Random, files: Files) -> str:
    """A recorded run altered by someone who computes its digests anew."""
    for mutation in draw.choices([edited, retyped, hostile], k=draw.choice([1, 1, 2])):
        mutation(draw, files)
    known = plain(files)
    try:
        document = json.loads(known["trajectory.json"])
        for checkpoint in document["checkpoints"]:
            for kind, prefix in (("weights", "step"), ("moments", "moments")):
                name = f"{prefix}_{checkpoint['step']:08d}.pt"
                if name in known:
                    checkpoint[kind] = hashlib.sha256(known[name]).hexdigest()
        resume = [name for name in known if name.startswith("optimizer_")]
        document["resume"] = hashlib.sha256(known[resume[0]]).hexdigest()
        document.pop("digest", None)
        document["digest"] = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
        files["trajectory.json"] = json.dumps(document).encode()
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError):
        return flipped(draw, files)
    return "forged: a run with digests that fit"


OF_TENSORS: list[Mutation] = [*EVERYWHERE, hostile, hostile, retyped, retyped]
