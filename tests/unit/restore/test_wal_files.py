"""Segment files of a branch: whole, zero beyond T, of the right tli, and never with a tablespace's path."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import struct
import subprocess
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import google_crc32c
import pytest

from restore.host import Host, find_host
from restore.plan import BranchPlan, SegmentFile, WalSpan
from restore.wal_creates import find_creates
from restore.wal_files import FEED_AHEAD, Feed, feed_wal, write_wal
from tests.unit.restore.test_plan import plan
from timeline.clock import SystemClock
from timeline.errors import TimelineError
from timeline.lsn import Lsn
from timeline.pg.wal_patch import read_record

MIB = 1 << 20
PAGE = 8192
PATH = b"/srv/production/space\0"


def blank_wal(start: int, length: int) -> bytearray:
    """Pages with headers and bodies of 0xAA."""
    wal = bytearray(b"\xaa" * length)
    for offset in range(0, length, PAGE):
        at = start + offset
        long = at % MIB == 0
        header = struct.pack("<HHIQI4x", 0xD110, 2 if long else 0, 1, at, 0)
        header += struct.pack("<QII", 7, MIB, PAGE) if long else b""
        wal[offset : offset + len(header)] = header
    return wal


def put_create(wal: bytearray, start: int, at: int, path: bytes = PATH) -> None:
    """Write a Tablespace/CREATE record at LSN ``at``, across page headers."""
    body = bytes([255, 4 + len(path)]) + struct.pack("<I", 16401) + path
    head = struct.pack("<IIQBBH", 24 + len(body), 1, at - 64, 0, 5, 0)
    crc = google_crc32c.extend(google_crc32c.value(body), head)
    record = head + struct.pack("<I", crc) + body
    lsn = at
    for number, byte in enumerate(record):
        if lsn % PAGE == 0:
            wal[lsn - start + 2] |= 1
            struct.pack_into("<I", wal, lsn - start + 16, len(record) - number)
            lsn += 40 if lsn % MIB == 0 else 24
        wal[lsn - start] = byte
        lsn += 1


@pytest.fixture
def host(tmp_path: Path) -> Host:
    made = find_host({**os.environ, "TL_STATE": str(tmp_path / "state")})
    return dataclasses.replace(made, switches_user=False)


def reader_of(wal: bytes, start: int, piece_bytes: int = 100_003):  # type: ignore[no-untyped-def]
    async def read(spans: Sequence[WalSpan]) -> AsyncGenerator[tuple[Lsn, bytes], None]:
        position, last = int(spans[0].start), int(spans[-1].end)
        while position < last:
            stop = min(position + piece_bytes, last)
            yield Lsn(position), bytes(wal[position - start : stop - start])
            position = stop

    return read


def write(made: BranchPlan, wal: bytes, start: int, directory: Path, host: Host) -> dict[str, bytes]:
    asyncio.run(write_wal(made, reader_of(wal, start), directory, host, creates=()))
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(
    "into_page", [24, 32, PAGE - 64, PAGE - 40, PAGE - 32, PAGE - 24, PAGE - 16, PAGE - 8]
)
def test_creations_are_found_wherever_their_header_lies(into_page: int) -> None:
    """EDGE 49: also when the record's header is cut by a page boundary."""
    start = 4 * MIB
    for page in (1, 5):
        at = start + page * PAGE + into_page
        wal = blank_wal(start, 8 * PAGE)
        put_create(wal, start, at)
        assert list(find_creates(bytes(wal), Lsn(start), MIB)) == [at]


def test_what_only_looks_like_a_creation_is_left() -> None:
    start = 4 * MIB
    wal = blank_wal(start, 4 * PAGE)
    put_create(wal, start, start + PAGE + 64)
    wal[PAGE + 64 + 40] ^= 1
    put_create(wal, start, start + 2 * PAGE + 64, path=b"\0")
    assert list(find_creates(bytes(wal), Lsn(start), MIB)) == []


@pytest.mark.parametrize("before_boundary", [8, 16, 24, 40, 48, 4096])
def test_a_creation_across_segments_is_blanked_in_both(
    before_boundary: int, tmp_path: Path, host: Host
) -> None:
    """EDGE 49, without any index to tell where it is."""
    made = plan(6 * MIB + 3 * PAGE)
    start = 5 * MIB
    wal = blank_wal(start, MIB + 3 * PAGE)
    at = 6 * MIB - before_boundary
    put_create(wal, start, at)
    directory = tmp_path / "wal"
    directory.mkdir()
    files = write(made, bytes(wal), start, directory, host)
    joined = files["000000010000000000000005"] + files["000000010000000000000006"]
    assert b"production" not in joined
    record = read_record(joined, Lsn(start), Lsn(at), MIB)
    assert record[24:30] == bytes([255, 4 + len(PATH)]) + struct.pack("<I", 16401)
    assert set(record[30:]) == {0}


