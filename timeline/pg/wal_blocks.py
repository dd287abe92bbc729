"""Which blocks a replay will want from the base, in the order in which it will want them.

A branch that waits has no time to load compiled kernels (numba takes half a second): all records are looked at together, with
numpy. Records are found by their ``xl_prev``: eight aligned bytes that name the start of the record before. What is looked
for is a help to whoever prefetches, and broken WAL is left to those who replay it: what does not fit is left out.

Sources: src/include/access/xlogrecord.h, xlog_internal.h; src/backend/access/transam/xloginsert.c.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from timeline.lsn import Lsn
from timeline.pg.errors import WalFormatError
from timeline.pg.segment import check_segment_bytes
from timeline.pg.wal_machine import (
    LONG_HEADER_BYTES,
    MAGIC_OF_MAJOR,
    MAX_RECORD_BYTES,
    PAGE_BYTES,
    RECORD_HEADER_BYTES,
    SHORT_HEADER_BYTES,
    Buffer,
    as_bytes_array,
    page_header_bytes,
)

FIRST_TOUCH_DTYPE = np.dtype(
    [
        ("spc", "<u4"),
        ("db", "<u4"),
        ("rel", "<u4"),
        ("fork", "u1"),
        ("has_image_or_init", "?"),
        ("block", "<u4"),
    ]
)
"""The first reference to a block: tablespace, database, relfilenode, fork number (0 main, 1 free space, 2
visibility, 3 init), whether that record restores a full-page image or initialises the page (then replay does
not read it), and block number."""

FirstTouchArray = npt.NDArray[np.void]
Bytes = npt.NDArray[np.uint8]
Places = npt.NDArray[np.int64]

_ANCESTORS = 4
"""Records in a row that have to fit before the next one counts."""
_CONTINUED = 0x01
_SWITCH_INFO = 0x40
_HAS_IMAGE, _WILL_INIT, _SAME_RELATION = 0x10, 0x40, 0x80
_LAST_BLOCK_ID = 32


@dataclass(frozen=True, slots=True)
class _Stream:
    """The WAL's bytes without page headers: there records lie one behind the other."""

    body: Bytes
    page_lsns: Places
    """LSN of the first byte of every page's part of the body, ascending …"""
    page_places: Places
    """… and where that part begins."""
    first: int
    """Where the first record begins that the data holds from its beginning."""
    major: int | None

    @property
    def end(self) -> int:
        """How long the body is."""
        return len(self.body)

    def lsns(self, places: Places) -> Places:
        """The LSNs of places in the body."""
        page = np.searchsorted(self.page_places, places, "right") - 1
        return self.page_lsns[page] + places - self.page_places[page]

    def places(self, lsns: Places) -> Places:
        """Where in the body LSNs are; -1 for those that are before it."""
        page = np.searchsorted(self.page_lsns, lsns, "right") - 1
        found = self.page_places[page] + lsns - self.page_lsns[page]
        return np.where(page < 0, -1, found)


def first_touches(
    data: Buffer, start: Lsn, segment_bytes: int, *, major: int | None = None
) -> FirstTouchArray:
    """FIRST_TOUCH_DTYPE rows in WAL order, one for each block that the records complete in ``data`` refer to.

    ``start``: a record boundary or a page start; ``major``: of the server that wrote it, else told by the first page header.
    Memory: twice the data, and about 100 bytes a reference. Raises WalFormatError when ``start`` is neither.
    """
    stream = _stream(as_bytes_array(data), start, segment_bytes, major)
    rows = _references(stream, *_records(stream, segment_bytes))
    # Relations are few: their number and the block's make one key.
    spc, db, rel, block = (rows[name].astype(np.uint64) for name in ("spc", "db", "rel", "block"))
    _, database = np.unique(spc << 32 | db, return_inverse=True)
    _, relation = np.unique(database.astype(np.uint64) << 36 | rel << 4 | rows["fork"], return_inverse=True)
    _, firsts = np.unique(relation.astype(np.uint64) << 32 | block, return_index=True)
    first_rows: FirstTouchArray = rows[np.sort(firsts)]
    return first_rows


def _stream(data: Bytes, start: int, segment_bytes: int, major: int | None) -> _Stream:
    check_segment_bytes(segment_bytes)
    offset = start % PAGE_BYTES
    first_page = start - offset
    if start % 8 or 0 < offset < page_header_bytes(first_page, segment_bytes):
        raise WalFormatError(start, "expected the start of a record or of a page")
    pages = np.arange(first_page, start + len(data), PAGE_BYTES, dtype=np.int64)
    headers = np.where(pages % segment_bytes == 0, LONG_HEADER_BYTES, SHORT_HEADER_BYTES)
    begins = pages + headers
    if offset:
        begins[:1] = start
    ends = np.minimum(pages + PAGE_BYTES, start + len(data))
    lengths = np.maximum(ends - begins, 0)
    places = np.cumsum(lengths) - lengths
    body = np.empty(int(lengths.sum()), np.uint8)
    # Runs of pages that are there in full, with headers of one length, are copied at once.
    kind = np.where(lengths + headers == PAGE_BYTES, headers, -np.arange(1, len(pages) + 1))
    for run in np.split(np.arange(len(pages)), np.flatnonzero(np.diff(kind)) + 1):
        if len(run):
            at, size, count = int(begins[run[0]]) - start, int(lengths[run[0]]), len(run)
            step = PAGE_BYTES if count > 1 else size
            part = np.lib.stride_tricks.as_strided(data[at:], (count, size), (step, 1), writeable=False)
            body[places[run[0]] : places[run[0]] + count * size].reshape(count, size)[:] = part
    whole = pages[(pages >= start) & (pages + SHORT_HEADER_BYTES <= start + len(data))] - start
    first = 0
    if len(whole):
        magic = int(data[whole[0] : whole[0] + 2].view("<u2")[0])
        major = major or {value: key for key, value in MAGIC_OF_MAJOR.items()}.get(magic)
        if whole[0] == 0 and data[2] & _CONTINUED:
            first = int(data[16:20].view("<u4")[0])
    return _Stream(body, begins, places, first + -first % 8, major)


