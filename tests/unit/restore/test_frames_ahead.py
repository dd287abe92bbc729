"""Extents that a replay will want: few requests, in its order, none twice, bounded."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from restore import frames_ahead
from restore.extent_runs import MAX_GAP_BYTES, coalesce
from restore.frames_ahead import LONGEST_GAP_BYTES, REQUEST_COST_SECONDS, WORKERS, FramesAhead, Pace
from tests.support.manual_clock import ManualClock
from timeline.errors import Unavailable
from timeline.format import keys
from timeline.format.extent import ExtentRef

STORED = 10_000
NOISE = random.Random(5).randbytes(1 << 20)


def extent(pack: str, number: int, *, apart: int = STORED) -> ExtentRef:
    """The ``number``-th extent of a pack in which they begin so far apart."""
    digest = f"{number}/{pack}".ljust(32).encode()
    return ExtentRef(0, 8192, pack, number * apart, STORED, digest)


class Bench:
    """Frames over a store that counts, and answers when it may."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, int]] = []
        self.most_at_once = self.at_once = 0
        self.open = asyncio.Event()
        self.open.set()
        self.broken: set[str] = set()
        self.clock = ManualClock()
        self.frames = FramesAhead(self.get, Pace(), self.clock)

    async def get(self, key: str, start: int, length: int) -> bytes:
        self.asked.append((key, start, length))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await self.open.wait()
            if key in self.broken:
                raise Unavailable("away")
            return NOISE[start : start + length]
        finally:
            self.at_once -= 1

    async def settled(self) -> None:
        """Until nothing is under way."""
        await asyncio.gather(*self.frames._workers)


def run(work: Callable[[Bench], Awaitable[None]]) -> None:
    async def main() -> None:
        bench = Bench()
        await work(bench)
        await bench.frames.aclose()

    asyncio.run(main())


def test_close_together_is_one_request() -> None:
    """The gaps in between are read, and not kept."""

    async def work(bench: Bench) -> None:
        refs = [extent("aa", number, apart=STORED + MAX_GAP_BYTES) for number in (0, 1, 2, 9)]
        bench.frames.begin(refs)
        await bench.settled()
        assert len(bench.asked) == 2
        for ref in refs:
            assert bench.frames.take(ref, keep=False) == NOISE[ref.offset : ref.offset + STORED]
            assert bench.frames.take(ref, keep=False) is None
        assert bench.frames._bytes == 0

    run(work)


def test_in_the_order_in_which_they_are_wanted() -> None:
    async def work(bench: Bench) -> None:
        packs = [f"{number:02x}" for number in range(WORKERS + 20)]
        random.Random(1).shuffle(packs)
        bench.open.clear()
        bench.frames.begin([extent(pack, 0) for pack in packs])
        await asyncio.sleep(0.01)
        assert bench.most_at_once == WORKERS
        bench.open.set()
        await bench.settled()
        assert [key for key, _, _ in bench.asked] == [keys.pack(pack) for pack in packs]

    run(work)


def test_whoever_waits_comes_next_and_asks_nothing_twice() -> None:
    async def work(bench: Bench) -> None:
        refs = [extent(f"{number:02x}", 0) for number in range(WORKERS + 20)]
        bench.open.clear()
        bench.frames.begin(refs)
        await asyncio.sleep(0)
        waiting = asyncio.create_task(bench.frames.wait(refs[-1].digest))
        await asyncio.sleep(0)
        assert not waiting.done()
        bench.open.set()
        assert await waiting
        assert bench.frames.take(refs[-1], keep=False) is not None
        await bench.settled()
        assert bench.asked[WORKERS][0] == keys.pack(refs[-1].pack)
        assert len(bench.asked) == len(refs)
        assert not await bench.frames.wait(refs[-1].digest)

    run(work)


def test_what_fails_is_left_to_whoever_needs_it() -> None:
    async def work(bench: Bench) -> None:
        bad, good = extent("aa", 0), extent("bb", 0)
        bench.broken.add(keys.pack("aa"))
        bench.frames.begin([bad, good])
        waiting = asyncio.create_task(bench.frames.wait(bad.digest))
        await bench.settled()
        await waiting
        assert bench.frames.take(bad, keep=False) is None and bad.digest not in bench.frames
        assert bench.frames.take(good, keep=False) is not None

    run(work)


