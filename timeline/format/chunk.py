"""WAL chunk: a run of WAL bytes as received, with its index, as one immutable object (SPEC.md, chapter 3).

Layout: magic ``TLCHUNK\\x01`` (8), header length (u32 LE), CRC-32 of the header (u32 LE), header (JSON, UTF-8), then the
frames (zstd with content checksum) back to back, then one zstd frame holding the index.
"""

from __future__ import annotations

from dataclasses import dataclass

from timeline.clock import Micros
from timeline.format.wal_index import Coverage, WalIndex
from timeline.lsn import Lsn


@dataclass(frozen=True, slots=True)
class ChunkHeader:
    """What the header says; enough to judge a chunk without its payload."""

    store_id: str
    branch: str
    system_identifier: int
    tli: int
    start: Lsn
    end: Lsn
    """Exclusive."""
    writer: str
    """Random id of the archiver run that made it."""
    epoch: int
    """Fencing epoch of that run (P4)."""
    created: Micros
    coverage: Coverage | None
    """Set when the source had no more WAL than this chunk's end at that time on its clock."""
    digest: str
    """BLAKE3 of the raw WAL bytes, hex."""
    digest_kind: str = "blake3"
    key_id: str | None = None
    """Reserved: id of the data key that keys the digest and cipher."""
    cipher: str | None = None
    """Reserved: payload cipher."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A decoded, verified chunk."""

    header: ChunkHeader
    wal: bytes
    """Raw WAL, ``end - start`` bytes."""
    index: WalIndex
