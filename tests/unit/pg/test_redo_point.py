"""Synthetic redo points: where they can be, what is forged, and that nothing is guessed (EDGE 53)."""

from __future__ import annotations

import dataclasses
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.control_file import VERSIONS, build_control
from tests.support.wal_builder import PAGE, Block, Built, WalBuilder
from timeline.lsn import Lsn
from timeline.pg.control import ClusterState, Parameters, parse_checkpoint, parse_control
from timeline.pg.errors import FormatError
from timeline.pg.redo_point import (
    FORGED_BYTES,
    check_redo_point,
    find_redo_point,
    is_candidate,
    redo_point_control,
    redo_point_patches,
)
from timeline.pg.wal import RecordKind, WalFormatError, WalScanner
from timeline.pg.wal_patch import apply_patches, noop_record, read_record

MIB = 1 << 20
SEGMENT = Lsn(0x7_00000000)
SYSTEM = 0x6123456789ABCDEF
HEAP = 10
PARAMETERS = Parameters(
    wal_level=2,
    wal_log_hints=True,
    track_commit_timestamp=True,
    max_connections=31,
    max_worker_processes=12,
    max_wal_senders=13,
    max_prepared_transactions=14,
    max_locks_per_transaction=65,
)


def image(major: int = 15, lsn: int = SEGMENT, **more: int) -> bytes:
    """pg_control of a builder that promoted at that LSN and was stopped."""
    shut_down = lsn + 0x100
    return build_control(
        major,
        **{
            "system_identifier": SYSTEM,
            "state": 1,
            "checkpoint_lsn": shut_down,
            "redo": shut_down,
            "tli": 9,
            "prev_tli": 9,
            "full_page_writes": 1,
            "next_xid": 0x2_00001234,
            "next_oid": 32768,
            "next_multi": 55,
            "next_multi_offset": 110,
            "oldest_xid": 731,
            "oldest_xid_db": 1,
            "oldest_multi": 3,
            "oldest_multi_db": 5,
            "oldest_commit_ts_xid": 740,
            "newest_commit_ts_xid": 790,
            "segment_bytes": MIB,
            **more,
        },
    )


def control_for(lsn: int, *, tli: int = 1, major: int = 15) -> bytes:
    return redo_point_control(
        image(major, lsn), Lsn(lsn), tli=tli, parameters=PARAMETERS, full_page_writes=False
    )


def patch(wal: WalBuilder, lsn: int, *, tli_start: int = 0) -> None:
    control = control_for(lsn, tli=wal.tli, major=wal.major)
    patches = redo_point_patches(wal.wal, Lsn(wal.start), control, tli_start=Lsn(tli_start))
    apply_patches(wal.wal, Lsn(wal.start), patches)


def check(wal: WalBuilder, lsn: int, *, tli_start: int = 0, tli: int | None = None, major: int = 0) -> None:
    check_redo_point(
        wal.wal,
        Lsn(wal.start),
        Lsn(lsn),
        tli=tli or wal.tli,
        tli_start=Lsn(tli_start),
        segment_bytes=wal.segment_bytes,
        major=major or wal.major,
    )


def find(wal: WalBuilder, latest: int, *, tli_start: int = 0) -> Lsn | None:
    return find_redo_point(
        wal.wal,
        Lsn(wal.start),
        Lsn(latest),
        tli=wal.tli,
        tli_start=Lsn(tli_start),
        segment_bytes=wal.segment_bytes,
        major=wal.major,
    )


def record_at(offset: int, *, size: int = 40, major: int = 15, tli: int = 1) -> tuple[WalBuilder, Built]:
    """WAL whose second page has a record at that offset, and one more after it."""
    wal = WalBuilder(SEGMENT, major=major, tli=tli)
    wal.fill_to(offset)
    if wal.lsn < SEGMENT + PAGE:
        wal.fill_to(offset)
    record = wal.append(HEAP, 0x20, xid=77, blocks=[Block()], main=b"m" * size)
    wal.append(HEAP, 0, blocks=[Block()])
    return wal, record