def _records(stream: _Stream, segment_bytes: int) -> tuple[Places, Places]:
    """Where the complete records begin, and how long they are."""
    nothing = np.empty(0, np.int64)
    words = stream.body[: stream.end // 8 * 8].view("<u8")
    if len(words) < RECORD_HEADER_BYTES // 8:
        return nothing, nothing
    lowest, highest = stream.page_lsns[0], stream.page_lsns[-1] + PAGE_BYTES
    previous = words[1:-1]
    candidates = np.flatnonzero((previous >= np.uint64(lowest)) & (previous < np.uint64(highest))) * 8
    if stream.first + RECORD_HEADER_BYTES <= stream.end:
        candidates = np.union1d(candidates, [stream.first])
    candidates = candidates[candidates >= stream.first]
    lengths = _u32(stream.body, candidates)
    rmid, info = stream.body[candidates + 17], stream.body[candidates + 16]
    # A switch owns the rest of its segment.
    switches = (rmid == 0) & (info & 0xF0 == _SWITCH_INFO)
    next_segment = (
        stream.lsns(candidates) // segment_bytes * segment_bytes + segment_bytes + LONG_HEADER_BYTES
    )
    follows = np.where(switches, stream.places(next_segment), candidates + lengths + -lengths % 8)
    before = stream.places(words[candidates // 8 + 1].astype(np.int64))
    at = np.minimum(np.searchsorted(candidates, before), len(candidates) - 1)
    fits = (lengths >= RECORD_HEADER_BYTES) & (lengths < MAX_RECORD_BYTES)
    first = candidates == stream.first
    linked = (candidates[at] == before) & (follows[at] == candidates) & fits | first
    # Data may look like a record, hardly like several in a row. Not more, for after broken WAL there is a first one again.
    good = linked
    for _ in range(_ANCESTORS):
        good = linked & (good[at] | first)
    good = good & (candidates + lengths <= stream.end)
    return candidates[good], lengths[good]


def _references(stream: _Stream, starts: Places, lengths: Places) -> FirstTouchArray:
    """What the records refer to, in their order: the headers of their first blocks, then of their second ones …"""
    body = stream.body
    record = np.arange(len(starts))
    at, end = starts + RECORD_HEADER_BYTES, starts + lengths
    announced = np.zeros(len(starts), np.int64)
    locator = np.zeros((len(starts), 3), np.int64)
    found: list[FirstTouchArray] = []
    places: list[Places] = []
    for number in range(_LAST_BLOCK_ID + 1):
        # What has been announced fills the rest of a record that has no more headers.
        more = at + announced < end
        more[more] = body[at[more]] <= _LAST_BLOCK_ID
        record, at, end, announced, locator = (
            record[more],
            at[more],
            end[more],
            announced[more],
            locator[more],
        )
        if not len(record):
            break
        # Its longest: 4 bytes, 7 of the image, 16 of the relation and the block.
        fits = at + 27 <= len(body)
        padded = body if fits.all() else np.concatenate((body, np.zeros(27, np.uint8)))
        flags = padded[at + 1]
        announced = announced + _u16(padded, at + 2)
        at = at + 4
        imaged = flags & _HAS_IMAGE != 0
        bits = np.where(imaged, padded[at + 4], 0)
        applied, packed = _image_flags(bits, stream.major)
        announced = announced + np.where(imaged, _u16(padded, at), 0)
        at = at + np.where(imaged, np.where(packed & (bits & 0x01 != 0), 7, 5), 0)
        named = flags & _SAME_RELATION == 0
        locator = np.where(
            named[:, None], np.stack([_u32(padded, at + 4 * column) for column in range(3)], 1), locator
        )
        at = at + np.where(named, 12, 0)
        rows = np.empty(len(record), FIRST_TOUCH_DTYPE)
        rows["spc"], rows["db"], rows["rel"] = locator.T
        rows["fork"] = flags & 0x0F
        rows["has_image_or_init"] = (imaged & applied) | (flags & _WILL_INIT != 0)
        rows["block"] = _u32(padded, at)
        at = at + 4
        found.append(rows)
        places.append(record * (_LAST_BLOCK_ID + 1) + number)
    if not found:
        return np.empty(0, FIRST_TOUCH_DTYPE)
    return np.concatenate(found)[np.argsort(np.concatenate(places), kind="stable")]


def _image_flags(bits: Bytes, major: int | None) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Whether replay restores the image, and whether it is compressed."""
    if major == 14:
        return bits & 0x04 != 0, bits & 0x02 != 0
    if major is not None:
        return bits & 0x02 != 0, bits & 0x1C != 0
    # 3 and 5 are uncompressed images of 15 and of 14. The readings clash only for images kept for wal_consistency_checking.
    return np.ones(len(bits), bool), (bits != 3) & (bits != 5)


def _u16(body: Bytes, at: Places) -> Places:
    return body[at].astype(np.int64) | body[at + 1].astype(np.int64) << 8


def _u32(body: Bytes, at: Places) -> Places:
    return _u16(body, at) | _u16(body, at + 2) << 16
