"""From record to record over a short stretch of ordinary WAL, in Python. Pure.

What `tl branch --at LSN` needs to know of WAL is where the record ends that the LSN falls into, some records away
from a commit whose place the index has. The scanner (wal.py) knows all of WAL, and takes longer to load than this
takes to get there. So what is ordinary is walked here, and of anything else nothing is said: the scanner is asked.

Sources: src/include/access/xlogrecord.h, src/include/access/xlog_internal.h.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from timeline.lsn import Lsn
from timeline.pg.wal_machine import (
    MAGIC_OF_MAJOR,
    MAX_RECORD_BYTES,
    PAGE_BYTES,
    RECORD_HEADER_BYTES,
    page_header_bytes,
)

WALK_BYTES = 1 << 20
"""So much is walked at most: a tenth of a second where records are small, a fraction of what loading the scanner takes."""
_PAGE = struct.Struct("<HHIQI")
"""xlp_magic, xlp_info, xlp_tli, xlp_pageaddr, xlp_rem_len."""
_RECORD = struct.Struct("<IIQBB")
"""xl_tot_len, xl_xid, xl_prev, xl_info, xl_rmid."""
_CONTINUES = 0x0001
_OVERWRITES = 0x0008
_RM_XLOG, _SWITCH = 0, 0x40
_BUILT_IN, _CUSTOM = 21, 128
"""The last resource manager of Postgres's own (src/include/access/rmgrlist.h), the first of extensions."""


@dataclass(frozen=True, slots=True)
class Walked:
    """Where a walk came to."""

    last_record: Lsn
    """Start of the last record that ends at or before the moment asked for; 0: none was met."""
    begun: Lsn
    """Start of the record that the moment falls into; the moment itself when it falls into none."""
    end: Lsn
    """End of that record; the moment itself when it falls into none."""


class _Unusual(Exception):
    """WAL that a walk does not understand."""


def walk(wal: memoryview, start: Lsn, at: Lsn, *, segment_bytes: int, major: int) -> Walked | None:
    """The record around ``at``; ``None``: something is out of the ordinary, or ends beyond ``wal``.

    ``start``: of ``wal``, a record boundary or a page start, not after ``at``.
    """
    if at - start > WALK_BYTES:
        return None
    try:
        return _Walk(wal, start, segment_bytes, MAGIC_OF_MAJOR.get(major)).to(at)
    except _Unusual:
        return None


class _Walk:
    def __init__(self, wal: memoryview, start: Lsn, segment_bytes: int, magic: int | None) -> None:
        self._magic = magic
        self._wal = wal
        self._start = start
        self._segment_bytes = segment_bytes

    def to(self, at: Lsn) -> Walked:
        last, position = 0, int(self._start)
        while position < at:
            if position % PAGE_BYTES == 0:
                body = self._page(position, 0)
                if at <= body:
                    # Inside a page header, where no record starts.
                    break
                position = body
            begun = position
            stop, header = self._record(begun)
            end = (stop + 7) & ~7
            if stop < at < end:
                # In the padding behind it.
                raise _Unusual
            _, _, previous, info, manager = _RECORD.unpack_from(header)
            if previous >= begun or (last and previous != last) or _BUILT_IN < manager < _CUSTOM:
                raise _Unusual
            if manager == _RM_XLOG and info & 0xF0 == _SWITCH:
                raise _Unusual
            if end > at:
                return Walked(Lsn(last), Lsn(begun), Lsn(end))
            last, position = begun, end
        return Walked(Lsn(last), at, at)

    def _page(self, page: int, left: int) -> int:
        """Where the contents of the page begin; ``left``: of a record that it must continue."""
        magic, flags, _, address, remaining = _PAGE.unpack(self._bytes(page, _PAGE.size))
        if (
            magic != self._magic
            or address != page
            or flags & _OVERWRITES
            or bool(flags & _CONTINUES) != bool(left)
            or remaining != left
        ):
            raise _Unusual
        return page + page_header_bytes(page, self._segment_bytes)

    def _record(self, begun: int) -> tuple[int, bytes]:
        """Where a record ends, without padding, and its header."""
        length = int.from_bytes(self._bytes(begun, 4), "little")
        if not RECORD_HEADER_BYTES <= length <= MAX_RECORD_BYTES:
            raise _Unusual
        header, position, left = bytearray(), begun, length
        while True:
            room = min(left, PAGE_BYTES - position % PAGE_BYTES)
            wanted = min(room, RECORD_HEADER_BYTES - len(header))
            header += self._bytes(position, wanted)
            position, left = position + room, left - room
            if not left:
                break
            position = self._page(position, left)
        # Its last byte of padding is there, so the record is.
        self._bytes(((position + 7) & ~7) - 1, 1)
        return position, bytes(header)

    def _bytes(self, position: int, count: int) -> bytes:
        at = position - self._start
        found = bytes(self._wal[at : at + count])
        if len(found) != count:
            raise _Unusual
        return found