# --- the place -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "usable"),
    [
        (0, False),  # the end of a record; the next starts behind the page header
        (PAGE + 24, False),
        (PAGE + 24 + 112, False),
        (
            PAGE + 24 + 120,
            False,
        ),  # a checkpoint right behind the header: Postgres takes it for a continuation
        (PAGE + 24 + 128, True),
        (40 + 120, False),  # the first page of a segment has the longer header
        (40 + 128, True),
        (PAGE + 4000, True),
        (PAGE + 4004, False),
        (MIB - 8192 + 24 + 128, True),
        (MIB - 48, True),  # ends with the segment
        (MIB - 40, False),  # EDGE 53
        (MIB - 8, False),
    ],
)
def test_places(offset: int, usable: bool) -> None:
    assert is_candidate(Lsn(SEGMENT + offset), 48, tli_start=Lsn(0), segment_bytes=MIB) == usable


def test_long_records_may_span_pages_but_not_segments() -> None:
    """EDGE 53: page headers count, since they push the end into the next segment."""
    lsn = Lsn(SEGMENT + 5 * PAGE + 4000)
    room = MIB - 5 * PAGE - 4000
    headers = 24 * (MIB // PAGE - 6)
    for size, usable in (
        (room - headers, True),
        (room - headers + 1, False),
        (room, False),
        (1 << 31, False),
    ):
        assert is_candidate(lsn, size, tli_start=Lsn(0), segment_bytes=MIB) == usable
    assert not is_candidate(lsn, 23, tli_start=Lsn(0), segment_bytes=MIB)


@pytest.mark.parametrize(("before", "usable"), [(0, False), (112, False), (120, True), (4000, True)])
def test_the_checkpoint_belongs_to_the_same_tli(before: int, usable: bool) -> None:
    wal, record = record_at(4400)
    tli_start = Lsn(record.start - before)
    assert is_candidate(Lsn(record.start), 90, tli_start=tli_start, segment_bytes=MIB) == usable
    if usable:
        check(wal, record.start, tli_start=tli_start)
    else:
        with pytest.raises(WalFormatError, match="tli starts"):
            check(wal, record.start, tli_start=tli_start)


def test_a_page_may_carry_an_ancestor_s_tli_but_no_descendant_s() -> None:
    """A new tli goes on with its parent's last page (EDGE 17)."""
    wal, record = record_at(4000, tli=3)
    check(wal, record.start, tli=3)
    check(wal, record.start, tli=5)
    with pytest.raises(WalFormatError, match="tli 3, expected 2"):
        check(wal, record.start, tli=2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict.fromkeys([-4000], 0xFF), "written by Postgres 15"),  # magic
        (dict.fromkeys([-4000 + 9], 0xFF), "header of this page"),  # address
        ({-4000 + 4: 0}, "page of tli 0"),
        ({0: 3, 1: 0}, "record length 3"),
        ({30: 0xEE}, "checksum"),
        ({20: 0xEE}, "checksum"),
    ],
)
def test_bytes_that_are_not_what_they_should_be(change: dict[int, int], said: str) -> None:
    wal, record = record_at(4000)
    for offset, byte in change.items():
        wal.wal[record.start - SEGMENT + offset] = byte
    before = bytes(wal.wal)
    with pytest.raises(WalFormatError, match=said):
        check(wal, record.start)
    with pytest.raises(WalFormatError, match=said):
        patch(wal, record.start)
    assert wal.wal == before


def test_wal_of_another_major_or_cluster_is_refused() -> None:
    wal, record = record_at(4000)
    with pytest.raises(WalFormatError, match="written by Postgres 16"):
        check(wal, record.start, major=16)
    wal.wal[24] ^= 1
    with pytest.raises(WalFormatError, match="another cluster"):
        patch(wal, record.start)


def test_the_page_and_the_record_must_be_at_hand() -> None:
    wal, record = record_at(4000)
    page = SEGMENT + PAGE
    for start, end in ((page + 8, len(wal.wal)), (SEGMENT, record.start - SEGMENT + 30), (SEGMENT, PAGE)):
        part = wal.wal[start - SEGMENT : end]
        with pytest.raises(WalFormatError, match=r"at hand|page is not"):
            check_redo_point(
                part, Lsn(start), Lsn(record.start), tli=1, tli_start=Lsn(0), segment_bytes=MIB, major=15
            )
    # The page alone suffices; nothing before it is asked for.
    check_redo_point(
        wal.wal[PAGE:], Lsn(page), Lsn(record.start), tli=1, tli_start=Lsn(0), segment_bytes=MIB, major=15
    )


