"""What the prefetcher looks at, and that it reads it."""

from __future__ import annotations

from pathlib import Path

from restore.mount_control import BlockRange
from restore.plan import SegmentFile
from restore.prefetch import WINDOW_BYTES, batches, status_files, windows
from restore.replay_reads import ReplayReads
from restore.replay_task import ReplayTask
from tests.support.manual_clock import ManualClock
from timeline.lsn import Lsn

MIB = 1 << 20


def test_the_newest_status_files(tmp_path: Path) -> None:
    (tmp_path / "pg_xact").mkdir()
    for name in ("0000", "0001", "000A"):
        (tmp_path / "pg_xact" / name).touch()
    assert list(status_files(tmp_path)) == [BlockRange("pg_xact/000A", 0, 32)]


def test_windows_begin_at_the_redo_point_and_end_with_the_wal(tmp_path: Path) -> None:
    """In order, without a hole, cut at multiples of their size, wherever the segments are by then."""
    begin, size = Lsn(32 * MIB), 16 * MIB
    feed, wal = tmp_path / "feed", tmp_path / "wal"
    feed.mkdir()
    wal.mkdir()
    content = bytes(range(256)) * (2 * size // 256)
    (wal / "first").write_bytes(content[:size])
    (feed / "second").write_bytes(content[size:])
    end = begin + size + 5 * MIB
    task = ReplayTask(
        places=(str(feed), str(wal)),
        segments=(
            SegmentFile("first", begin, Lsn(begin + size)),
            SegmentFile("second", Lsn(begin + size), Lsn(end)),
        ),
        redo=Lsn(begin + 6 * MIB),
        segment_bytes=size,
        relation_segment_bytes=1 << 30,
        tablespace_directory="PG_15_202209061",
        near=True,
    )
    at = int(task.redo)
    told = []
    for start, part, more in windows(task, ManualClock()):
        told.append(more)
        assert start == at and 0 < len(part) <= WINDOW_BYTES
        assert part == content[at - begin : at - begin + len(part)]
        at += len(part)
        assert at % WINDOW_BYTES == 0 or at == end
    assert at == end
    assert told == [True] * (len(told) - 1) + [False]
    (feed / "second").rename(tmp_path / "second")
    _, _, more = next(windows(task, ManualClock()))
    assert not more, "the next segment is still to come"


def test_it_is_told_before_the_mount_stands(tmp_path: Path) -> None:
    """And before there is any WAL: it waits for both."""
    data, wal = tmp_path / "data", tmp_path / "wal"
    data.mkdir()
    wal.mkdir()
    size = 16 * MIB

    class Clock(ManualClock):
        """Whoever waits sees the mount come, and then a segment."""

        def pause(self, seconds: float) -> None:
            if not (data / "PG_VERSION").exists():
                (data / "pg_xact").mkdir()
                (data / "pg_xact" / "0000").touch()
                (data / "PG_VERSION").touch()
            else:
                (wal / "first").write_bytes(bytes(size))

    task = ReplayTask(
        places=(str(wal),),
        segments=(SegmentFile("first", Lsn(size), Lsn(2 * size)),),
        redo=Lsn(size),
        segment_bytes=size,
        relation_segment_bytes=1 << 30,
        tablespace_directory="PG_15_202209061",
        near=False,
    )
    reads = ReplayReads(size, 1 << 30, "PG_15_202209061")
    assert list(batches(task, data, reads, Clock())) == [[BlockRange("pg_xact/0000", 0, 32)]]
