"""Extents from packs: one request for each, verified, patient, bounded; and the page index above it."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest

from restore import fetcher as fetcher_module
from restore.cache import DiskCache
from restore.fetcher import AHEAD_BYTES, MAX_BACKGROUND, MEMORY_BYTES, Counters, Fetcher
from restore.frames_ahead import Pace
from restore.page_index import PageIndex
from restore.source import ExtentSource
from tests.support.plain_snapshot import store_directory
from timeline.clock import SystemClock
from timeline.errors import DamagedStore, MissingObject, NotFound, Unavailable
from timeline.format import keys
from timeline.format.branch_state import Snapshot
from timeline.format.digest import digest_of
from timeline.format.extent import GROUP_BYTES, ExtentRef, encode_extent
from timeline.format.file_listing import read_file_listing
from timeline.format.manifest import FileRow, PageRow
from timeline.format.pack import EXTENTS, PackBuilder
from timeline.format.page_manifest import write_page_manifest
from timeline.lsn import Lsn
from timeline.store.base import Store
from timeline.store.faulty import Call, Faults, FaultyStore
from timeline.store.memory import MemoryStore

T = TypeVar("T")
NOISE = random.Random(3).randbytes(1 << 20)


class FastClock(SystemClock):
    """Sleeping costs no time, but the clock goes on."""

    def __init__(self) -> None:
        self.slept = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.slept

    async def sleep(self, seconds: float) -> None:
        self.slept += seconds
        await asyncio.sleep(0)


class WaitingClock(FastClock):
    """Sleeping takes its time."""

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Gate:
    """Counts what reaches the store, and holds it back while closed."""

    def __init__(self) -> None:
        self.gets = 0
        self.at_once = 0
        self.most_at_once = 0
        self.open = asyncio.Event()
        self.open.set()
        self.fail: Callable[[Call], Exception | None] = lambda _: None

    async def __call__(self, call: Call) -> None:
        if call.verb != "get":
            return
        self.gets += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await self.open.wait()
            error = self.fail(call)
            if error is not None:
                raise error
        finally:
            self.at_once -= 1


async def put_extents(store: Store, raws: list[bytes]) -> list[ExtentRef]:
    """One pack of them, in order."""
    builder = PackBuilder("0" * 32, EXTENTS)
    placed = []
    for raw in raws:
        stored, digest = encode_extent(raw)
        placed.append(ExtentRef(0, len(raw), "", builder.add(stored), len(stored), digest))
    pack, data = builder.finish()
    await store.create(keys.pack(pack), data)
    return [replace(ref, pack=pack) for ref in placed]


@functools.cache
def raws(count: int) -> list[bytes]:
    """Whole extents that differ; not to be changed."""
    return [NOISE[i * 1000 : i * 1000 + GROUP_BYTES] for i in range(count)]


class Bench:
    """A fetcher over a store in memory."""

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        cache: DiskCache,
        patience: float,
        faults: Faults | None = None,
        quiet: float = 0.0,
    ) -> None:
        self.memory = MemoryStore()
        self.gate = Gate()
        self.store = FaultyStore(self.memory, before=self.gate, faults=faults)
        self.clock = WaitingClock() if quiet else FastClock()
        self.counters = Counters()
        self.fetcher = Fetcher(
            self.store,
            cache,
            self.clock,
            pool,
            self.counters,
            patience_seconds=patience,
            quiet_seconds=quiet,
        )


def with_bench(
    work: Callable[[Bench], Awaitable[T]],
    *,
    cache: Path | None = None,
    patience: float = 10.0,
    faults: Faults | None = None,
    quiet: float = 0.0,
) -> T:
    async def run() -> T:
        with ThreadPoolExecutor(2) as pool:
            bench = Bench(pool, DiskCache(cache, 1 << 30, SystemClock()), patience, faults, quiet)
            try:
                return await work(bench)
            finally:
                bench.gate.open.set()
                await bench.fetcher.aclose()

    return asyncio.run(run())


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


def cached(cache: Path) -> set[bytes]:
    """Digests of what is in the disk cache."""
    return {
        bytes.fromhex(shard.name + entry.name)
        for shard in (cache / "v1").iterdir()
        if shard.name != "tmp"
        for entry in shard.iterdir()
    }


async def used(bench: Bench) -> set[bytes]:
    """Digests of what was fetched: extents one by one and together, and a part of another object."""
    refs = await put_extents(bench.memory, raws(30))
    part = NOISE[:5000]
    await bench.memory.create("manifests/part", part)
    await bench.fetcher.fetch(refs[0])
    await bench.fetcher.fetch_all(refs[10:20], max_gap_bytes=0, max_run_bytes=1 << 20)
    await bench.fetcher.read_part("manifests/part", 0, len(part), digest_of(part))
    return {digest_of(part), refs[0].digest, *(ref.digest for ref in refs[10:20])}


def test_a_young_fetcher_leaves_the_disk_cache_for_later(tmp_path: Path) -> None:
    """Postgres wants the processor for its start; what it took is kept when that is over."""

    async def work(bench: Bench) -> None:
        digests = await used(bench)
        assert cached(tmp_path) == set()
        bench.clock.slept += 100.0
        async with asyncio.timeout(30):
            while cached(tmp_path) != digests:  # noqa: ASYNC110 - nothing tells of files
                await asyncio.sleep(0.01)

    with_bench(work, cache=tmp_path, quiet=100.0)


def test_what_was_to_be_kept_later_is_kept_at_the_end(tmp_path: Path) -> None:
    """A branch that lives for seconds warms the cache for the next one."""

    async def work(bench: Bench) -> set[bytes]:
        digests = await used(bench)
        assert cached(tmp_path) == set()
        return digests

    assert with_bench(work, cache=tmp_path, quiet=100.0) == cached(tmp_path)


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


# -- the page index and files above it


async def add_delta(
    store: Store, snapshot: Snapshot, path: str, group: int, first_block: int, raw: bytes, lsn: int | None
) -> Snapshot:
    """Another page manifest on top, with one extent."""
    [ref] = await put_extents(store, [raw])
    data, manifest = write_page_manifest([PageRow(path, group, replace(ref, first_block=first_block))])
    await store.create(keys.manifest(manifest.digest), data)
    manifest = replace(manifest, lsn=None if lsn is None else Lsn(lsn))
    return replace(snapshot, pages=(*snapshot.pages, manifest))


async def row_of(store: Store, snapshot: Snapshot, path: str) -> FileRow:
    data = await store.get(keys.manifest(snapshot.files.digest))
    row = read_file_listing(data, snapshot.files).get(path)
    assert row is not None
    return row


def test_newer_manifests_override_older_ones_block_by_block(tmp_path: Path) -> None:
    """[PAG-4]"""
    content = bytearray(NOISE[: GROUP_BYTES + 50_000])
    (tmp_path / "file").write_bytes(content)

    async def work(bench: Bench) -> None:
        snapshot = await store_directory(bench.memory, tmp_path, SystemClock())
        for first_block, at, length in ((3, 500, 16384), (4, 900, 24576), (0, 77, 8192)):
            raw = NOISE[at : at + length]
            snapshot = await add_delta(bench.memory, snapshot, "file", 0, first_block, raw, None)
            content[first_block * 8192 : first_block * 8192 + length] = raw
        snapshot = await add_delta(bench.memory, snapshot, "other", 9, 0, b"x", None)
        source = ExtentSource(snapshot, bench.fetcher)
        file = source.content(await row_of(bench.memory, snapshot, "file"))
        assert file.read_now(0, 10) is None
        assert await file.read(0, len(content)) == bytes(content)
        for at in range(0, len(content), 4097):
            length = min(9000, len(content) - at)
            assert await file.read(at, length) == bytes(content[at : at + length])
            assert file.read_now(at, length) == bytes(content[at : at + length])

    with_bench(work)


def test_a_files_former_life_is_left_out(tmp_path: Path) -> None:
    """[PAG-7], [FIL-5]: what manifests older than the file say of its name is another file's content."""
    (tmp_path / "file").write_bytes(NOISE[:100_000])

    async def work(bench: Bench) -> None:
        snapshot = await store_directory(bench.memory, tmp_path, SystemClock(), born=500)
        snapshot = replace(snapshot, pages=(replace(snapshot.pages[0], lsn=Lsn(400)),))
        snapshot = await add_delta(bench.memory, snapshot, "file", 0, 2, NOISE[:8192], 500)
        file = ExtentSource(snapshot, bench.fetcher).content(await row_of(bench.memory, snapshot, "file"))
        assert await file.read(0, 100_000) == bytes(16384) + NOISE[:8192] + bytes(100_000 - 24576)

    with_bench(work)


