"""Of which data a part is, before a shard of it is committed and says so itself.

Two calls that begin at once with other data would fill one part together, and neither could finish it. So whoever is
first writes hashes of some batches beside the part's ids, if they are absent, and who reads others there stops before
it commits anything. Once a shard is committed, that shard counts and nothing else: it is looked for after the hashes
were put, and they are removed after it was committed, so that whoever puts them anew sees it.
"""

from contextlib import suppress
from itertools import pairwise

from source_proj._errors import BankError, write_remedy
from source_proj._io.files import PARTIAL
from source_proj.bank.build.batch_hash import batch_hash
from source_proj.bank.build.data import BatchSource
from source_proj.bank.read.part import OtherDataError, Part

__all__ = ["FirstData", "NotFirstError"]

_BATCHES = 4  # that are compared, spread evenly: data that differ nowhere there are told apart by the first shards


class NotFirstError(OtherDataError):
    """Another call began a part with other examples, before this one committed anything."""


class FirstData:
    """What a call said of its data, in the parts that had no shard.

    Until its own first shard is there, or it fails.
    """

    def __init__(self) -> None:
        self._said: dict[str, bool] = {}  # parts, and whether it was said here

    def say(self, part: Part, source: BatchSource) -> None:
        """Say of which data a part without a shard is, or compare them with what another call said.

        Raises:
            NotFirstError: that one has others.
            BankError: it cannot be said.
        """
        if part.sealed() is not None or _has_shards(part):
            return
        key, mine = _key(part), _hashes(part, source)
        try:
            here = not part.store.put_if_absent({key: mine})
            said = mine if here else _read(part)
        except OSError as error:
            raise BankError(f"cannot write {part.store.location(key)}: {error}; {write_remedy(error)}") from error
        self._said[part.name] = here
        if _has_shards(part):
            self.forget(part)
        elif said not in (mine, None):
            del self._said[part.name]
            raise NotFirstError(
                f"{part.location} was begun with other examples than these, though as many: if another process is at "
                f"it now, wait until it is done; if it was killed, remove {part.store.location(key)}. Every pass must "
                "see the same examples in the same order: switch off shuffling and random augmentation"
            )

    def forget(self, part: Part) -> None:
        """Remove what was said of a part: one of its shards says it from now on."""
        if self._said.pop(part.name, None) is not None:
            with suppress(OSError):  # sealing removes what is left
                part.store.delete(_key(part))

    def take_back(self, part: Part) -> None:
        """Remove what was said here, by a call that failed: the corrected one may have other data."""
        if self._said.get(part.name):
            self.forget(part)


def _key(part: Part) -> str:
    return f"{part.name}/ids/data{PARTIAL}"  # zarr warns of what lies in a group and is none, not in an array


def _has_shards(part: Part) -> bool:
    # Of a bank that is gone on with, the first checkpoint says it; of one without shards, one listing has few objects.
    return bool(part.committed(0)) or any("/committed/c." in key for key in part.store.list(part.name))


def _hashes(part: Part, source: BatchSource) -> bytes:
    n, size = part.spec.n, part.spec.batch_size
    ends = sorted({-(-n // size) * place // _BATCHES for place in range(_BATCHES + 1)})  # in batches
    spans = [(first * size, min(n, (first + 1) * size)) for first, _ in pairwise(ends)]
    return b"".join(batch_hash(batch) for _, _, batch in source.load(spans))


def _read(part: Part) -> bytes | None:
    """What another call said; None if it has committed a shard meanwhile, or failed."""
    try:
        return part.store.get(_key(part))
    except FileNotFoundError:
        return None
