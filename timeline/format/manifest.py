"""Parquet manifests: page manifests, file listings and WAL manifests (SPEC.md, chapter 5).

Every manifest is named by the BLAKE3 of its whole bytes. So that a reader may read a part and still verify it
(P5), the reference to a manifest carries the length and digest of its footer (the Parquet footer with its
trailing 8 bytes), and the footer's key-value metadata carries the byte range and digest of every row group.

Values only: what depends on Parquet is in page_manifest.py, file_listing.py and wal_manifest.py, so that the
log and the chunks can be read without importing pyarrow.
"""

from __future__ import annotations

from dataclasses import dataclass

from timeline.format.extent import ExtentRef
from timeline.format.wal_index import CommitArray, TouchArray, WalEvent
from timeline.lsn import Lsn

PAGE_ROWS_PER_GROUP = 8192


@dataclass(frozen=True, slots=True)
class ManifestRef:
    """Names one manifest and lets a part of it be verified."""

    digest: str
    """BLAKE3 of the object, hex; its key is ``manifests/<digest>.parquet``."""
    size: int
    """Bytes of the object."""
    rows: int
    footer_bytes: int
    """Length of the Parquet footer including its length word and the final ``PAR1``."""
    footer_digest: str
    """BLAKE3 of those bytes, hex."""
    lsn: Lsn | None = None
    """Page manifests in ``Snapshot.pages``: the LSN of the snapshot they were written for; one older than a
    file's ``born`` says nothing of that file. ``None``: belongs to every file (a full manifest)."""


@dataclass(frozen=True, slots=True)
class PageRow:
    """One extent of one file: a row of a page manifest, sorted by (path, group, first_block)."""

    path: str
    """Relative to the data directory, ``/``-separated, e.g. ``base/5/1259``."""
    group: int
    """Group number inside the file: byte offset / 131,072."""
    extent: ExtentRef


@dataclass(frozen=True, slots=True)
class FileRow:
    """One file, directory or symlink: a row of a file listing, sorted by (directory, name)."""

    path: str
    """Relative to the data directory; the root itself is not listed."""
    kind: str
    """``f`` file, ``d`` directory, ``l`` symlink."""
    size: int
    """Bytes (0 for directories and symlinks)."""
    mode: int
    """Permission bits."""
    content: bytes | None
    """The whole content of a small file (at most 1 KiB, and global/pg_control); then no extents exist
    for it."""
    target: str | None
    """Symlinks: as on the source (tablespaces: an absolute path of the *source*, never to be followed)."""
    born: Lsn
    """Extents of snapshots older than this do not belong to the file (relfilenode reuse, truncation)."""


@dataclass(frozen=True, slots=True)
class WalFrame:
    """One run of sealed WAL inside a pack: a row of a WAL manifest, sorted by (tli, start)."""

    tli: int
    start: Lsn
    end: Lsn
    pack: str
    offset: int
    stored_bytes: int
    digest: bytes
    """BLAKE3 of the raw WAL bytes."""
    last_record: Lsn
    last_record_end: Lsn
    pending: Lsn
    records: int
    commits: CommitArray
    events: tuple[WalEvent, ...]
    touches: TouchArray