# --- finding one ---------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 12_000), min_size=1, max_size=60), st.data())
@settings(deadline=None, max_examples=60)
def test_finding_is_checking_every_record(sizes: list[int], data: st.DataObject) -> None:
    wal = WalBuilder(SEGMENT - 2 * PAGE)
    for size in sizes:
        wal.append(21, 0, main=bytes(size))
    usable = []
    for record in wal.records:
        length = len(read_record(wal.wal, Lsn(wal.start), Lsn(record.start), MIB))
        if is_candidate(Lsn(record.start), length, tli_start=Lsn(0), segment_bytes=MIB):
            check(wal, record.start)
            usable.append(record.start)
        else:
            with pytest.raises(WalFormatError):
                check(wal, record.start)
    latest = data.draw(st.integers(wal.start, wal.lsn + PAGE))
    assert find(wal, latest) == max((lsn for lsn in usable if lsn <= latest), default=None)


def test_finding_skips_what_is_damaged_and_stops_at_the_tli_s_start() -> None:
    wal, record = record_at(4000)
    good = wal.records[-1].start
    assert find(wal, wal.lsn) == good
    wal.wal[good - SEGMENT + 25] ^= 1
    assert find(wal, wal.lsn) == record.start
    assert find(wal, wal.lsn, tli_start=record.start) is None


def test_after_a_switch_the_rest_of_the_segment_holds_none() -> None:
    wal, record = record_at(4000)
    switch = wal.append(0, 0x40)
    assert wal.lsn == SEGMENT + MIB
    assert find(wal, wal.lsn - 1) == switch.start > record.start


# --- the control file ----------------------------------------------------------------------------


@pytest.mark.parametrize("major", VERSIONS)
def test_control(major: int) -> None:
    lsn = Lsn(SEGMENT + 0x4000)
    made = parse_control(control_for(lsn, tli=4, major=major))
    of_image = parse_control(image(major, lsn))
    assert made.state is ClusterState.SHUT_DOWN_IN_RECOVERY
    assert made.checkpoint_lsn == made.redo == lsn - 120
    assert (made.min_recovery_point, made.min_recovery_point_tli) == (lsn, 4)
    assert (made.backup_start_point, made.backup_end_point, made.backup_end_required) == (0, 0, False)
    assert made.parameters == PARAMETERS
    assert made.checkpoint == dataclasses.replace(
        of_image.checkpoint,
        redo=Lsn(lsn - 120),
        tli=4,
        prev_tli=4,
        full_page_writes=False,
        wal_level=2 if major >= 17 else None,
    )
    assert made.checkpoint.next_multi == 55
    kept = {"system_identifier", "catalog_version", "segment_bytes", "unlogged_lsn", "time", "major"}
    assert all(getattr(made, name) == getattr(of_image, name) for name in kept)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"state": 6}, r"not shut down cleanly \(IN_PRODUCTION\)"),
        ({"state": 2}, r"not shut down cleanly \(SHUT_DOWN_IN_RECOVERY\)"),
        ({"tli": 1}, "not promoted"),
        ({"redo": SEGMENT}, "own redo point"),
        ({"checkpoint_lsn": SEGMENT, "redo": SEGMENT}, "checkpoint after"),
        ({"oldest_active_xid": 5}, "no transaction"),
        ({"backup_end_required": 1}, "no backup"),
        ({"control_version": 1900}, "control version 1900"),
    ],
)
def test_images_that_are_none(change: dict[str, int], said: str) -> None:
    with pytest.raises(FormatError, match=said):
        redo_point_control(
            image(15, SEGMENT, **change), SEGMENT, tli=1, parameters=PARAMETERS, full_page_writes=True
        )


def test_patches_are_made_for_such_a_control_file_only() -> None:
    wal, record = record_at(4000)
    with pytest.raises(FormatError, match="made for a synthetic redo point"):
        redo_point_patches(wal.wal, SEGMENT, image(15, record.start), tli_start=Lsn(0))
    for change in (
        {"checkpoint_lsn": record.start - 112},
        {"redo": record.start - 112},
        {"min_recovery_point": record.start + 8},
        {"min_recovery_point_tli": 2},
    ):
        values = {
            "state": 2,
            "checkpoint_lsn": record.start - 120,
            "redo": record.start - 120,
            "min_recovery_point": record.start,
            "min_recovery_point_tli": 9,
        }
        with pytest.raises(FormatError, match="made for a synthetic redo point"):
            redo_point_patches(
                wal.wal, SEGMENT, image(15, record.start, **{**values, **change}), tli_start=Lsn(0)
            )


