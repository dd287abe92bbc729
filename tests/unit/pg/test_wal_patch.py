"""Changes to private WAL: only what is proven to be the right record is touched (EDGE 49, 58)."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.wal_builder import PAGE, Block, Built, WalBuilder
from timeline.lsn import Lsn
from timeline.pg.wal import RecordKind, WalFormatError, WalScanner
from timeline.pg.wal_patch import (
    ForgedRecord,
    apply_patches,
    blank_tablespace_creates,
    find_tablespace_creates,
    noop_record,
    previous_record,
    read_record,
    tablespace_patches,
)

MIB = 1 << 20
SEGMENT = 0x7_00000000
START = SEGMENT - 3 * PAGE
HEAP, TABLESPACE = 10, 5


def create(wal: WalBuilder, path: bytes = b"/srv/production/fast", **more: int) -> Built:
    return wal.append(TABLESPACE, 0x00, xid=9, main=struct.pack("<I", 16400) + path + b"\0", **more)  # type: ignore[arg-type]


def paths(wal: WalBuilder) -> list[str | None]:
    """What a reader makes of the WAL: the path of each Tablespace/CREATE, every checksum verified."""
    for record in wal.records:
        read_record(wal.wal, Lsn(wal.start), Lsn(record.start), wal.segment_bytes)
    events = WalScanner(wal.segment_bytes, wal.tli, Lsn(wal.start)).feed(wal.wal).events
    return [event.name for event in events if event.kind is RecordKind.TABLESPACE_CREATE]


def creates(wal: WalBuilder) -> tuple[Lsn, ...]:
    return find_tablespace_creates(wal.wal, Lsn(wal.start), wal.segment_bytes)


@pytest.mark.parametrize("end", [PAGE, SEGMENT - START])
@pytest.mark.parametrize("before", [0, 8, 16, 24, 32, 40, 56, 64, 480])
@pytest.mark.parametrize("path", [b"/srv/production/fast", b"/" + b"p" * 1022])
def test_records_across_pages_and_segments(end: int, before: int, path: bytes) -> None:
    """The record starts ``before`` bytes ahead of the end of a page, or of a segment."""
    wal = WalBuilder(START)
    while wal.lsn < START + end - PAGE:
        wal.fill_to(0)
    wal.fill_to((PAGE - before) % PAGE)
    record = create(wal, path)
    after = wal.append(HEAP, 0, blocks=[Block()])
    untouched = bytes(wal.wal)
    assert creates(wal) == (record.start,)
    blank_tablespace_creates(wal.wal, Lsn(START), MIB, [record.start])
    assert paths(wal) == [""]
    changed = [i for i, (a, b) in enumerate(zip(untouched, wal.wal, strict=True)) if a != b]
    assert record.start - START <= changed[0]
    assert changed[-1] < after.start - START


def test_segment_by_segment() -> None:
    """A record across two segments, patched in two buffers that each hold one."""
    wal = WalBuilder(START)
    while wal.lsn < SEGMENT - PAGE:
        wal.fill_to(0)
    wal.fill_to(PAGE - 40)
    record = create(wal)
    patches = tablespace_patches(wal.wal, Lsn(START), MIB, [record.start])
    assert len(patches) == 2
    low, high = bytearray(wal.wal[: 3 * PAGE]), bytearray(wal.wal[3 * PAGE :])
    apply_patches(low, Lsn(START), patches)
    apply_patches(memoryview(high), Lsn(SEGMENT), patches)
    blank_tablespace_creates(wal.wal, Lsn(START), MIB, [record.start])
    assert low + high == wal.wal
    assert paths(wal) == [""]


def test_headers_before_the_main_data() -> None:
    wal = WalBuilder(START)
    record = create(wal, b"/x", origin=3, top_xid=4)
    blank_tablespace_creates(wal.wal, Lsn(START), MIB, [record.start])
    assert paths(wal) == [""]


def test_empty_paths_stay_as_they_are() -> None:
    wal = WalBuilder(START)
    record = create(wal, b"")
    before = bytes(wal.wal)
    assert creates(wal) == (record.start,)
    blank_tablespace_creates(wal.wal, Lsn(START), MIB, creates(wal))
    assert wal.wal == before


def test_several_are_all_found() -> None:
    wal = WalBuilder(START)
    records = []
    for index in range(40):
        records.append(create(wal, b"/srv/%d" % index))
        wal.append(21, 0, main=bytes(200 * index))
        wal.append(TABLESPACE, 0x10, main=struct.pack("<I", 16400))
    assert creates(wal) == tuple(record.start for record in records)
    blank_tablespace_creates(wal.wal, Lsn(START), MIB, creates(wal))
    assert paths(wal) == [""] * 40


def test_wal_inside_a_record_is_no_wal() -> None:
    """Servers may store WAL files in a table: a record's bytes in the data of another are left alone."""
    inner = WalBuilder(START)
    create(inner)
    wal = WalBuilder(START)
    wal.append(21, 0, main=bytes(inner.wal[24:]) * 3)
    assert creates(wal) == ()


def test_unreadable_wal_is_refused_not_searched() -> None:
    wal = WalBuilder(START)
    wal.append(HEAP, 0)
    bad = wal.append(HEAP, 0)
    create(wal)
    wal.wal[bad.start - START + 17] = 99
    with pytest.raises(WalFormatError):
        creates(wal)