def test_missing_object_is_asked_for_once_more_with_a_fresh_snapshot(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(NOISE[:100_000])

    async def work(bench: Bench) -> None:
        old = await store_directory(bench.memory, tmp_path, SystemClock())
        new = await add_delta(bench.memory, old, "file", 0, 0, NOISE[:100_000], None)
        [moved] = [r.key for r in await bench.memory.list("packs/", limit=1)]
        reloads = 0

        async def reload() -> Snapshot:
            nonlocal reloads
            reloads += 1
            return new

        row = await row_of(bench.memory, old, "file")
        packs = [listed.key for listed in await bench.memory.list("packs/")]
        assert moved in packs
        bench.gate.fail = lambda call: (
            NotFound(call.key) if call.key.startswith("packs/") and reloads == 0 else None
        )
        source = ExtentSource(old, bench.fetcher, reload=reload)
        assert await source.content(row).read(0, 100_000) == NOISE[:100_000]
        assert reloads == 1
        assert source.snapshot is new

    with_bench(work)


def test_missing_for_good_is_damage(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(NOISE[:100_000])

    async def work(bench: Bench) -> None:
        snapshot = await store_directory(bench.memory, tmp_path, SystemClock())
        row = await row_of(bench.memory, snapshot, "file")
        packs = [listed.key for listed in await bench.memory.list("packs/")]
        await bench.memory.delete(packs)

        async def reload() -> Snapshot:
            return snapshot

        with pytest.raises(MissingObject) as missing:
            await ExtentSource(snapshot, bench.fetcher, reload=reload).content(row).read(0, 10)
        assert missing.value.key in packs

    with_bench(work)


def test_warm_index_needs_no_request(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_bytes(NOISE[:300_000])
    memory = MemoryStore()

    async def work(bench: Bench) -> int:
        bench.store._store = memory
        snapshot = await store_directory(memory, tmp_path / "data", SystemClock())
        source = ExtentSource(snapshot, bench.fetcher)
        listing = await source.listing()
        row = listing.get("file")
        assert row is not None
        assert await source.content(row).read(0, 300_000) == NOISE[:300_000]
        return bench.gate.gets

    assert with_bench(work, cache=tmp_path / "cache") > 0
    assert with_bench(work, cache=tmp_path / "cache") == 0


def test_boot_set_comes_in_few_requests(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number:03}").write_bytes(NOISE[number * 5000 : number * 5000 + 60_000])

    async def work(bench: Bench) -> None:
        snapshot = await store_directory(bench.memory, tmp_path, SystemClock(), boot=("00", "01", "03"))
        source = ExtentSource(snapshot, bench.fetcher)
        await source.open_index()
        before = bench.gate.gets
        assert await source.fetch_boot_set() == 30
        assert bench.gate.gets - before <= 3
        again = bench.gate.gets
        for number in (0, 15, 39):
            row = await row_of(bench.memory, snapshot, f"{number:03}")
            assert await source.content(row).read(0, 60_000) == NOISE[number * 5000 : number * 5000 + 60_000]
        assert bench.gate.gets - again == 1

    with_bench(work)


def test_an_index_that_is_not_needed_may_be_missing() -> None:
    """All manifests are asked at once; what a newer one tells does not depend on an older one."""

    async def work(bench: Bench) -> None:
        path, born = "base/5/16384", Lsn(0)
        refs = await put_extents(bench.memory, raws(2))
        pages = []
        for ref in refs:
            data, manifest = write_page_manifest([PageRow(path, 0, ref)])
            pages.append(manifest)
            await bench.memory.create(keys.manifest(manifest.digest), data)
        index = PageIndex(tuple(pages), bench.fetcher)
        await index.open()
        await bench.memory.delete([keys.manifest(pages[0].digest)])
        (piece,) = await index.pieces(path, 0, GROUP_BYTES // 8192, born)
        assert piece.ref == refs[1]
        await bench.memory.delete([keys.manifest(pages[1].digest)])
        index = PageIndex(tuple(pages), bench.fetcher)
        with pytest.raises(NotFound):
            await index.pieces(path, 0, GROUP_BYTES // 8192, born)

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