# --- the WAL -------------------------------------------------------------------------------------


@pytest.mark.parametrize("major", VERSIONS)
@pytest.mark.parametrize("offset", [24 + 128, 4000, PAGE - 24, PAGE - 16, PAGE - 8])
@pytest.mark.parametrize("size", [40, 3 * PAGE])
def test_replay_would_begin_there(major: int, offset: int, size: int) -> None:
    """The forged checkpoint is the one of pg_control, and the record follows it, over any page ends (EDGE 53)."""
    wal, record = record_at(offset, size=size, major=major, tli=4)
    before = bytes(wal.wal)
    patch(wal, record.start)
    start = Lsn(record.start - FORGED_BYTES)
    # Every link and length from the checkpoint on, as a reader of WAL sees them.
    scanner = WalScanner(MIB, 4, start, major=major)
    result = scanner.feed(wal.wal[start - SEGMENT :])
    assert result.records == 3
    checkpoint = result.events[0]
    assert (checkpoint.kind, checkpoint.start, checkpoint.end) == (
        RecordKind.CHECKPOINT,
        start,
        record.start,
    )
    body = read_record(wal.wal, SEGMENT, start, MIB)
    assert len(body) == 114
    assert struct.unpack_from("<IIQBB", body) == (114, 0, 0, 0, 0)
    control = parse_control(control_for(record.start, tli=4, major=major))
    assert parse_checkpoint(body[26:], major) == control.checkpoint
    # The record is the same but for its link and checksum, and nothing else has changed.
    linked = read_record(wal.wal, SEGMENT, Lsn(record.start), MIB)
    original = read_record(before, SEGMENT, Lsn(record.start), MIB)
    assert struct.unpack_from("<Q", linked, 8) == (start,)
    assert linked[:8] + linked[16:20] + linked[24:] == original[:8] + original[16:20] + original[24:]
    changed = [n for n, (a, b) in enumerate(zip(before, wal.wal, strict=True)) if a != b]
    assert start <= SEGMENT + changed[0]
    header_end = record.start + 24 if offset <= PAGE - 24 else record.start + 48
    assert SEGMENT + changed[-1] < header_end


def test_patching_again_changes_nothing() -> None:
    wal, record = record_at(4000)
    patch(wal, record.start)
    once = bytes(wal.wal)
    patch(wal, record.start)
    assert wal.wal == once


@pytest.mark.parametrize("offset", [24 + 120, 0, 64])
def test_too_near_to_the_page_s_start(offset: int) -> None:
    wal, record = record_at(offset)
    with pytest.raises(WalFormatError, match="too near to the start of its page"):
        patch(wal, record.start)


def test_a_record_into_the_next_segment_is_no_redo_point() -> None:
    """EDGE 53."""
    wal = WalBuilder(Lsn(SEGMENT - 2 * PAGE))
    wal.fill_to(0)
    wal.fill_to(PAGE - 48)
    record = wal.append(HEAP, 0, main=b"m" * 100)
    assert record.start < SEGMENT < record.end
    with pytest.raises(WalFormatError, match="next segment"):
        patch(wal, record.start)


def test_a_forged_noop_can_be_the_first_record() -> None:
    """Nothing to replay after S (EDGE 58)."""
    wal, record = record_at(4000)
    noop = noop_record(
        Lsn(record.end),
        previous=Lsn(record.start),
        tli=1,
        major=15,
        system_identifier=SYSTEM,
        segment_bytes=MIB,
    )
    room = bytearray(wal.wal) + bytes(PAGE)
    apply_patches(room, SEGMENT, [noop.patch])
    patches = redo_point_patches(room, SEGMENT, control_for(noop.start), tli_start=Lsn(0))
    apply_patches(room, SEGMENT, patches)
    assert struct.unpack_from("<Q", read_record(room, SEGMENT, noop.start, MIB), 8) == (noop.start - 120,)