def test_what_nobody_asks_for_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """P9: what was asked for, and waits for the disk cache, goes first; then what is old; else more is given up."""
    monkeypatch.setattr(frames_ahead, "FRAMES_BYTES", 3 * STORED)

    async def work(bench: Bench) -> None:
        first = [extent(f"0{number}", 0) for number in range(3)]
        bench.frames.begin(first)
        await bench.settled()
        assert bench.frames.take(first[0], keep=True) is not None
        assert bench.frames._bytes == 3 * STORED
        bench.frames.begin([extent("aa", 0)])
        await bench.settled()
        assert bench.frames.pop_taken() is None
        # No room: given up after a while, by which the oldest are old.
        late = extent("bb", 0)
        bench.frames.begin([late])
        await bench.settled()
        assert late.digest in bench.frames and first[1].digest not in bench.frames
        assert bench.frames._bytes <= 3 * STORED

    run(work)


def test_a_gap_is_read_over_where_bytes_come_fast() -> None:
    large = 1 << 20
    pace = Pace()
    assert pace.gap_bytes == MAX_GAP_BYTES
    pace.note(large, 0.030, large)
    assert pace.gap_bytes == MAX_GAP_BYTES, "the wait for the first byte is not known"
    pace.note(100, 0.020, 100)
    assert pace.gap_bytes == int(large / 0.010 * REQUEST_COST_SECONDS)
    pace.note(large, 1.0, large)
    assert pace.gap_bytes == int(large / 0.010 * REQUEST_COST_SECONDS), "slower than it could be"
    pace.note(large, 0.025, large)
    assert pace.gap_bytes == LONGEST_GAP_BYTES
    first_of_all = Pace()
    first_of_all.note(100, 0.400, 100)
    first_of_all.note(large, 0.350, large)
    first_of_all.note(100, 0.050, 100)
    assert first_of_all.gap_bytes == MAX_GAP_BYTES, "the first wait was for more than the first byte"
    slow = Pace()
    slow.note(100, 0.020, 100)
    slow.note(large, 1.0, large)
    assert slow.gap_bytes == MAX_GAP_BYTES
    slow.note(large, 1.0, 40 * large)
    assert slow.gap_bytes == int(40 * large / 0.980 * REQUEST_COST_SECONDS), "forty at once share the line"


def test_runs_are_bounded() -> None:
    refs = [extent("aa", number) for number in range(30)]
    runs = coalesce(refs[::-1], max_gap_bytes=0, max_run_bytes=10 * STORED)
    assert [len(run) for run in runs] == [10, 10, 10]
    assert runs[0][0] == refs[0]


def test_an_extent_asked_for_twice_is_fetched_and_counted_once() -> None:
    """Whoever comes back before the disk cache has it finds it."""

    async def work(bench: Bench) -> None:
        ref = extent("aa", 0)
        for _ in range(3):
            if ref.digest not in bench.frames:
                bench.frames.begin([ref])
            await bench.settled()
            assert bench.frames.take(ref, keep=True) is not None
        assert len(bench.asked) == 1
        assert bench.frames._bytes == STORED
        assert bench.frames.pop_taken() is not None
        assert bench.frames._bytes == 0

    run(work)


def test_whoever_waits_does_not_wait_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames_ahead, "FRAMES_BYTES", 2 * STORED)

    async def work(bench: Bench) -> None:
        first, last, needed = (extent(pack, 0) for pack in ("aa", "bb", "cc"))
        bench.frames.begin([first, last])
        await bench.settled()
        bench.frames.begin([needed])
        before = bench.clock.monotonic()
        assert await bench.frames.wait(needed.digest)
        assert bench.clock.monotonic() - before < 1
        assert needed.digest in bench.frames and first.digest in bench.frames
        assert last.digest not in bench.frames

    run(work)


def test_more_may_be_begun_in_the_step_in_which_all_workers_end() -> None:
    async def work(bench: Bench) -> None:
        bench.open.clear()
        first = [extent(f"{number:02x}", 0) for number in range(WORKERS)]
        bench.frames.begin(first)
        waiting = asyncio.create_task(bench.frames.wait(first[-1].digest))
        await asyncio.sleep(0)
        bench.open.set()
        await waiting
        late = extent("zz", 0)
        bench.frames.begin([late])
        async with asyncio.timeout(5):
            assert await bench.frames.wait(late.digest)
        assert late.digest in bench.frames

    run(work)
