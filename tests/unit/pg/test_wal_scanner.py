"""The WAL scanner over WAL made for the purpose: every field, every seam, every refusal."""

from __future__ import annotations

import dataclasses
import random
import struct
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.wal_builder import PAGE, Block, Built, WalBuilder, commit
from timeline.clock import POSTGRES_EPOCH_MICROS
from timeline.lsn import Lsn
from timeline.pg.wal import (
    COMMIT_DTYPE,
    TOUCH_DTYPE,
    RecordKind,
    ScanResult,
    WalFormatError,
    WalScanner,
    merge_results,
    merge_touches,
)

MIB = 1 << 20
START = 0x7_00000000 - 3 * PAGE  # three pages before a segment (and a 4 GiB) boundary
HEAP, LOGICAL_MESSAGE, XLOG, XACT, DATABASE, TABLESPACE = 10, 21, 0, 1, 4, 5


def scan(wal: WalBuilder, cuts: Sequence[int] = (), *, major: int | None = None) -> ScanResult:
    """Feed all of it, cut at these offsets."""
    scanner = WalScanner(wal.segment_bytes, wal.tli, Lsn(wal.start), major=major)
    edges = [0, *sorted(cuts), len(wal.wal)]
    data = bytes(wal.wal)
    return merge_results([scanner.feed(data[a:b]) for a, b in pairwise(edges)])


def expected_touches(records: Sequence[Built]) -> list[tuple[int, ...]]:
    """TOUCH_DTYPE rows by the plain definition."""
    by_relation: dict[tuple[int, int, int], list[tuple[Block, int]]] = defaultdict(list)
    for record in records:
        for block in record.blocks:
            by_relation[block.spc, block.db, block.rel].append((block, record.start))
    return [
        (
            *relation,
            len(touches),
            sum(block.image is not None and block.apply for block, _ in touches),
            max((block.block for block, _ in touches if block.fork == 0), default=0),
            touches[0][1],
            touches[-1][1],
        )
        for relation, touches in sorted(by_relation.items())
    ]


def expected_commits(records: Sequence[Built]) -> list[tuple[int, ...]]:
    """Start, end, time, xid, kind of the plain (not prepared) ones."""
    return [
        (
            record.start,
            record.end,
            struct.unpack_from("<q", record.main)[0] + POSTGRES_EPOCH_MICROS,
            record.xid,
            {0x00: 0, 0x20: 1}[record.info & 0x70],
        )
        for record in records
        if record.rmid == XACT and record.info & 0x70 in (0x00, 0x20)
    ]


def commit_tuples(result: ScanResult) -> list[tuple[int, ...]]:
    names = ["start", "end", "time", "xid", "kind"]
    return [tuple(int(row[name]) for name in names) for row in result.commits]


def touch_tuples(result: ScanResult) -> list[tuple[int, ...]]:
    return [tuple(int(value) for value in row) for row in result.touches]


def assert_same(left: ScanResult, right: ScanResult) -> None:
    for field in dataclasses.fields(ScanResult):
        a, b = getattr(left, field.name), getattr(right, field.name)
        assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b, field.name


def test_dtypes_are_those_of_the_index() -> None:
    from timeline.format import wal_index

    assert COMMIT_DTYPE == wal_index.COMMIT_DTYPE
    assert TOUCH_DTYPE == wal_index.TOUCH_DTYPE
    assert {kind.name: kind.value for kind in RecordKind} == {
        kind.name: kind.value for kind in wal_index.EventKind
    }
    assert [f.name for f in dataclasses.fields(ScanResult)] == [
        f.name for f in dataclasses.fields(wal_index.WalIndex)
    ]


# --- block references -------------------------------------------------------------------------------


