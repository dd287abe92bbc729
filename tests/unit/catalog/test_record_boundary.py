"""The boundary that stands for an LSN, against every record laid down (P6)."""

from __future__ import annotations

from tests.support.archived_wal import FIRST, MAJOR, NOON, SEGMENT_BYTES, Server, canonical
from tests.support.wal_builder import PAGE
from timeline.catalog.record_boundary import Boundary, find_boundary
from timeline.lsn import Lsn


def look(server: Server, start: int, at: int, end: int | None = None) -> Boundary | None:
    return find_boundary(
        server.bytes(start, server.end if end is None else end),
        Lsn(start),
        Lsn(at),
        segment_bytes=SEGMENT_BYTES,
        tli=1,
        major=MAJOR,
    )


def test_every_lsn_of_wal_with_records_of_all_sizes() -> None:
    server = Server(1, FIRST)
    for number in range(24):
        server.fill((1, 8, 300, 5000, 8100, 8150, 20_000)[number % 7])
        server.commit(NOON + number, 100 + number)
    last = server.records[-2].end
    for begin in (server.records[0], server.records[9]):
        for at in range(begin.start + 1, last, 61):
            before = [record for record in server.records if record.start < at][-1]
            found = look(server, begin.start, at)
            assert found is not None
            assert found.last_record == before.start
            assert found.lsn >= at
            assert canonical(found.lsn) == canonical(before.end)


def test_inside_a_page_header_nothing_starts() -> None:
    server = Server(1, FIRST)
    server.fill(10)
    server.builder.fill_to(0)
    last = server.records[-1]
    following = server.fill(100)
    assert last.end % PAGE == 0 and following.start == last.end + 24
    for at in range(last.end, following.start + 1, 8):
        assert look(server, FIRST, at) == Boundary(Lsn(at), Lsn(last.start))
    assert look(server, FIRST, following.start + 8) == Boundary(Lsn(following.end), Lsn(following.start))


def test_the_end_of_the_record_must_be_in_reach() -> None:
    server = Server(1, FIRST)
    server.fill(10)
    long = server.fill(50_000)
    assert look(server, FIRST, long.start + 8, long.end - 8) is None
    found = look(server, FIRST, long.start + 8, long.end)
    assert found == Boundary(Lsn(long.end), Lsn(long.start))


def test_a_record_lost_in_a_crash_is_none() -> None:
    """EDGE 24: the server overwrote its continuation; nobody replays it."""
    server = Server(1, FIRST)
    first = server.fill(10)
    lost = server.builder.append(21, 0, main=bytes(20_000), cut=True)
    page = server.end - server.end % PAGE
    main = lost.start.to_bytes(8, "little") + bytes(8)
    overwrite = server.builder.append(0, 0xD0, main=main)
    server.fill(10)
    for at in (lost.start + 8, lost.start + 100, page):
        found = look(server, FIRST, at)
        assert found is not None
        assert found.last_record == first.start
        assert found.lsn == at
    found = look(server, FIRST, overwrite.end)
    assert found is not None and found.last_record == overwrite.start
