"""Short walks over ordinary WAL, against the scanner that knows all of it."""

from __future__ import annotations

import pytest

from tests.support.archived_wal import FIRST, MAJOR, NOON, SEGMENT_BYTES, Server
from tests.support.wal_builder import PAGE
from timeline.catalog import record_boundary
from timeline.catalog.record_boundary import Boundary, find_boundary
from timeline.lsn import Lsn
from timeline.pg.record_walk import WALK_BYTES, Walked, walk


def busy() -> Server:
    """Records of all sizes, over pages and a segment's end."""
    server = Server(1, FIRST)
    for number in range(40):
        server.fill((1, 8, 300, 5000, 8100, 8150, 20_000)[number % 7])
        server.commit(NOON + number, 100 + number)
    return server


def look(server: Server, start: int, at: int) -> Boundary | None:
    wal = server.bytes(start, server.end)
    return find_boundary(wal, Lsn(start), Lsn(at), segment_bytes=SEGMENT_BYTES, tli=1, major=MAJOR)


def walked(server: Server, start: int, at: int, end: int | None = None) -> Walked | None:
    wal = memoryview(server.bytes(start, server.end if end is None else end))
    return walk(wal, Lsn(start), Lsn(at), segment_bytes=SEGMENT_BYTES, major=MAJOR)


def test_every_place_is_what_the_scanner_says(monkeypatch: pytest.MonkeyPatch) -> None:
    server = busy()
    last = server.records[-2].end
    for begin in (FIRST, server.records[5].start, server.records[16].start):
        places = {
            *range(begin + 1, last, 67),
            *(one.start for one in server.records),
            *(one.end for one in server.records),
        }
        for at in sorted(place for place in places if begin < place <= last):
            short = walked(server, begin, at)
            found = look(server, begin, at)
            with monkeypatch.context() as patched:
                patched.setattr(record_boundary, "walk", lambda *args, **kwargs: None)
                assert look(server, begin, at) == found
            if short is not None:
                assert found is not None and short.end == found.lsn
    # Ordinary WAL is walked, but for the few places in the padding of a record.
    assert walked(server, FIRST, server.records[20].start + 8) is not None


def test_what_a_walk_comes_to() -> None:
    server = busy()
    one, two, three = server.records[:3]
    assert walked(server, one.start, two.start) == Walked(Lsn(one.start), Lsn(two.start), Lsn(two.start))
    assert walked(server, one.start, two.start + 8) == Walked(Lsn(one.start), Lsn(two.start), Lsn(two.end))
    assert walked(server, two.start, two.start + 8) == Walked(Lsn(0), Lsn(two.start), Lsn(two.end))
    assert walked(server, one.start, three.start) == Walked(
        Lsn(two.start), Lsn(three.start), Lsn(three.start)
    )


def test_a_record_that_ends_beyond_what_is_there_is_left_to_others() -> None:
    server = Server(1, FIRST)
    long = server.fill(50_000)
    server.fill(10)
    assert walked(server, long.start, long.start + 8, long.end - 8) is None
    assert walked(server, long.start, long.start + 8, long.end) is not None


def test_a_long_way_is_left_to_others() -> None:
    server = Server(1, FIRST)
    first = server.fill(10)
    while server.end - first.start <= WALK_BYTES + PAGE:
        server.fill(20_000)
    assert walked(server, first.start, first.start + WALK_BYTES) is not None
    assert walked(server, first.start, first.start + WALK_BYTES + 1) is None


@pytest.mark.parametrize(
    "kind", ["switch", "lost", "zeros", "previous", "ahead", "manager", "magic", "address"]
)
def test_what_is_out_of_the_ordinary_is_left_to_others(kind: str) -> None:
    """EDGE 24 and the like: the scanner knows what it means, or refuses it."""
    server = Server(1, FIRST)
    first = server.fill(10)
    if kind == "switch":
        server.builder.append(0, 0x40)
    elif kind == "lost":
        lost = server.builder.append(21, 0, main=bytes(20_000), cut=True)
        server.builder.append(0, 0xD0, main=lost.start.to_bytes(8, "little") + bytes(8))
    second, third = server.fill(9000), server.fill(10)
    wal = bytearray(server.bytes(first.start, server.end))
    if kind == "zeros":
        wal[second.start - first.start : second.start - first.start + 4] = bytes(4)
    elif kind == "previous":
        wal[third.start - first.start + 8] ^= 8
    elif kind == "ahead":
        wal[8 + 5] ^= 1
    elif kind == "manager":
        wal[third.start - first.start + 17] = 100
    elif kind == "magic":
        page = second.start + PAGE - second.start % PAGE
        wal[page - first.start] ^= 1
    elif kind == "address":
        page = second.start + PAGE - second.start % PAGE
        wal[page - first.start + 9] ^= 1
    assert (
        walk(
            memoryview(wal), Lsn(first.start), Lsn(third.start + 8), segment_bytes=SEGMENT_BYTES, major=MAJOR
        )
        is None
    )