@pytest.mark.parametrize("major", [14, 15, 16, 17, 18])
@pytest.mark.parametrize("told", [True, False])
def test_images_of_every_layout(major: int, told: bool) -> None:
    wal = WalBuilder(START, major=major)
    wal.append(LOGICAL_MESSAGE, 0, main=b"x")
    wal.start = wal.lsn  # begin inside a page, where no page header tells the major
    wal.wal.clear()
    wal.records.clear()
    image = b"i" * 300
    for hole in (False, True):
        for compressed in (False, True):
            whole = image if hole or compressed else bytes(8192)
            wal.append(
                HEAP,
                0,
                blocks=[
                    Block(rel=1, block=7, image=whole, hole=hole, compressed=compressed),
                    Block(rel=1, block=9, data=b"abc"),
                    Block(rel=2, block=4, fork=2, init=True, data=b"d"),
                ],
                main=b"m" * 20,
            )
    result = scan(wal, major=major if told else None)
    assert result.records == 4
    assert touch_tuples(result) == expected_touches(wal.records)
    assert result.touches["images"].tolist() == [4, 0]
    assert result.touches["max_block"].tolist() == [9, 0]


@pytest.mark.parametrize("major", [14, 15])
def test_images_kept_for_consistency_checks_are_not_counted(major: int) -> None:
    wal = WalBuilder(START, major=major)
    blocks = [
        Block(block=1, image=b"i" * 10, hole=True, compressed=c, apply=a)
        for c in (False, True)
        for a in (False, True)
    ]
    wal.append(HEAP, 0, blocks=blocks)
    result = scan(wal)
    assert touch_tuples(result) == expected_touches(wal.records)
    assert result.touches["images"].tolist() == [2]


def test_many_relations_and_many_references_in_one_feed() -> None:
    """More than every internal table holds at first."""
    rng = random.Random(5)
    wal = WalBuilder(START)
    for index in range(3000):
        blocks = [
            Block(rel=rng.randrange(2000), block=rng.randrange(1 << 32)) for _ in range(rng.randrange(33))
        ]
        wal.append(HEAP, 0, blocks=blocks)
        if index % 2:
            wal.append(XACT, 0x00, xid=index, main=commit(index))
        if index % 6 == 0:
            wal.append(XLOG, 0x70, main=struct.pack("<q64s", index, b"x%d" % index))
    result = scan(wal)
    assert result.records == len(wal.records)
    assert touch_tuples(result) == expected_touches(wal.records)
    assert commit_tuples(result) == expected_commits(wal.records)
    assert [event.name for event in result.events] == [f"x{index}" for index in range(0, 3000, 6)]


def test_origin_and_top_level_xid_are_stepped_over() -> None:
    wal = WalBuilder(START)
    wal.append(HEAP, 0, blocks=[Block(rel=3)], origin=7, top_xid=99, main=b"m")
    wal.append(XACT, 0x00, xid=12, main=commit(5), origin=7)
    wal.append(HEAP, 0, origin=7)
    result = scan(wal)
    assert result.records == 3
    assert touch_tuples(result) == expected_touches(wal.records)
    assert commit_tuples(result) == expected_commits(wal.records)


# --- transaction ends -------------------------------------------------------------------------------


@pytest.mark.parametrize("major", [14, 15, 18])
@pytest.mark.parametrize("many", [1, 40_000])
def test_prepared_transactions_give_the_xid_of_the_transaction(major: int, many: int) -> None:
    """Also behind hundreds of KiB of subtransactions, relations, statistics and invalidations."""
    stats = 0 if major == 14 else 12 if major < 18 else 16
    xinfo = 0x01 | 0x02 | 0x04 | 0x08 | 0x10 | 0x80 | (0x100 if stats else 0)
    counted = [(4, many), (12, many), *([(stats, many)] if stats else []), (16, many)]
    tail = bytes(8) + b"".join(struct.pack("<I", n) + b"\xee" * (size * n) for size, n in counted)
    tail += struct.pack("<I", 4711) + b"gid\0"
    wal = WalBuilder(START, major=major)
    wal.append(XACT, 0x30 | 0x80, main=commit(11, xinfo=xinfo, tail=tail))
    abort_tail = tail.replace(
        struct.pack("<I", many) + b"\xee" * (16 * many) + struct.pack("<I", 4711), struct.pack("<I", 4712)
    )
    wal.append(XACT, 0x40 | 0x80, main=commit(12, xinfo=xinfo & ~0x08, tail=abort_tail))
    wal.append(XACT, 0x30 | 0x80, main=commit(13, xinfo=0x10, tail=struct.pack("<I", 4713)))
    wal.append(XACT, 0x20 | 0x80, xid=5, main=commit(14, xinfo=0x02, tail=struct.pack("<II", 1, 6)))
    wal.append(XACT, 0x10, xid=6, main=bytes(80))  # PREPARE ends nothing
    wal.append(XACT, 0x50, xid=7, main=bytes(16))
    for cuts in ([], list(range(0, len(wal.wal), 4099)), [len(wal.wal) - 7]):
        result = scan(wal, cuts)
        found = [(kind, xid) for *_, xid, kind in commit_tuples(result)]
        assert found == [(2, 4711), (3, 4712), (2, 4713), (1, 5)]
        assert result.commits["time"].tolist() == [POSTGRES_EPOCH_MICROS + t for t in (11, 12, 13, 14)]


