"""Which WAL a prefetcher looks at, what it asks for, and when it has enough."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from restore.mount_control import BlockRange
from restore.plan import SegmentFile
from restore.prefetch import WINDOW_BYTES, Warmer, Watch, batches, run, status_files, windows
from restore.replay_reads import ReplayReads
from restore.replay_task import ReplayTask
from tests.support.manual_clock import ManualClock
from timeline.format.value_json import to_json
from timeline.lsn import Lsn

MIB = 1 << 20
SIZE = 16 * MIB
VERSION = "PG_15_202209061"


def task_of(places: list[Path], redo: int, *segments: SegmentFile, near: bool = False) -> ReplayTask:
    return ReplayTask(tuple(map(str, places)), segments, Lsn(redo), SIZE, 1 << 30, VERSION, near)


@pytest.fixture
def watched(tmp_path: Path) -> Watch:
    """The replay goes on."""
    (tmp_path / "replay.json").touch()
    return Watch(tmp_path / "replay.json", ManualClock())


def test_the_newest_status_files(tmp_path: Path) -> None:
    (tmp_path / "pg_xact").mkdir()
    for name in ("0000", "0001", "000A"):
        (tmp_path / "pg_xact" / name).touch()
    assert list(status_files(tmp_path)) == [BlockRange("pg_xact/000A", 0, 32)]


def test_windows_begin_at_the_redo_point_and_end_with_the_wal(tmp_path: Path, watched: Watch) -> None:
    """In order, without a hole, cut at multiples of their size, wherever the segments are by then."""
    begin = Lsn(32 * MIB)
    feed, wal = tmp_path / "feed", tmp_path / "wal"
    feed.mkdir()
    wal.mkdir()
    content = bytes(range(256)) * (2 * SIZE // 256)
    (wal / "first").write_bytes(content[:SIZE])
    (feed / "second").write_bytes(content[SIZE:])
    end = begin + SIZE + 5 * MIB
    task = task_of(
        [feed, wal],
        begin + 6 * MIB,
        SegmentFile("first", begin, Lsn(begin + SIZE)),
        SegmentFile("second", Lsn(begin + SIZE), Lsn(end)),
    )
    at = int(task.redo)
    told = []
    for start, part, more in windows(task, watched):
        told.append(more)
        assert start == at and 0 < len(part) <= WINDOW_BYTES
        assert part == content[at - begin : at - begin + len(part)]
        at += len(part)
        assert at % WINDOW_BYTES == 0 or at == end
    assert at == end
    assert told == [True] * (len(told) - 1) + [False]
    (feed / "second").rename(tmp_path / "second")
    _, _, more = next(windows(task, watched))
    assert not more, "the next segment is still to come"


def test_it_waits_for_the_mount_and_for_wal(tmp_path: Path) -> None:
    data, wal = tmp_path / "data", tmp_path / "wal"
    data.mkdir()
    wal.mkdir()

    class Clock(ManualClock):
        """Whoever waits sees the mount come, and then a segment."""

        def pause(self, seconds: float) -> None:
            if not (data / "PG_VERSION").exists():
                (data / "pg_xact").mkdir()
                (data / "pg_xact" / "0000").touch()
                (data / "PG_VERSION").touch()
            else:
                (wal / "first").write_bytes(bytes(SIZE))

    (tmp_path / "replay.json").touch()
    task = task_of([wal], SIZE, SegmentFile("first", Lsn(SIZE), Lsn(2 * SIZE)))
    reads = ReplayReads(SIZE, 1 << 30, VERSION)
    watch = Watch(tmp_path / "replay.json", Clock())
    assert list(batches(task, data, reads, watch)) == [[BlockRange("pg_xact/0000", 0, 32)]]


@pytest.mark.parametrize(("near", "parts"), [(True, [1, 1, 1]), (False, [2, 1])])
def test_only_a_store_far_away_is_worth_waiting_for_more(
    tmp_path: Path, watched: Watch, monkeypatch: pytest.MonkeyPatch, near: bool, parts: list[int]
) -> None:
    """There the more is asked for at once, the fewer are the requests."""
    monkeypatch.setattr("restore.prefetch.BATCH_RANGES", 2)
    data = tmp_path / "data"
    data.mkdir()
    (data / "PG_VERSION").touch()
    names = ("first", "second", "third")
    segments = [
        SegmentFile(name, Lsn(number * SIZE), Lsn((number + 1) * SIZE))
        for number, name in enumerate(names, start=1)
    ]
    for name in names:
        (tmp_path / name).write_bytes(bytes(SIZE))

    class OneOfEach(ReplayReads):
        def of(self, wal: bytes, start: Lsn) -> list[BlockRange]:
            return [BlockRange("base/1/1", start // SIZE, 1)]

    task = task_of([tmp_path], SIZE, *segments, near=near)
    found = list(batches(task, data, OneOfEach(SIZE, 1 << 30, VERSION), watched))
    assert [len(batch) for batch in found] == parts
    assert [wanted.first_block for batch in found for wanted in batch] == [1, 2, 3]


def test_it_ends_when_the_replay_is_over(tmp_path: Path) -> None:
    """Though a segment it waits for never came: nobody needs it any more."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "PG_VERSION").touch()
    file = tmp_path / "replay.json"
    task = task_of([tmp_path], SIZE, SegmentFile("first", Lsn(SIZE), Lsn(2 * SIZE)), near=True)
    file.write_text(json.dumps(to_json(task)))

    class Clock(ManualClock):
        pauses = 0

        def pause(self, seconds: float) -> None:
            self.pauses += 1
            if self.pauses == 3:
                file.unlink()

    clock = Clock()
    assert run(file, str(data), clock) == 0
    assert clock.pauses == 3


def test_what_is_read_is_counted_and_what_is_not_there_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(3 * 8192))
    task = tmp_path / "replay.json"
    task.touch()
    wanted = [
        BlockRange("file", 0, 1),
        BlockRange("gone", 0, 1),
        BlockRange("file", 2, 9),
        BlockRange("file", 7, 1),
    ]
    with Warmer(tmp_path, task) as warmer:
        warmer.read(wanted)
        assert warmer.count == 2
        task.unlink()
        warmer.read(wanted)
        assert warmer.count == 2, "the replay is over"
