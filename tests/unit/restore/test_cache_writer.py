"""What a mount fetched gets into the disk cache, when it is in nobody's way."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from restore import cache_writer
from restore.cache import DiskCache
from restore.cache_writer import CacheWriter
from restore.frames_ahead import FramesAhead, Pace
from tests.support.fetcher_bench import NOISE, Bench, put_extents, raws, with_bench
from timeline.format import keys
from timeline.format.digest import digest_of
from timeline.format.extent import GROUP_BYTES


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


def test_what_would_pile_up_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """P9: a disk slower than the store costs no memory."""
    monkeypatch.setattr(cache_writer, "WRITING_BYTES", 3 * GROUP_BYTES)

    async def work(bench: Bench) -> None:
        refs = await put_extents(bench.memory, raws(20))
        await bench.fetcher.fetch_all(refs, max_gap_bytes=0, max_run_bytes=8 << 20)
        assert bench.gate.gets == 1

    with_bench(work, cache=tmp_path)
    assert len(cached(tmp_path)) == 3


def test_damage_in_what_waits_to_be_written_is_dropped(tmp_path: Path) -> None:
    """P5: a frame fetched ahead is not verified before it is used; nothing that fails there gets a name in the cache."""

    async def work(bench: Bench) -> None:
        good, bad = await put_extents(bench.memory, raws(2))
        pack = await bench.memory.get(keys.pack(good.pack))
        frames = FramesAhead(bench.memory.get, Pace(), bench.clock)
        cache = DiskCache(tmp_path, 1 << 30, bench.clock)
        with ThreadPoolExecutor(1) as pool:
            writer = CacheWriter(cache, frames, bench.clock, pool, quiet_seconds=0.0)
            for ref in (bad, good):
                frame = bytearray(pack[ref.offset : ref.offset + ref.stored_bytes])
                frame[-1] ^= ref is bad
                assert frames.keep(ref, bytes(frame))
            await writer.aclose()
        assert cached(tmp_path) == {good.digest}

    with_bench(work)