# --- events -----------------------------------------------------------------------------------------


def test_events_are_decoded() -> None:
    wal = WalBuilder(START, major=17)
    checkpoint = struct.pack(
        "<QII?3xiQIIIIIII4xqIII4x",
        0x1234,
        1,
        1,
        True,
        2,
        (3 << 32) | 9,
        10,
        11,
        12,
        13,
        14,
        15,
        16,
        1000,
        17,
        18,
        19,
    )
    wal.append(XLOG, 0x10, main=checkpoint)
    wal.append(XLOG, 0x00, main=checkpoint)
    wal.append(XLOG, 0x60, main=struct.pack("<6i2?2x", 100, 8, 10, 5, 64, 2, True, False))
    wal.append(XLOG, 0x70, main=struct.pack("<q64s", 77, "früher".encode()))
    wal.append(XLOG, 0x80, main=b"\1")
    wal.append(XLOG, 0x90, main=struct.pack("<qIIi", 5, 3, 2, 1))
    wal.append(XLOG, 0x50, main=struct.pack("<Q", 0x5678))
    wal.append(DATABASE, 0x00, main=struct.pack("<IIII", 20000, 1663, 1, 1664))
    wal.append(TABLESPACE, 0x00, main=struct.pack("<I", 16500) + b"/srv/\xff" + b"p" * 900 + b"\0")
    wal.append(TABLESPACE, 0x10, main=struct.pack("<I", 16500))
    wal.append(XLOG, 0x20)  # NOOP
    wal.append(XLOG, 0x30, main=bytes(4))  # NEXTOID
    wal.append(XLOG, 0xB0, blocks=[Block(image=bytes(8192))])
    wal.append(DATABASE, 0x10, main=bytes(8))
    wal.append(XLOG, 0x40)
    for cuts in ([], list(range(len(wal.wal) % 1000))):
        result = scan(wal, cuts)
        events = {event.kind: event for event in result.events}
        assert [event.kind for event in result.events] == [
            RecordKind.CHECKPOINT,
            RecordKind.CHECKPOINT,
            RecordKind.PARAMETER_CHANGE,
            RecordKind.RESTORE_POINT,
            RecordKind.FULL_PAGE_WRITES,
            RecordKind.END_OF_RECOVERY,
            RecordKind.BACKUP_END,
            RecordKind.DATABASE_CREATE_FILE_COPY,
            RecordKind.TABLESPACE_CREATE,
            RecordKind.TABLESPACE_DROP,
            RecordKind.SWITCH,
        ]
        values = {kind: dict(event.values) for kind, event in events.items()}
        online, shutdown = result.events[:2]
        assert (dict(online.values)["shutdown"], dict(shutdown.values)["shutdown"]) == (0, 1)
        assert online.time == 1000 * 1_000_000
        assert values[RecordKind.CHECKPOINT] | {"shutdown": 0} == {
            "shutdown": 0, "redo": 0x1234, "tli": 1, "prev_tli": 1, "full_page_writes": 1, "wal_level": 2,
            "next_xid": (3 << 32) | 9, "next_oid": 10, "next_multi": 11, "next_multi_offset": 12,
            "oldest_xid": 13, "oldest_xid_db": 14, "oldest_multi": 15, "oldest_multi_db": 16,
            "oldest_commit_ts_xid": 17, "newest_commit_ts_xid": 18, "oldest_active_xid": 19,
        }  # fmt: skip
        assert values[RecordKind.PARAMETER_CHANGE] == {
            "max_connections": 100, "max_worker_processes": 8, "max_wal_senders": 10,
            "max_prepared_transactions": 5, "max_locks_per_transaction": 64, "wal_level": 2,
            "wal_log_hints": 1, "track_commit_timestamp": 0,
        }  # fmt: skip
        point = events[RecordKind.RESTORE_POINT]
        assert (point.name, point.time) == ("früher", POSTGRES_EPOCH_MICROS + 77)
        assert values[RecordKind.FULL_PAGE_WRITES] == {"full_page_writes": 1}
        assert values[RecordKind.END_OF_RECOVERY] == {"tli": 3, "prev_tli": 2, "wal_level": 1}
        assert values[RecordKind.BACKUP_END] == {"start_point": 0x5678}
        assert values[RecordKind.DATABASE_CREATE_FILE_COPY] == {
            "db": 20000, "tablespace": 1663, "source_db": 1, "source_tablespace": 1664,
        }  # fmt: skip
        assert events[RecordKind.TABLESPACE_CREATE].name == "/srv/\\xff" + "p" * 900
        assert values[RecordKind.TABLESPACE_CREATE] == values[RecordKind.TABLESPACE_DROP] == {"oid": 16500}
        assert events[RecordKind.SWITCH].end % wal.segment_bytes == 0
        assert [(event.start, event.end) for event in result.events] == [
            (record.start, record.end)
            for record in wal.records
            if (record.rmid, record.info)
            in {(0, i) for i in (0, 0x10, 0x60, 0x70, 0x80, 0x90, 0x50, 0x40)} | {(4, 0), (5, 0), (5, 0x10)}
        ]


