"""WAL made from nothing, for tests that must know exactly what is in it.

Written from the format's description and not from the code under test: src/include/access/xlogrecord.h,
xlog_internal.h, xact.h.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import google_crc32c

MAGIC = {14: 0xD10D, 15: 0xD110, 16: 0xD113, 17: 0xD116, 18: 0xD118}
PAGE = 8192


@dataclass(frozen=True)
class Block:
    """A block reference of a record."""

    spc: int = 1663
    db: int = 5
    rel: int = 16384
    block: int = 0
    fork: int = 0
    data: bytes = b""
    image: bytes | None = None
    hole: bool = False
    compressed: bool = False
    apply: bool = True
    init: bool = False


@dataclass(frozen=True)
class Built:
    """A record as it was laid down."""

    start: int
    end: int
    rmid: int
    info: int
    xid: int
    blocks: tuple[Block, ...]
    main: bytes


@dataclass
class WalBuilder:
    """Appends records page by page; ``wal`` begins at ``start``."""

    start: int
    segment_bytes: int = 1 << 20
    major: int = 15
    tli: int = 1
    system_identifier: int = 0x6123456789ABCDEF
    previous: int = 0
    wal: bytearray = field(default_factory=bytearray)
    records: list[Built] = field(default_factory=list)

    @property
    def lsn(self) -> int:
        """Just after the last byte."""
        return self.start + len(self.wal)

    def append(
        self,
        rmid: int,
        info: int,
        *,
        xid: int = 0,
        blocks: Sequence[Block] = (),
        main: bytes = b"",
        origin: int | None = None,
        top_xid: int | None = None,
        cut: bool = False,
    ) -> Built:
        """Add a record. ``cut``: lose all behind its first page, as crashes do; go on with the next page."""
        record = bytearray(24) + self._headers(blocks, origin, top_xid)
        if main:
            long = len(main) > 255
            record += b"\xfe" + struct.pack("<I", len(main)) if long else bytes((255, len(main)))
        for block in blocks:
            record += (block.image or b"") + block.data
        record += main
        struct.pack_into("<IIQBB", record, 0, len(record), xid, self.previous, info, rmid)
        crc = google_crc32c.extend(google_crc32c.value(bytes(record[24:])), bytes(record[:20]))
        struct.pack_into("<I", record, 20, crc)
        self._page_header(0)
        start = self.lsn
        written = 0
        while written < len(record):
            if written and self.lsn % PAGE == 0:
                if cut:
                    self._page_header(0, flags=0x08)
                    return Built(start, self.lsn, rmid, info, xid, tuple(blocks), main)
                self._page_header(len(record) - written)
            room = PAGE - self.lsn % PAGE
            self.wal += record[written : written + room]
            written += room
        self.wal += bytes(-self.lsn % 8)
        if rmid == 0 and info & 0xF0 == 0x40:
            self.wal += bytes(-self.lsn % self.segment_bytes)
        built = Built(start, self.lsn, rmid, info, xid, tuple(blocks), main)
        self.previous = start
        self.records.append(built)
        return built

    def fill_to(self, offset: int) -> None:
        """Pad with one record so that the next one starts at this offset (a multiple of 8) of some page."""
        for size in range(1, 20_000):
            trial = WalBuilder(
                self.lsn, self.segment_bytes, self.major, self.tli, self.system_identifier, self.previous
            )
            trial.append(21, 0, main=bytes(size))
            if trial.lsn % PAGE == offset:
                self.append(21, 0, main=bytes(size))
                return
        raise ValueError(f"no record leads to offset {offset}")

    def _headers(self, blocks: Sequence[Block], origin: int | None, top_xid: int | None) -> bytes:
        out = b""
        last: tuple[int, int, int] | None = None
        for number, block in enumerate(blocks):
            rel = (block.spc, block.db, block.rel)
            flags = block.fork
            flags |= 0x10 if block.image is not None else 0
            flags |= 0x20 if block.data else 0
            flags |= 0x40 if block.init else 0
            flags |= 0x80 if rel == last else 0
            out += struct.pack("<BBH", number, flags, len(block.data))
            if block.image is not None:
                if self.major == 14:
                    info = 0x02 * block.compressed | 0x04 * block.apply
                else:
                    info = 0x02 * block.apply | 0x08 * block.compressed
                out += struct.pack("<HHB", len(block.image), 24 if block.hole else 0, info | block.hole)
                if block.hole and block.compressed:
                    out += struct.pack("<H", 100)
            if rel != last:
                out += struct.pack("<III", *rel)
            out += struct.pack("<I", block.block)
            last = rel
        if origin is not None:
            out += b"\xfd" + struct.pack("<H", origin)
        if top_xid is not None:
            out += b"\xfc" + struct.pack("<I", top_xid)
        return out

    def _page_header(self, rest: int, flags: int = 0) -> None:
        if self.lsn % PAGE:
            return
        at_segment = self.lsn % self.segment_bytes == 0
        flags |= (0x01 if rest else 0) | (0x02 if at_segment else 0)
        header = struct.pack("<HHIQI4x", MAGIC[self.major], flags, self.tli, self.lsn, rest)
        if at_segment:
            header += struct.pack("<QII", self.system_identifier, self.segment_bytes, PAGE)
        self.wal += header


def commit(time: int, *, xinfo: int | None = None, tail: bytes = b"") -> bytes:
    """Main data of a commit or abort record; ``time`` of Postgres's epoch."""
    return struct.pack("<q", time) + (struct.pack("<I", xinfo) if xinfo is not None else b"") + tail
