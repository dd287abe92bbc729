"""Marks: what one marking run of garbage collection found to be garbage (SPEC.md, chapter 9).

A sealed JSON object, written before the log entry that names it. Whoever collects the mark deletes what it lists,
but for what the log or a pin names since; the mark itself goes last.
"""

from __future__ import annotations

from dataclasses import dataclass

from timeline.clock import Micros
from timeline.errors import DamagedStore
from timeline.format import keys
from timeline.format.sealed_value import decode_value, encode_value
from timeline.lsn import Lsn

MARK_ID_BYTES = 16
"""``Clock.token(MARK_ID_BYTES)`` makes the id of a mark: 32 hex digits."""
MARK_KEYS = 50_000
"""A mark lists at most so many keys: 6 MB; what is left is for the next one."""


@dataclass(frozen=True, slots=True)
class Garbage:
    """One object that may go."""

    key: str
    size: int
    """Bytes."""


@dataclass(frozen=True, slots=True)
class VoidChunks:
    """All chunks of a tli that start below an LSN; void once and for all, so they need no list."""

    tli: int
    below: Lsn
    objects: int
    """How many there were."""
    bytes: int


@dataclass(frozen=True, slots=True)
class VoidEntries:
    """All log entries below a number, which nobody reads any more."""

    below: int
    objects: int
    bytes: int


@dataclass(frozen=True, slots=True)
class MarkObject:
    """What is garbage in the state of one log entry."""

    id: str
    branch: str
    head: int
    """Number of that entry."""
    at: Micros
    garbage: tuple[Garbage, ...]
    """Packs, manifests, pins and marks."""
    chunks: tuple[VoidChunks, ...]
    entries: VoidEntries


def encode_mark(mark: MarkObject) -> bytes:
    """The object; raises ValueError for more than MARK_KEYS keys."""
    if len(mark.garbage) > MARK_KEYS:
        raise ValueError(f"a mark cannot list {len(mark.garbage)} keys")
    return encode_value(mark)


def decode_mark(data: bytes, key: str) -> MarkObject:
    """The verified mark, which must be the one its key names; raises DamagedStore, UnknownFeature."""
    mark = decode_value(MarkObject, "mark", data, key)
    if keys.parse_mark(key) != mark.id:
        raise DamagedStore(key, 0, f"expected this key's mark, found {mark.id}")
    return mark