def test_an_event_cut_short_is_refused() -> None:
    wal = WalBuilder(START)
    record = wal.append(XLOG, 0x60, main=bytes(8))
    with pytest.raises(WalFormatError, match="PARAMETER_CHANGE") as caught:
        scan(wal)
    assert caught.value.lsn == record.start


# --- seams ------------------------------------------------------------------------------------------


@st.composite
def built_wal(draw: st.DrawFn) -> WalBuilder:
    """WAL of every shape that the scanner distinguishes, from a place near a segment boundary."""
    wal = WalBuilder(
        draw(st.sampled_from([START, START + 2 * PAGE, 0x7_00000000, 0x100000])),
        major=draw(st.sampled_from([14, 15, 18])),
    )
    rng = random.Random(draw(st.integers(0, 2**32)))
    for _ in range(draw(st.integers(1, 25))):
        shape = draw(
            st.sampled_from(["heap", "heap", "message", "commit", "abort", "point", "switch", "cut", "align"])
        )
        if shape == "heap":
            blocks = [
                Block(
                    rel=rng.randrange(4),
                    block=rng.randrange(100),
                    fork=rng.randrange(3),
                    data=rng.randbytes(rng.randrange(60)),
                    image=rng.choice([None, None, rng.randbytes(rng.randrange(1, 8000))]),
                    hole=True,
                    compressed=rng.random() < 0.5,
                    init=rng.random() < 0.3,
                )
                for _ in range(rng.randrange(6))
            ]
            wal.append(
                HEAP, 0, blocks=blocks, main=rng.randbytes(rng.randrange(50)), top_xid=rng.choice([None, 3])
            )
        elif shape == "message":
            wal.append(LOGICAL_MESSAGE, 0, main=rng.randbytes(rng.choice([1, 300, 9000, 40_000])))
        elif shape in ("commit", "abort"):
            wal.append(
                XACT,
                0x00 if shape == "commit" else 0x20,
                xid=rng.randrange(1 << 32),
                main=commit(rng.randrange(1 << 50)),
            )
        elif shape == "point":
            wal.append(
                XLOG, 0x70, main=struct.pack("<q64s", rng.randrange(1 << 50), rng.randbytes(8).hex().encode())
            )
        elif shape == "switch":
            wal.append(XLOG, 0x40)
        elif shape == "cut":
            wal.append(LOGICAL_MESSAGE, 0, main=bytes(20_000), cut=True)
            wal.append(XLOG, 0xD0, main=struct.pack("<Qq", 1, 2))
        else:
            wal.fill_to(rng.choice([PAGE - 8, PAGE - 16, 0]))
    return wal


