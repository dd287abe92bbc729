"""A fetcher over a store in memory whose answers a test holds back or spoils, and extents for it."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from restore.cache import DiskCache
from restore.fetcher import Counters, Fetcher
from timeline.clock import SystemClock
from timeline.format import keys
from timeline.format.extent import GROUP_BYTES, ExtentRef, encode_extent
from timeline.format.pack import EXTENTS, PackBuilder
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
