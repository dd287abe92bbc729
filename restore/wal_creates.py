"""Find the tablespace creations in WAL by their bytes alone (EDGE 49).

A branch must never replay one with its path: on the source's own host that works in production's files. The
index of the WAL names them; this is the second, independent look, cheap enough to be taken always.

A record is found by the word of its header that holds info bits and resource manager, and believed when its
checksum holds. Sources: src/include/access/xlogrecord.h, src/include/commands/tablespace.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

from timeline.lsn import Lsn
from timeline.pg.errors import WalFormatError
from timeline.pg.wal_machine import PAGE_BYTES, page_header_bytes
from timeline.pg.wal_patch import read_record

_SCAN_BYTES = 1 << 20
_HEADER_BYTES = 24
_INFO_OFFSET = 16
_CREATE_WORD = 5 << 8
"""Little-endian word at _INFO_OFFSET of a Tablespace/CREATE: info 0x00 (low bits are flags), rmgr 5,
padding."""
_LONGEST_BYTES = _HEADER_BYTES + 5 + 4 + 1024
"""Header, long data header, oid, path of MAXPGPATH."""


def find_creates(wal: bytes | memoryview, start: Lsn, segment_bytes: int) -> Iterator[Lsn]:
    """Starts of the Tablespace/CREATE records that are complete in ``wal`` and still carry a path.

    ``start``: LSN of its first byte, a page start.
    """
    view = memoryview(wal)
    for offset in range(0, len(view) // PAGE_BYTES * PAGE_BYTES, _SCAN_BYTES):
        words = np.frombuffer(view[offset : offset + _SCAN_BYTES], "<u4")[::2]
        for index in np.flatnonzero((words & np.uint32(0xFFFFFFF0)) == _CREATE_WORD):
            at = _record_start(offset + 8 * int(index), start, segment_bytes)
            if at is not None and _is_create(view, start, at, segment_bytes):
                yield at


def _record_start(word_offset: int, start: Lsn, segment_bytes: int) -> Lsn | None:
    """Where the record begins whose info word that is: 16 bytes of WAL before it, page headers not
    counted."""
    word = start + word_offset
    into_page = word % PAGE_BYTES - page_header_bytes(word - word % PAGE_BYTES, segment_bytes)
    if into_page < 0:
        return None
    if into_page >= _INFO_OFFSET:
        return Lsn(word - _INFO_OFFSET)
    # The header began on the page before.
    begin = word - word % PAGE_BYTES - (_INFO_OFFSET - into_page)
    return Lsn(begin) if begin >= start else None


def _is_create(view: memoryview, start: Lsn, at: Lsn, segment_bytes: int) -> bool:
    if at < start or at + 4 > start + len(view):
        return False
    (length,) = struct.unpack_from("<I", view, at - start)
    if not _HEADER_BYTES + 2 + 4 + 1 < length <= _LONGEST_BYTES:
        return False
    try:
        return has_path(read_record(view, start, at, segment_bytes))
    except WalFormatError:
        # Not a record, or one cut off: a creation that goes on beyond is found with what follows.
        return False


def has_path(record: bytes) -> bool:
    """Whether the record of a creation names a directory."""
    body = _HEADER_BYTES + (2 if record[_HEADER_BYTES] == 255 else 5) + 4
    return record[body : body + 1] not in (b"", b"\0")