@given(built_wal(), st.data())
@settings(deadline=None, max_examples=40)
def test_any_split_gives_the_same_result(wal: WalBuilder, data: st.DataObject) -> None:
    """EDGE 13: messages are cut anywhere."""
    whole = scan(wal)
    assert whole.records == len(wal.records)
    assert whole.last_record == wal.records[-1].start
    assert whole.last_record_end == wal.records[-1].end == whole.pending
    assert touch_tuples(whole) == expected_touches(wal.records)
    assert commit_tuples(whole) == expected_commits(wal.records)
    near = [r.start - wal.start for r in wal.records] + list(range(0, len(wal.wal), PAGE))
    near = [offset for offset in near if offset < 400_000]
    cut = st.sampled_from(near).flatmap(lambda o: st.integers(max(0, o - 30), min(len(wal.wal), o + 60)))
    cuts = data.draw(st.lists(st.one_of(cut, st.integers(0, len(wal.wal))), max_size=60))
    assert_same(scan(wal, cuts), whole)


@given(built_wal(), st.data())
@settings(deadline=None, max_examples=30)
def test_pending_is_where_a_new_scanner_begins(wal: WalBuilder, data: st.DataObject) -> None:
    """EDGE 14: back at any byte, read again from ``pending``: nothing is lost or told twice."""
    whole = scan(wal)
    raw = bytes(wal.wal)
    cut = data.draw(st.integers(0, len(raw)))
    first = WalScanner(wal.segment_bytes, wal.tli, Lsn(wal.start))
    before = first.feed(raw[:cut])
    assert first.position == wal.start + cut
    assert wal.start <= before.pending <= first.position
    second = WalScanner(wal.segment_bytes, wal.tli, before.pending, major=wal.major)
    after = second.feed(raw[before.pending - wal.start :])
    assert_same(merge_results([before, after]), whole)


@pytest.mark.parametrize("offset", range(0, 400, 8))
def test_every_alignment_at_a_page_boundary(offset: int) -> None:
    wal = WalBuilder(START)
    wal.fill_to((PAGE - offset) % PAGE)
    blocks = [Block(rel=i, block=i, image=b"z" * 9, hole=True, compressed=True, data=b"y") for i in range(5)]
    wal.append(HEAP, 0, blocks=blocks, main=b"m" * 30, top_xid=5, origin=1)
    wal.append(XACT, 0xB0, main=commit(9, xinfo=0x11, tail=bytes(8) + struct.pack("<I", 77)))
    result = scan(wal)
    assert result.records == 3
    assert touch_tuples(result) == expected_touches(wal.records)
    assert result.commits["xid"].tolist() == [77]


def test_a_record_that_began_before_the_page_is_skipped() -> None:
    wal = WalBuilder(START)
    wal.append(LOGICAL_MESSAGE, 0, main=bytes(3 * PAGE))
    after = wal.append(HEAP, 0, blocks=[Block()])
    for page in (1, 2, 3):
        scanner = WalScanner(wal.segment_bytes, 1, Lsn(START + page * PAGE))
        raw = bytes(wal.wal[page * PAGE :])
        part = scanner.feed(raw[:50])
        assert part.records == 0
        assert part.pending == START + page * PAGE
        result = merge_results([part, scanner.feed(raw[50:])])
        assert (result.records, result.last_record) == (1, after.start)


def test_a_long_record_takes_no_memory() -> None:
    """P9: 128 MiB of one record, fed in pieces, is counted and not kept."""
    import tracemalloc

    wal = WalBuilder(START)
    record = wal.append(LOGICAL_MESSAGE, 0, main=bytes(128 * MIB))
    scanner = WalScanner(wal.segment_bytes, 1, Lsn(START))
    view = memoryview(wal.wal)
    scanner.feed(view[:100])
    tracemalloc.start()
    for begin in range(100, len(view), MIB):
        assert scanner.pending == record.start
        result = scanner.feed(view[begin : begin + MIB])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.records == 1
    assert peak < 1 * MIB


def test_a_switch_is_complete_with_its_segment() -> None:
    """EDGE 26."""
    wal = WalBuilder(START)
    switch = wal.append(XLOG, 0x40)
    assert switch.end == 0x7_00000000
    after = wal.append(HEAP, 0)
    scanner = WalScanner(wal.segment_bytes, 1, Lsn(START))
    raw = bytes(wal.wal)
    part = scanner.feed(raw[: 3 * PAGE - 1])
    assert (part.records, part.pending) == (0, switch.start)
    done = scanner.feed(raw[3 * PAGE - 1 : 3 * PAGE])
    assert (done.records, done.last_record, done.last_record_end) == (1, switch.start, switch.end)
    assert scanner.feed(raw[3 * PAGE :]).last_record == after.start