@pytest.mark.parametrize(
    ("offset", "said"),
    [
        (-8, "place of a record"),
        (8, "24 bytes"),
        (4, "place of a record"),
        (0, "checksum"),
        (10_000, "beyond the WAL"),
    ],
)
def test_wrong_positions_change_nothing(offset: int, said: str) -> None:
    wal = WalBuilder(START)
    good = create(wal)
    bad = create(wal)
    wal.append(HEAP, 0)
    wal.wal[bad.start - START + 40] ^= 1
    before = bytes(wal.wal)
    target = bad.start + offset if offset >= 0 else START + 16
    with pytest.raises(WalFormatError, match=said):
        blank_tablespace_creates(wal.wal, Lsn(START), MIB, [good.start, target])
    assert wal.wal == before


def test_other_records_are_refused() -> None:
    wal = WalBuilder(START)
    drop = wal.append(TABLESPACE, 0x10, main=struct.pack("<I", 1))
    heap = wal.append(HEAP, 0x00)
    endless = wal.append(TABLESPACE, 0x00, main=struct.pack("<I", 1) + b"/no/end")
    short = wal.append(TABLESPACE, 0x00, main=struct.pack("<I", 1))
    for record, said in (
        (drop, "manager 5"),
        (heap, "manager 10"),
        (endless, "terminated"),
        (short, "terminated"),
    ):
        with pytest.raises(WalFormatError, match=said):
            tablespace_patches(wal.wal, Lsn(START), MIB, [record.start])


def test_a_record_not_wholly_at_hand_is_refused() -> None:
    wal = WalBuilder(START)
    wal.fill_to(PAGE - 40)
    record = create(wal)
    for end in (8, 39, 40, 60, 65, len(wal.wal) - (record.start - START) - 8):
        part = wal.wal[: record.start - START + end]
        with pytest.raises(WalFormatError, match="beyond the WAL at hand"):
            blank_tablespace_creates(part, Lsn(START), MIB, [record.start])


@given(st.integers(0, PAGE // 8 + 40), st.integers(1, 20_000))
@settings(deadline=None, max_examples=40)
def test_records_are_read_whole(offset: int, size: int) -> None:
    wal = WalBuilder(START)
    first = wal.append(21, 0, main=bytes(offset * 8 + 1))
    record = wal.append(21, 0, xid=77, main=b"m" * size)
    raw = read_record(wal.wal, Lsn(START), Lsn(record.start), MIB)
    assert raw.endswith(b"m" * size)
    assert struct.unpack_from("<II", raw) == (len(raw), 77)
    assert previous_record(wal.wal, Lsn(START), Lsn(record.start)) == first.start


def test_page_starts_stand_for_the_record_behind_their_header() -> None:
    wal = WalBuilder(START)
    wal.fill_to(0)
    page = Lsn(wal.lsn)
    record = wal.append(21, 0, main=b"m" * 2 * PAGE)
    whole = read_record(wal.wal, Lsn(START), Lsn(record.start), MIB)
    assert read_record(wal.wal, Lsn(START), page, MIB) == whole
    assert previous_record(wal.wal, Lsn(START), page) == wal.records[0].start
    with pytest.raises(WalFormatError, match="record of its own"):
        read_record(wal.wal, Lsn(START), Lsn(page + PAGE), MIB)


def test_pages_that_do_not_continue_a_record_are_noticed() -> None:
    wal = WalBuilder(START)
    lost = wal.append(21, 0, main=bytes(2 * PAGE), cut=True)
    wal.append(0, 0xD0, main=bytes(16))
    with pytest.raises(WalFormatError, match="continues the record"):
        read_record(wal.wal, Lsn(START), Lsn(lost.start), MIB)


# --- the forged NOOP -----------------------------------------------------------------------------


def forge(wal: WalBuilder) -> ForgedRecord:
    return noop_record(
        Lsn(wal.lsn),
        previous=Lsn(wal.previous),
        tli=wal.tli,
        major=wal.major,
        system_identifier=wal.system_identifier,
        segment_bytes=wal.segment_bytes,
    )


@pytest.mark.parametrize("major", [14, 18])
@pytest.mark.parametrize("page", [1, 3])
@pytest.mark.parametrize("before", [0, 8, 16, 24, 32, 4000])
def test_a_noop_fits_everywhere(major: int, page: int, before: int) -> None:
    """EDGE 58; the same bytes as a server would write, page headers included."""
    wal = WalBuilder(START, major=major, tli=4)
    while wal.lsn < START + (page - 1) * PAGE:
        wal.fill_to(0)
    wal.fill_to((PAGE - before) % PAGE)
    forged = forge(wal)
    assert forged.patch.at == wal.lsn
    before_noop = bytes(wal.wal)
    noop = wal.append(0, 0x20)
    assert (forged.start, forged.end) == (noop.start, noop.end)
    assert before_noop + forged.patch.data == wal.wal
    result = WalScanner(MIB, 4, Lsn(START)).feed(wal.wal + bytes(-len(wal.wal) % PAGE))
    assert (result.last_record, result.last_record_end) == (noop.start, noop.end)


def test_a_noop_after_a_switch_begins_the_next_segment() -> None:
    wal = WalBuilder(START)
    wal.append(0, 0x40)
    forged = forge(wal)
    assert (forged.patch.at, forged.start) == (SEGMENT, SEGMENT + 40)
    noop = wal.append(0, 0x20)
    assert bytes(wal.wal).endswith(forged.patch.data)
    assert read_record(wal.wal, Lsn(START), Lsn(noop.start), MIB)[16:18] == b"\x20\x00"


def test_a_noop_needs_a_record_before_it() -> None:
    with pytest.raises(WalFormatError):
        noop_record(
            Lsn(START + 64), previous=Lsn(START + 64), tli=1, major=15, system_identifier=1, segment_bytes=MIB
        )
