"""What a bank asks of the place it lies in. `tests/bank/store_contract.py` holds every store to it."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from source_proj._io.files import PARTIAL

__all__ = ["ObjectInfo", "Store", "checked_key"]


def checked_key(key: str) -> str:
    """Return a key as given.

    Raises:
        ValueError: it is none, or leads elsewhere.
    """
    if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in key.split("/")):
        raise ValueError(f"{key!r} is no key: it must be names joined by '/'")
    return key


class ObjectInfo(NamedTuple):
    """What a store knows of an object without reading it.

    Attributes:
        size: its bytes.
        version: another one whenever the object was written or exchanged.
    """

    size: int
    version: str


class Store(ABC):
    """Objects of bytes under keys: names of one or more parts, joined by "/".

    No reader ever sees a part of an object: it is there whole, or not. Errors of the place itself are `OSError`s; what
    must not be in a bank at all, such as a link to elsewhere, is a `BankError`.
    """

    @abstractmethod
    def get(self, key: str) -> bytes:
        """Return an object.

        Raises:
            FileNotFoundError: there is none.
            OSError: it cannot be read.
        """

    @abstractmethod
    def put(self, contents: Mapping[str, bytes]) -> None:
        """Write objects, in place of what has their keys, and return when they will outlive a power failure.

        Raises:
            OSError: one cannot be written; each of the others is there or not.
        """

    @abstractmethod
    def put_if_absent(self, contents: Mapping[str, bytes]) -> set[str]:
        """Write the objects whose keys are free. Of several writers in one instant, one is first.

        Returns:
            The keys that were taken; their objects stay as they are. One whose object has just these bytes may be left
            out: an answer to who wrote it can have been lost.

        Raises:
            OSError: as :meth:`put`.
        """

    @abstractmethod
    def copy(self, sources: Mapping[str, str]) -> None:
        """Give each key the object of its source, whole, in place of what has it.

        Raises:
            FileNotFoundError: a source is not there.
            OSError: as :meth:`put`.
        """

    @abstractmethod
    def keys(self, prefix: str = "") -> Iterable[str]:
        """Keys of all objects below a key, ``prefix + "/…"``, or of all; temporary ones too.

        Raises:
            OSError: they cannot be listed.
            BankError: something is in the place of an object that cannot be one, such as a link.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object, if it is there.

        Raises:
            OSError: it cannot be removed.
        """

    @abstractmethod
    def stat(self, key: str) -> ObjectInfo | None:
        """Size and version of an object; None where there is none.

        Raises:
            OSError: it cannot be told.
        """

    @abstractmethod
    def location(self, key: str = "") -> str:
        """Say where an object is, for people."""

    @property
    def folder(self) -> Path | None:
        """The store's folder; None where it is no folder of this machine."""
        return None

    def above(self) -> Iterable["Store"]:
        """The places that this one lies within, the innermost first."""
        return ()

    def exists(self, key: str) -> bool:
        """Whether there is an object of this key."""
        return self.stat(key) is not None

    def list(self, prefix: str = "") -> Sequence[str]:
        """Keys below a key, in order, but not the temporary ones, which end in `PARTIAL`; raises as :meth:`keys`."""
        return sorted(key for key in self.keys(prefix) if not key.endswith(PARTIAL))

    def sweep(self, prefix: str) -> None:  # noqa: B027 (most stores have no folders)
        """Remove what is no object below a key: folders that writers left empty, killed or still at work."""

    def leftovers(self, prefix: str = "") -> Sequence[str]:
        """The temporary ones: writers at work have them, or killed ones left them; raises as :meth:`keys`."""
        return sorted(key for key in self.keys(prefix) if key.endswith(PARTIAL))
