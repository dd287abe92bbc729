"""Changes to a private copy of WAL, before a branch replays it.

A Tablespace/CREATE record carries the absolute path of the source's directory; replayed as it is on the
source's host, the branch would work in production's files (EDGE 49). With the path blanked, recovery makes a
directory inside the branch instead (``create_tablespace_directories`` in src/backend/commands/tablespace.c:
an empty location is an in-place tablespace). Everything here refuses rather than guesses: no byte changes
unless the record at the place named is what it should be and its checksum holds.

Buffers hold WAL as on disk, page headers included, from ``start`` on, which need not be aligned.
Sources: src/include/access/xlogrecord.h, xlog_internal.h; src/include/commands/tablespace.h; xlogreader.c.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import google_crc32c

from timeline.lsn import Lsn
from timeline.pg.errors import WalFormatError
from timeline.pg.wal import RecordKind, WalScanner
from timeline.pg.wal_machine import (
    ANY_TLI,
    MAGIC_OF_MAJOR,
    MAX_RECORD_BYTES,
    PAGE_BYTES,
    RECORD_HEADER_BYTES,
    Buffer,
    as_bytes_array,
    page_header_bytes,
)

_HEADER = struct.Struct("<IIQBB2x")
_CRC_OFFSET = 20
RM_XLOG = 0
_RM_TABLESPACE = 5
_XLOG_NOOP = 0x20
_TABLESPACE_CREATE = 0x00
_IS_CONTINUATION = 0x0001
_IS_LONG = 0x0002
_SCAN_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Patch:
    """Bytes to put at a place in the WAL."""

    at: Lsn
    data: bytes


@dataclass(frozen=True, slots=True)
class ForgedRecord:
    """A record to append where the WAL ends."""

    start: Lsn
    """Where the record starts: behind ``patch.at`` when a page header must come first."""
    end: Lsn
    """Just after it."""
    patch: Patch
    """The record with the page headers it needs; may run into the next segment."""


def read_record(wal: Buffer, start: Lsn, at: Lsn, segment_bytes: int) -> bytes:
    """The record at LSN ``at``, put together without page headers and with a checksum that holds.

    ``at`` may also be a page start; the record then begins after the page's header. Raises WalFormatError
    when the record is not wholly in ``wal``, spans pages that do not continue it, or is not intact.
    """
    length = int.from_bytes(_read(wal, start, at, 4, segment_bytes), "little")
    if not RECORD_HEADER_BYTES <= length <= MAX_RECORD_BYTES:
        raise WalFormatError(at, f"record length {length}, expected 24 bytes to 1 GiB")
    record = _read(wal, start, at, length, segment_bytes)
    if _checksum(record) != int.from_bytes(record[_CRC_OFFSET:RECORD_HEADER_BYTES], "little"):
        raise WalFormatError(at, "record whose checksum does not match its contents")
    return record


def previous_record(wal: Buffer, start: Lsn, at: Lsn) -> Lsn:
    """Where the record before the one at ``at`` starts, as that one says (``xl_prev``).

    Only the record's header is read, and its checksum is not. Raises WalFormatError when it is not in
    ``wal``.
    """
    header = _read(wal, start, at, RECORD_HEADER_BYTES, None)
    previous = Lsn(_HEADER.unpack_from(header)[2])
    if previous >= at:
        raise WalFormatError(at, f"record follows one at {previous}, expected an earlier one")
    return previous


def find_tablespace_creates(
    wal: Buffer, start: Lsn, segment_bytes: int, *, major: int | None = None
) -> tuple[Lsn, ...]:
    """Where the complete Tablespace/CREATE records of ``wal`` start, from reading every record in it.

    Owes nothing to any index. ``start``: a record boundary or a page start; a record that began before is not
    seen, nor one that is cut off at the end: give all the WAL that is replayed, in one piece. ``major`` as
    for WalScanner. Raises WalFormatError when anything in ``wal`` cannot be read: then nothing is known about
    the rest of it.
    """
    scanner = WalScanner(segment_bytes, ANY_TLI, start, major=major)
    view = as_bytes_array(wal)
    found: list[Lsn] = []
    for begin in range(0, len(view), _SCAN_BYTES):
        result = scanner.feed(view[begin : begin + _SCAN_BYTES].data)
        found += [event.start for event in result.events if event.kind is RecordKind.TABLESPACE_CREATE]
    return tuple(found)


def tablespace_patches(
    wal: Buffer, start: Lsn, segment_bytes: int, creates: Iterable[int]
) -> tuple[Patch, ...]:
    """What blanks the paths of the Tablespace/CREATE records at ``creates``; none where one is empty already.

    Patches never cover a page header, so each lies within one page. Raises WalFormatError for a position that
    is not an intact Tablespace/CREATE record wholly in ``wal``.
    """
    patches: list[Patch] = []
    for at in map(Lsn, creates):
        record = bytearray(read_record(wal, start, at, segment_bytes))
        _, _, _, info, rmid = _HEADER.unpack_from(record)
        if rmid != _RM_TABLESPACE or info & 0xF0 != _TABLESPACE_CREATE:
            raise WalFormatError(at, f"record of resource manager {rmid}, expected Tablespace/CREATE")
        path = _main_data_offset(record, at) + 4
        if len(record) <= path or record[-1] != 0:
            raise WalFormatError(at, "Tablespace/CREATE record without a terminated path")
        if record[path] == 0:
            continue
        record[path:] = bytes(len(record) - path)
        record[_CRC_OFFSET:RECORD_HEADER_BYTES] = _checksum(record).to_bytes(4, "little")
        patches += record_patches(at, record, segment_bytes)
    return tuple(patches)


def record_patches(at: Lsn, data: bytes | bytearray, segment_bytes: int) -> tuple[Patch, ...]:
    """What puts the bytes of a record, from its start on, at LSN ``at``: page by page, never on a header."""
    patches: list[Patch] = []
    offset = 0
    for lsn, length in _runs(at, len(data), segment_bytes):
        patches.append(Patch(Lsn(lsn), bytes(data[offset : offset + length])))
        offset += length
    return tuple(patches)


def record_end(at: Lsn, length: int, segment_bytes: int) -> Lsn:
    """Just after the last byte of the record of that total length at ``at``; padding not counted."""
    *_, (lsn, last) = _runs(at, length, segment_bytes)
    return Lsn(lsn + last)


def format_record(rmid: int, info: int, *, previous: Lsn, parts: bytes = b"") -> bytes:
    """A record of no transaction: header, then ``parts``, which are block and data headers and their data."""
    header = _HEADER.pack(RECORD_HEADER_BYTES + len(parts), 0, previous, info, rmid)
    record = header + bytes(4) + parts
    return header + _checksum(record).to_bytes(4, "little") + parts


def relink_record(record: bytes, previous: Lsn) -> bytes:
    """The same record as the successor of the one at ``previous``."""
    length, xid, _, info, rmid = _HEADER.unpack_from(record)
    linked = _HEADER.pack(length, xid, previous, info, rmid) + record[_CRC_OFFSET:]
    return linked[:_CRC_OFFSET] + _checksum(linked).to_bytes(4, "little") + linked[RECORD_HEADER_BYTES:]


def apply_patches(wal: bytearray | memoryview, start: Lsn, patches: Sequence[Patch]) -> None:
    """Put what of the patches falls into ``wal`` there: a buffer may be one segment of several."""
    end = start + len(wal)
    for patch in patches:
        first, last = max(patch.at, start), min(patch.at + len(patch.data), end)
        if first < last:
            wal[first - start : last - start] = patch.data[first - patch.at : last - patch.at]


def blank_tablespace_creates(
    wal: bytearray | memoryview, start: Lsn, segment_bytes: int, creates: Iterable[int]
) -> None:
    """Blank the paths of the records at ``creates``, all or none; failures as ``tablespace_patches``."""
    apply_patches(wal, start, tablespace_patches(wal, start, segment_bytes, creates))


def noop_record(
    at: Lsn, *, previous: Lsn, tli: int, major: int, system_identifier: int, segment_bytes: int
) -> ForgedRecord:
    """An XLOG_NOOP to follow the last record of some WAL: a recovery target needs a record to reach it.

    ``at``: the end of that record as the scanner reports it (after XLOG_SWITCH: the end of its segment);
    ``previous``: its start; the rest names the cluster, for page headers. Replay of a NOOP changes nothing
    (EDGE 58).
    """
    if at % 8 or previous >= at:
        raise WalFormatError(at, "expected the end of a record, and one before it")
    out = bytearray()
    lsn = int(at)
    record = format_record(RM_XLOG, _XLOG_NOOP, previous=previous)
    start = None
    written = 0
    while written < len(record):
        if lsn % PAGE_BYTES == 0:
            page = page_header(
                lsn, len(record) - written if written else 0, tli, major, system_identifier, segment_bytes
            )
            out += page
            lsn += len(page)
        start = lsn if start is None else start
        length = min(len(record) - written, PAGE_BYTES - lsn % PAGE_BYTES)
        out += record[written : written + length]
        written += length
        lsn += length
    return ForgedRecord(Lsn(start or lsn), Lsn(lsn), Patch(at, bytes(out)))


def page_header(
    page: int, rest: int, tli: int, major: int, system_identifier: int, segment_bytes: int
) -> bytes:
    """The header of a page; ``rest``: bytes of an earlier record that it begins with."""
    at_segment = page % segment_bytes == 0
    flags = (_IS_CONTINUATION if rest else 0) | (_IS_LONG if at_segment else 0)
    header = struct.pack("<HHIQI4x", MAGIC_OF_MAJOR[major], flags, tli, page, rest)
    return (
        header + struct.pack("<QII", system_identifier, segment_bytes, PAGE_BYTES) if at_segment else header
    )


def _checksum(record: bytes | bytearray) -> int:
    """CRC-32C as XLogInsert computes it: the body first, then the header up to the checksum itself."""
    body = google_crc32c.value(bytes(record[RECORD_HEADER_BYTES:]))
    return int(google_crc32c.extend(body, bytes(record[:_CRC_OFFSET])))


def _main_data_offset(record: bytearray, at: Lsn) -> int:
    """Where the main data of a record without block references begins."""
    offset = RECORD_HEADER_BYTES
    while offset < len(record):
        ident = record[offset]
        if ident == 255:
            data, length = offset + 2, record[offset + 1]
        elif ident == 254:
            data, length = offset + 5, int.from_bytes(record[offset + 1 : offset + 5], "little")
        elif ident in (252, 253):
            offset += 5 if ident == 252 else 3
            continue
        else:
            raise WalFormatError(at, f"Tablespace record with a part of id {ident}")
        if data + length != len(record):
            raise WalFormatError(at, f"main data of {length} bytes in a record of {len(record)}")
        return data
    raise WalFormatError(at, "Tablespace record without main data")


def _runs(at: int, count: int, segment_bytes: int) -> Iterator[tuple[int, int]]:
    """Where ``count`` payload bytes from ``at`` on lie, page by page."""
    lsn = at
    while count > 0:
        if lsn % PAGE_BYTES == 0:
            lsn += page_header_bytes(lsn, segment_bytes)
        length = min(count, PAGE_BYTES - lsn % PAGE_BYTES)
        yield lsn, length
        lsn += length
        count -= length


def _read(wal: Buffer, start: Lsn, at: Lsn, count: int, segment_bytes: int | None) -> bytes:
    """``count`` payload bytes of the record at ``at``; every page crossed must continue a record.

    Without ``segment_bytes`` a page's own flag tells the size of its header.
    """
    if at % 8 or at < start or 0 < at % PAGE_BYTES < 24:
        raise WalFormatError(at, f"expected the place of a record, at or after {start}")
    out = bytearray()
    lsn = int(at)
    while len(out) < count:
        if lsn % PAGE_BYTES == 0:
            (flags,) = struct.unpack("<H", _slice(wal, start, lsn + 2, 2, at))
            (address,) = struct.unpack("<Q", _slice(wal, start, lsn + 8, 8, at))
            size = 40 if flags & _IS_LONG else 24
            if address != lsn or (
                segment_bytes is not None and size != page_header_bytes(lsn, segment_bytes)
            ):
                raise WalFormatError(lsn, "expected the header of this page")
            if out and not flags & _IS_CONTINUATION:
                raise WalFormatError(lsn, f"expected a page that continues the record at {at}")
            if not out and flags & _IS_CONTINUATION:
                raise WalFormatError(lsn, "expected a page that begins with a record of its own")
            lsn += size
        length = min(count - len(out), PAGE_BYTES - lsn % PAGE_BYTES)
        out += _slice(wal, start, lsn, length, at)
        lsn += length
    return bytes(out)


def _slice(wal: Buffer, start: Lsn, lsn: int, count: int, record: Lsn) -> bytes:
    offset = lsn - start
    if offset + count > len(wal):
        raise WalFormatError(
            record, f"record ends beyond the WAL at hand, which ends at {Lsn(start + len(wal))}"
        )
    return bytes(wal[offset : offset + count])
