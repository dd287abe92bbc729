"""Extents from packs: one request for each, verified, patient, bounded."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from restore import fetcher as fetcher_module
from restore.extent_memory import AHEAD_BYTES, MEMORY_BYTES
from restore.fetcher import MAX_BACKGROUND
from restore.frames_ahead import Pace
from tests.support.fetcher_bench import NOISE, Bench, put_extents, raws, with_bench
from timeline.errors import DamagedStore, Unavailable
from timeline.format import keys
from timeline.format.extent import GROUP_BYTES, ExtentRef
from timeline.store.faulty import Call, Faults


def test_one_request_for_any_number_of_callers() -> None:
    async def work(bench: Bench) -> None:
        [ref] = await put_extents(bench.memory, raws(1))
        bench.gate.open.clear()
        waiting = [asyncio.ensure_future(bench.fetcher.fetch(ref)) for _ in range(20)]
        await asyncio.sleep(0.01)
        bench.gate.open.set()
        assert set(await asyncio.gather(*waiting)) == set(raws(1))
        assert bench.gate.gets == 1
        assert await bench.fetcher.fetch(ref) == raws(1)[0]
        assert bench.gate.gets == 1

    with_bench(work)


def test_neighbours_come_in_one_request() -> None:
    async def work(bench: Bench) -> None:
        refs = await put_extents(bench.memory, raws(7))
        found = await asyncio.gather(*(bench.fetcher.fetch(ref) for ref in refs))
        assert list(found) == raws(7)
        assert bench.gate.gets == 1

    with_bench(work)


def test_far_ones_do_not() -> None:
    async def work(bench: Bench) -> None:
        refs = await put_extents(bench.memory, raws(30))
        await asyncio.gather(bench.fetcher.fetch(refs[0]), bench.fetcher.fetch(refs[29]))
        assert bench.gate.gets == 2
        assert bench.counters.fetched_bytes == refs[0].stored_bytes + refs[29].stored_bytes

    with_bench(work)


def test_cancelled_caller_does_not_take_the_others_along() -> None:
    async def work(bench: Bench) -> None:
        [ref] = await put_extents(bench.memory, raws(1))
        bench.gate.open.clear()
        one = asyncio.ensure_future(bench.fetcher.fetch(ref))
        two = asyncio.ensure_future(bench.fetcher.fetch(ref))
        await asyncio.sleep(0)
        one.cancel()
        bench.gate.open.set()
        assert await two == raws(1)[0]
        assert one.cancelled()

    with_bench(work)


def test_patience_outlasts_a_store_that_comes_back() -> None:
    """EDGE 51."""

    async def work(bench: Bench) -> None:
        [ref] = await put_extents(bench.memory, raws(1))
        failures = iter([Unavailable("away")] * 4)
        bench.gate.fail = lambda _: next(failures, None)
        assert await bench.fetcher.fetch(ref) == raws(1)[0]
        assert bench.gate.gets == 5
        assert bench.counters.failures == 4

    with_bench(work)


def test_patience_ends() -> None:
    """EDGE 51: an error after a bounded time; and the next reader tries anew."""

    async def work(bench: Bench) -> None:
        [ref] = await put_extents(bench.memory, raws(1))
        bench.gate.fail = lambda _: Unavailable("away")
        with pytest.raises(Unavailable):
            await bench.fetcher.fetch(ref)
        assert bench.clock.slept < 10.0
        bench.gate.fail = lambda _: None
        assert await bench.fetcher.fetch(ref) == raws(1)[0]

    with_bench(work)


def test_what_is_let_go_is_fetched_again() -> None:
    """P9: without a disk cache, from the store; the bounds count what is really held."""

    async def work(bench: Bench) -> None:
        refs = await put_extents(bench.memory, raws(3))
        await bench.fetcher.fetch(refs[0])
        bench.fetcher.prefetch(refs[1:])
        await bench.fetcher.aclose()
        bench.fetcher.let_go()
        assert [bench.fetcher.peek(ref, 0, ref.raw_bytes) for ref in refs] == [None] * 3
        gets = bench.gate.gets
        assert await bench.fetcher.fetch(refs[2]) == raws(3)[2]
        assert bench.gate.gets == gets + 1

    with_bench(work)


def test_store_that_never_answers_counts_as_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetcher_module, "REQUEST_SECONDS", 0.05)

    async def work(bench: Bench) -> None:
        [ref] = await put_extents(bench.memory, raws(1))
        bench.gate.open.clear()
        with pytest.raises(Unavailable, match="no answer"):
            await bench.fetcher.fetch(ref)

    with_bench(work, patience=0.05)


def test_wrong_bytes_are_fetched_once_more_and_then_refused() -> None:
    """P5."""

    async def once(bench: Bench) -> None:
        [ref] = await put_extents(bench.memory, raws(1))
        bench.store.faults = Faults(flipped_bit=1.0)

        def mend(_: Call) -> None:
            if bench.gate.gets == 2:
                bench.store.faults = Faults()

        bench.gate.fail = mend
        assert await bench.fetcher.fetch(ref) == raws(1)[0]
        assert bench.gate.gets == 2

    async def always(bench: Bench) -> None:
        [ref] = await put_extents(bench.memory, raws(1))
        bench.store.faults = Faults(flipped_bit=1.0)
        with pytest.raises(DamagedStore) as refused:
            await bench.fetcher.fetch(ref)
        assert refused.value.key == keys.pack(ref.pack)
        assert refused.value.offset == ref.offset
        assert bench.gate.gets == 2

    with_bench(once)
    with_bench(always)


def test_one_damaged_extent_spares_its_neighbours() -> None:
    async def work(bench: Bench) -> None:
        refs = await put_extents(bench.memory, raws(3))
        wrong = replace(refs[1], digest=bytes(32))
        found = await asyncio.gather(
            *(bench.fetcher.fetch(ref) for ref in (refs[0], wrong, refs[2])), return_exceptions=True
        )
        assert found[0] == raws(3)[0]
        assert isinstance(found[1], DamagedStore)
        assert found[2] == raws(3)[2]

    with_bench(work)


def test_read_ahead_is_bounded_and_what_was_fetched_is_not_lost() -> None:
    async def work(bench: Bench) -> None:
        refs = await put_extents(bench.memory, raws(300))
        taken = bench.fetcher.prefetch(refs)
        assert taken == AHEAD_BYTES // GROUP_BYTES
        assert bench.fetcher.prefetch(refs[taken:]) == 0
        await bench.fetcher.aclose()
        gets = bench.gate.gets
        assert gets <= -(-taken // 7)
        for number, ref in enumerate(refs[:taken]):
            assert await bench.fetcher.fetch(ref) == raws(300)[number]
        assert bench.gate.gets == gets
        assert bench.fetcher.prefetch(refs[taken : taken + 10]) == 10

    with_bench(work)


def test_read_ahead_nobody_wanted_makes_room() -> None:
    async def work(bench: Bench) -> None:
        refs = await put_extents(bench.memory, raws(300))
        bench.fetcher.prefetch(refs)
        await bench.fetcher.aclose()
        assert bench.fetcher.prefetch(refs[200:210]) == 0
        bench.clock.slept += 60
        assert bench.fetcher.prefetch(refs[200:210]) == 10

    with_bench(work)


def test_memory_is_bounded() -> None:
    """P9."""

    async def work(bench: Bench) -> None:
        refs = await put_extents(bench.memory, raws(250))
        for ref in refs:
            await bench.fetcher.fetch(ref)
        held = sum(bench.fetcher.peek(ref, 0, GROUP_BYTES) is not None for ref in refs)
        assert held == MEMORY_BYTES // GROUP_BYTES

    with_bench(work)


def test_read_ahead_leaves_connections_for_readers() -> None:
    async def work(bench: Bench) -> None:
        refs = []
        for number in range(80):
            refs += await put_extents(bench.memory, [NOISE[number * 7000 : number * 7000 + 5000]])
        bench.gate.open.clear()
        bench.fetcher.prefetch(refs[:79])
        await asyncio.sleep(0.01)
        assert bench.gate.most_at_once == MAX_BACKGROUND
        reader = asyncio.ensure_future(bench.fetcher.fetch(refs[79]))
        await asyncio.sleep(0.01)
        assert bench.gate.most_at_once == MAX_BACKGROUND + 1
        bench.gate.open.set()
        await reader

    with_bench(work)


def test_disk_cache_serves_the_next_mount(tmp_path: Path) -> None:
    async def first(bench: Bench) -> list[ExtentRef]:
        refs = await put_extents(bench.memory, raws(20))
        await bench.fetcher.fetch_all(refs, max_gap_bytes=1 << 20, max_run_bytes=8 << 20)
        assert bench.gate.gets == 1
        return refs

    refs = with_bench(first, cache=tmp_path)

    async def second(bench: Bench) -> None:
        assert [await bench.fetcher.fetch(ref) for ref in refs] == raws(20)
        await bench.fetcher.fetch_all(refs, max_gap_bytes=1 << 20, max_run_bytes=8 << 20)
        assert bench.gate.gets == 0
        assert bench.counters.disk_hits == 20

    with_bench(second, cache=tmp_path)


def test_fetch_all_tells_of_failure_and_leaves_nothing_behind() -> None:
    async def work(bench: Bench) -> None:
        refs = await put_extents(bench.memory, raws(20))
        bench.gate.fail = lambda _: Unavailable("away")
        with pytest.raises(Unavailable):
            await bench.fetcher.fetch_all(refs, max_gap_bytes=0, max_run_bytes=1)
        bench.gate.fail = lambda _: None
        assert await bench.fetcher.fetch(refs[0]) == raws(20)[0]

    with_bench(work)


def test_the_pace_counts_what_shares_the_line() -> None:
    async def work(bench: Bench) -> None:
        refs = await put_extents(bench.memory, raws(30))
        noted: list[tuple[int, int]] = []

        class Noting(Pace):
            def note(self, length: int, seconds: float, together: int) -> None:
                noted.append((length, together))

        bench.fetcher._pace = Noting()
        bench.gate.open.clear()
        waiting = [asyncio.ensure_future(bench.fetcher.fetch(ref)) for ref in (refs[0], refs[10], refs[20])]
        await asyncio.sleep(0.01)
        bench.gate.open.set()
        await asyncio.gather(*waiting)
        await bench.fetcher.fetch(refs[29])
        (length, alone) = noted[-1]
        assert alone == length
        # The first of three began alone, the last one ended alone: neither shared it all the time.
        assert [together // length for length, together in noted[:3]] == [1, 2, 1]

    with_bench(work)