def test_a_switch_that_ends_its_segment_has_no_padding() -> None:
    wal = WalBuilder(0x7_00000000 - PAGE)
    wal.fill_to(PAGE - 24)
    switch = wal.append(XLOG, 0x40)
    wal.append(HEAP, 0)
    assert switch.end == switch.start + 24 == 0x7_00000000
    assert scan(wal).records == 3


def test_an_overwritten_record_is_forgotten() -> None:
    """EDGE 24."""
    wal = WalBuilder(START)
    wal.append(HEAP, 0, blocks=[Block(rel=1)])
    lost = wal.append(HEAP, 0, blocks=[Block(rel=666)], main=bytes(3 * PAGE), cut=True)
    wal.append(XLOG, 0xD0, main=struct.pack("<Qq", lost.start, 33))
    wal.append(HEAP, 0, blocks=[Block(rel=1)])
    result = scan(wal)
    assert result.records == 3
    assert result.touches["rel"].tolist() == [1]
    (event,) = result.events
    assert event.kind is RecordKind.OVERWRITE_CONTRECORD
    assert dict(event.values) == {"overwritten": lost.start}
    assert event.time == POSTGRES_EPOCH_MICROS + 33


@pytest.mark.parametrize("zeros", [1, 8, PAGE - 100, 3 * PAGE, MIB])
def test_zeros_after_the_end_of_wal(zeros: int) -> None:
    """EDGE 25: segments handed to recovery are of full length."""
    wal = WalBuilder(START)
    last = wal.append(HEAP, 0)
    wal.wal += bytes(zeros)
    scanner = WalScanner(wal.segment_bytes, 1, Lsn(START))
    for begin in range(0, len(wal.wal), 5000):
        scanner.feed(bytes(wal.wal[begin : begin + 5000]))
    assert scanner.pending == last.end
    assert scanner.at_zeros == (zeros >= 4)
    if zeros >= 4:
        with pytest.raises(WalFormatError, match="expected zeros"):
            scanner.feed(b"\1")


def test_zeros_from_a_page_start_on() -> None:
    wal = WalBuilder(START)
    wal.fill_to(0)
    end = wal.lsn
    wal.wal += bytes(3 * PAGE)
    scanner = WalScanner(wal.segment_bytes, 1, Lsn(START))
    scanner.feed(bytes(wal.wal))
    assert (scanner.pending, scanner.at_zeros) == (end, True)


def test_a_new_tli_repeats_pages_of_its_ancestor() -> None:
    """EDGE 17."""
    wal = WalBuilder(0x7_00000000, tli=3)
    wal.append(LOGICAL_MESSAGE, 0, main=bytes(2 * PAGE))
    wal.tli = 5
    wal.append(LOGICAL_MESSAGE, 0, main=bytes(2 * PAGE))
    scanner = WalScanner(wal.segment_bytes, 5, Lsn(wal.start))
    assert scanner.feed(bytes(wal.wal)).records == 2
    assert scanner.system_identifier == wal.system_identifier
    assert scanner.major == 15
    with pytest.raises(WalFormatError, match="tli 5, expected 3"):
        WalScanner(wal.segment_bytes, 3, Lsn(wal.start)).feed(bytes(wal.wal))


# --- refusals ---------------------------------------------------------------------------------------


def poke(layout: str, offset: int, value: int) -> Callable[[bytearray], None]:
    return lambda wal: struct.pack_into(layout, wal, offset, value)


SEGMENT = 3 * PAGE  # offset of the page that begins a segment


