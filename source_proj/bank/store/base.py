"""What a bank asks of the place it lies in. `tests/bank/store_contract.py` holds every store to it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

__all__ = ["ObjectInfo", "Store"]


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
            The keys that were taken; their objects stay as they are.

        Raises:
            OSError: as :meth:`put`.
        """

    @abstractmethod
    def list(self, prefix: str = "") -> Sequence[str]:
        """Keys of all objects below a key, ``prefix + "/…"``, or of all, in order.

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
    def exclusive(self, key: str) -> AbstractContextManager[bool]:
        """Keep other writers out who ask with the same key, an object that is there, until the block ends.

        A writer that dies lets the others in. Yields False where the place cannot do it: then only what
        :meth:`put_if_absent` wrote is safe from a writer that was stopped for long and goes on.

        Raises:
            BankError: another writer does not come to an end.
        """

    @abstractmethod
    def location(self, key: str = "") -> str:
        """Say where an object is, for people."""

    def exists(self, key: str) -> bool:
        """Whether there is an object of this key."""
        return self.stat(key) is not None

    def leftovers(self, prefix: str = "") -> Sequence[str]:  # noqa: ARG002
        """Keys below a key of what killed writers left: :meth:`list` does not show it, :meth:`delete` removes it."""
        return []