def test_files_are_whole_and_zero_beyond_t(tmp_path: Path, host: Host) -> None:
    """EDGE 25, P6: bytes the reader has beyond T never get there."""
    t = 6 * MIB + 1234 * 8
    start = 5 * MIB
    wal = blank_wal(start, 2 * MIB)
    directory = tmp_path / "wal"
    directory.mkdir()
    files = write(plan(t), bytes(wal), start, directory, host)
    assert sorted(files) == ["000000010000000000000005", "000000010000000000000006"]
    assert {len(data) for data in files.values()} == {MIB}
    assert files["000000010000000000000005"] == wal[:MIB]
    assert files["000000010000000000000006"] == wal[MIB : t - start] + bytes(7 * MIB - t)


def test_bytes_of_two_tlis_make_one_file(tmp_path: Path, host: Host) -> None:
    """EDGE 17: the child's first segment holds the parent's bytes below the fork."""
    fork, t = 5 * MIB + 777 * 8, 5 * MIB + 900 * 8
    made = dataclasses.replace(
        plan(t),
        spans=(WalSpan(1, Lsn(5 * MIB), Lsn(fork)), WalSpan(2, Lsn(fork), Lsn(t))),
        segments=(SegmentFile("000000020000000000000005", Lsn(5 * MIB), Lsn(t)),),
    )
    parent, child = b"\x11" * MIB, b"\x22" * MIB

    async def read(spans: Sequence[WalSpan]) -> AsyncGenerator[tuple[Lsn, bytes], None]:
        for span in spans:
            yield span.start, {1: parent, 2: child}[span.tli][: span.end - span.start]

    directory = tmp_path / "wal"
    directory.mkdir()
    asyncio.run(write_wal(made, read, directory, host, creates=()))
    (path,) = directory.iterdir()
    assert path.name == "000000020000000000000005"
    assert path.read_bytes() == b"\x11" * (fork - 5 * MIB) + b"\x22" * (t - fork) + bytes(6 * MIB - t)


@pytest.mark.parametrize("missing", ["end", "middle"])
def test_wal_that_does_not_join_up_is_refused(missing: str, tmp_path: Path, host: Host) -> None:
    """P7: never a silently different state; and no file has its final name."""

    async def read(spans: Sequence[WalSpan]) -> AsyncGenerator[tuple[Lsn, bytes], None]:
        first, last = spans[0].start, spans[-1].end
        yield first, bytes(4096)
        if missing == "middle":
            yield Lsn(first + 8192), bytes(last - first - 8192)

    directory = tmp_path / "wal"
    directory.mkdir()
    with pytest.raises(TimelineError, match="WAL read"):
        asyncio.run(write_wal(plan(6 * MIB), read, directory, host, creates=()))
    assert not [path for path in directory.iterdir() if not path.name.startswith(".")]


def take(feed: Feed, name: str, data: Path, *, wait: bool = True) -> int:
    """Run restore_command as Postgres does: its exit code."""
    command = feed.restore_command.replace("%p", "pg_wal/RECOVERYXLOG").replace("%f", name).replace("%%", "%")
    return subprocess.run(["/bin/sh", "-c", command], cwd=data, check=False, timeout=60).returncode


def test_the_feed_hands_over_segments_and_then_ends(tmp_path: Path, host: Host) -> None:
    """Bounded ahead of Postgres; history files and what was handed over are left to pg_wal."""
    made = plan((5 + 3 * FEED_AHEAD) * MIB)
    wal = bytes(len(made.segments) * MIB)
    feed = Feed(tmp_path / "fe'ed 100%")
    feed.create(host)
    data = tmp_path / "data"
    (data / "pg_wal").mkdir(parents=True)

    async def run() -> None:
        feeding = asyncio.create_task(
            feed_wal(made, reader_of(wal, 5 * MIB, MIB), feed, host, SystemClock(), creates=())
        )
        for number, segment in enumerate(made.segments):
            assert await asyncio.to_thread(take, feed, segment.name, data) == 0
            (data / "pg_wal" / "RECOVERYXLOG").rename(data / "pg_wal" / segment.name)
            ready = [path for path in feed.directory.iterdir() if len(path.name) == 24]
            assert len(ready) <= FEED_AHEAD, number
            assert await asyncio.to_thread(take, feed, segment.name, data) == 1
        await feeding
        assert await asyncio.to_thread(take, feed, "00000001000000000000FFFF", data) == 1
        assert await asyncio.to_thread(take, feed, "00000002.history", data) == 1

    asyncio.run(run())


def test_the_feed_gives_up_when_its_process_is_dead(
    tmp_path: Path, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EDGE 57: no beat, no endless wait."""
    monkeypatch.setattr("restore.wal_files.BEAT_LIMIT_SECONDS", 0.3)
    feed = Feed(tmp_path / "feed")
    feed.create(host)
    began = time.monotonic()
    assert take(feed, "000000010000000000000005", tmp_path) == 1
    assert time.monotonic() - began < 10