@pytest.mark.parametrize(
    ("spoil", "at", "said"),
    [
        (poke("<H", PAGE, 0xD117), PAGE, "magic D117"),
        (poke("<H", PAGE, 0xD10D), PAGE, "page of Postgres 14, expected 15"),
        (poke("<H", PAGE + 2, 0x11), PAGE, "flags 0011"),
        (poke("<H", PAGE + 2, 0x03), PAGE, "flags 0003"),
        (poke("<H", SEGMENT + 2, 0x01), SEGMENT, "flags 0001"),
        (poke("<I", PAGE + 4, 2), PAGE, "tli 2, expected 1"),
        (poke("<I", PAGE + 4, 0), PAGE, "tli 0 after"),
        (poke("<Q", PAGE + 8, 0x600000000), PAGE, "belongs to 6/00000000"),
        (poke("<I", SEGMENT + 32, 16 * MIB), SEGMENT, "segment size 16777216"),
        (poke("<I", SEGMENT + 36, 4096), SEGMENT, "page size 4096"),
        (poke("<H", PAGE + 2, 0x00), PAGE, "continues a record"),
        (poke("<I", PAGE + 16, 5), PAGE, "continues a record with 5"),
        (lambda wal: wal.__setitem__(slice(PAGE, PAGE + 24), bytes(24)), PAGE, "magic 0000"),
        (poke("<I", 24, 23), 24, "length 23"),
        (poke("<I", 24, (1 << 30) + 1), 24, "length 1073741825"),
        (poke("<Q", 24 + 8, START + 24), 24, "follows one at"),
        (poke("<B", 24 + 17, 22), 24, "resource manager 22"),
        (poke("<B", 24 + 24, 33), 24, "block id 33"),
        (poke("<H", 24 + 26, 9999), 24, "parts need"),
        (poke("<B", 24 + 25, 0x80), 24, "parts need"),
    ],
)
def test_what_is_not_wal_is_refused(spoil: Callable[[bytearray], Any], at: int, said: str) -> None:
    wal = WalBuilder(START)
    wal.append(HEAP, 0, blocks=[Block(data=b"abc")])
    wal.append(LOGICAL_MESSAGE, 0, main=bytes(5 * PAGE))
    raw = bytearray(wal.wal)
    spoil(raw)
    for step in (len(raw), 1000, 7):
        scanner = WalScanner(wal.segment_bytes, 1, Lsn(START))
        with pytest.raises(WalFormatError, match=said) as caught:
            for begin in range(0, len(raw), step):
                scanner.feed(bytes(raw[begin : begin + step]))
        assert caught.value.lsn == START + at
        with pytest.raises(WalFormatError, match=said):
            scanner.feed(bytes(raw))


def test_a_missing_record_is_noticed() -> None:
    wal = WalBuilder(START)
    wal.append(HEAP, 0)
    wal.previous -= 8
    bad = wal.append(HEAP, 0)
    with pytest.raises(WalFormatError, match="expected 6/FFFFA018") as caught:
        scan(wal)
    assert caught.value.lsn == bad.start


def test_block_ids_must_rise_and_know_their_relation() -> None:
    wal = WalBuilder(START)
    wal.append(HEAP, 0, blocks=[Block(rel=1), Block(rel=2)])
    raw = bytearray(wal.wal)
    raw[24 + 24 + 20] = 0
    with pytest.raises(WalFormatError, match="block id 0 after 0"):
        WalScanner(MIB, 1, Lsn(START)).feed(bytes(raw))


def test_a_page_that_continues_nothing_is_refused() -> None:
    wal = WalBuilder(START)
    wal.fill_to(0)
    wal.append(HEAP, 0)
    struct.pack_into("<H", wal.wal, PAGE + 2, 0x01)
    struct.pack_into("<I", wal.wal, PAGE + 16, 8)
    with pytest.raises(WalFormatError, match="continues a record with 8 bytes, expected 0"):
        scan(wal)


@pytest.mark.parametrize("position", [START + 4, START + 8, START + 16, 0x7_00000000 + 24, 0x7_00000000 + 32])
def test_positions_inside_page_headers_are_refused(position: int) -> None:
    with pytest.raises(WalFormatError, match="start of a record or of a page"):
        WalScanner(MIB, 1, Lsn(position))


def test_unknown_majors_are_refused() -> None:
    with pytest.raises(WalFormatError, match="Postgres 13"):
        WalScanner(MIB, 1, Lsn(START), major=13)


def test_merging_touches_of_nothing() -> None:
    assert len(merge_touches([])) == 0
    assert len(merge_touches([np.empty(0, TOUCH_DTYPE)])) == 0
