"""The store Protocol: four verbs over immutable objects.

Promises every implementation keeps (one conformance suite runs on all of them):

- ``create`` is atomic and durable: when it returns, the whole object is there or another one was there first
  (P2). Of any number of concurrent creates of one key with different bytes exactly one returns ``True``. An
  ambiguous outcome (time-out, reset, 409, 5xx) is resolved inside by reading back and comparing; it never
  surfaces as a guess: when even that fails the call raises ``Unavailable``, and the outcome is *unknown*.
- ``get`` returns exactly the bytes asked for, or raises; it never returns fewer.
- ``list`` is strongly consistent and in ascending byte order of the keys. With a ``limit`` over a prefix that
  has directories below, *which* keys come is the server's choice (SeaweedFS walks ``a/`` before ``a-b``).
- Only garbage collection calls ``delete``.
- Failures that may pass raise ``Unavailable``; retries are bounded (``retry.py``).

Keys are ``/``-separated ASCII segments of ``[A-Za-z0-9._-]``, relative to the store's prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class Listed:
    """One key of a listing."""

    key: str
    size: int
    """Bytes of the object."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A key that the store will not delete, for a reason that trying again does not cure."""

    key: str
    reason: str
    """In the server's words: a policy, a lock."""


class Store(Protocol):
    """An object store, or a directory that behaves like one."""

    @property
    def url(self) -> str:
        """The URL that opens this store again, without secrets: ``file:///path`` or ``s3://bucket/prefix``."""
        ...

    async def create(self, key: str, data: bytes | memoryview) -> bool:
        """Create the object durably. ``True``: it is mine (also when a lost answer was found to be mine by
        reading back: the stored bytes equal ``data``). ``False``: other bytes hold the key.

        Equal bytes already there count as created: creating content-named objects twice is harmless.
        """
        ...

    async def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """``length`` bytes from ``start`` (to the end when ``None``). ``start`` may be negative: the last
        ``-start`` bytes, fewer if the object is smaller (then ``length`` must be ``None``).

        Raises NotFound; raises DamagedStore when the object is shorter than the range asked for.
        """
        ...

    async def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[Listed]:
        """Keys with ``prefix``, greater than ``after`` when given, at most ``limit``."""
        ...

    async def delete(self, keys: Sequence[str]) -> Sequence[Refused]:
        """Remove the objects; keys that do not exist are no error.

        What the store refuses to remove (object lock, a policy) is told, and the others are removed all the same.
        Raises UsageError where nothing may be deleted at all.
        """
        ...

    async def aclose(self) -> None:
        """Release connections. The store cannot be used afterwards."""
        ...


@runtime_checkable
class NearStore(Protocol):
    """What a store on this host can do besides."""

    def get_now(self, key: str, start: int, length: int) -> bytes | None:
        """``length`` bytes from ``start`` if the kernel has them in memory, else ``None``; never waits.

        Raises NotFound and DamagedStore as ``get`` does.
        """
        ...
