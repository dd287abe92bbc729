"""The record boundary that stands for any LSN: what holds the records that start before L ends where the
last of them ends (P6). Pure.

Sources: src/include/access/xlog_internal.h (page headers), src/include/access/xlogrecord.h (record lengths).
"""

from __future__ import annotations

from dataclasses import dataclass

from timeline.lsn import Lsn
from timeline.pg.record_walk import walk
from timeline.pg.wal import RecordKind, WalScanner
from timeline.pg.wal_machine import PAGE_BYTES, page_header_bytes

_LENGTH_LEFT = slice(16, 20)
"""xlp_rem_len in a page header."""


@dataclass(frozen=True, slots=True)
class Boundary:
    """A moment between two records."""

    lsn: Lsn
    last_record: Lsn
    """Start of the last complete record before it; 0 when none is known."""


def find_boundary(
    wal: bytes | memoryview, start: Lsn, at: Lsn, *, segment_bytes: int, tli: int, major: int
) -> Boundary | None:
    """The first boundary at or after ``at``; ``None`` when the record that ``at`` falls into ends beyond
    ``wal``.

    ``start``: of ``wal``, itself a record boundary or a page start, not after ``at``; the WAL must reach
    ``at``. A record that a crash left unfinished, and that the server overwrote, is none. Raises
    WalFormatError.
    """
    view = memoryview(wal)
    walked = walk(view, start, at, segment_bytes=segment_bytes, major=major)
    if walked is not None:
        return Boundary(walked.end, walked.begun if walked.begun < at else walked.last_record)
    scanner = WalScanner(segment_bytes, tli, start, major=major)
    last = scanner.feed(view[: at - start]).last_record
    begun = scanner.pending
    if begun >= at or begun % PAGE_BYTES == 0:
        # Nothing is unfinished at ``at``; it may lie inside a page header, where no record starts.
        return Boundary(at, last)
    fed = at - start
    while fed < len(view):
        page_end = start + fed + PAGE_BYTES - (start + fed) % PAGE_BYTES
        upto = min(page_end - start, len(view))
        result = scanner.feed(view[fed:upto])
        fed = upto
        if any(event.kind is RecordKind.OVERWRITE_CONTRECORD for event in result.events):
            return Boundary(at, last)
        if result.records == 1:
            return Boundary(result.last_record_end, begun)
        if result.records:
            return Boundary(
                _end_in_page(view, start, begun, Lsn(page_end - PAGE_BYTES), segment_bytes), begun
            )
        if scanner.pending != begun:
            return Boundary(at, last)
    return None


def _end_in_page(view: memoryview, start: Lsn, begun: Lsn, page: Lsn, segment_bytes: int) -> Lsn:
    """Where the record that began at ``begun``, and ends in ``page`` with others after it, does end."""
    if begun > page:
        length = int.from_bytes(view[begun - start : begun - start + 4], "little")
        return Lsn(begun + _aligned(length))
    header_bytes = page_header_bytes(page, segment_bytes)
    header = view[page - start : page - start + header_bytes]
    return Lsn(page + header_bytes + _aligned(int.from_bytes(header[_LENGTH_LEFT], "little")))


def _aligned(length: int) -> int:
    return (length + 7) & ~7
