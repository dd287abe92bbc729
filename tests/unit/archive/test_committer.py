"""Committing chunks: what is durable when, and whom one meets under one's own keys."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.manual_clock import ManualClock
from timeline.archive.chunker import RawChunk
from timeline.archive.committer import ChunkIdentity, Committer, Recut, first_difference
from timeline.clock import Clock, SystemClock
from timeline.errors import Fenced, SplitBrain, Unavailable
from timeline.format import keys
from timeline.format.chunk import ChunkHeader, decode_chunk, encode_chunk
from timeline.format.wal_index import Coverage, WalIndex, no_commits, no_touches
from timeline.lsn import Lsn
from timeline.store.base import Store
from timeline.store.faulty import Call, Faults, FaultyStore
from timeline.store.memory import MemoryStore

ME = ChunkIdentity("5" * 32, "main", 42, 1, "me", 7)
WAL = bytes(range(256)) * 16
BASE = 0x1000


class PlainIndexer:
    """An index that says nothing but where it was fed."""

    def __init__(self) -> None:
        self.fed = bytearray()

    def feed(self, wal: bytes | bytearray | memoryview) -> WalIndex:
        self.fed += wal
        return WalIndex(Lsn(0), Lsn(0), Lsn(BASE + len(self.fed)), 0, no_commits(), (), no_touches())


def chunk(start: int, end: int, *, coverage: Coverage | None = None) -> RawChunk:
    """A run of the test's WAL; positions relative to its start."""
    return RawChunk(Lsn(BASE + start), memoryview(bytearray(WAL[start:end])), coverage)


def stored(start: int, end: int, *, epoch: int = 7, wal: bytes | None = None, system: int = 42) -> bytes:
    """What somebody else would store for that run."""
    header = ChunkHeader(
        "5" * 32, "main", system, 1, Lsn(BASE + start), Lsn(BASE + end), "other", epoch, 0, None, ""
    )
    index = WalIndex(Lsn(0), Lsn(0), Lsn(BASE + end), 0, no_commits(), (), no_touches())
    return encode_chunk(header, WAL[start:end] if wal is None else wal, index)


def key(start: int) -> str:
    """Key of the chunk there."""
    return keys.chunk("main", 1, BASE + start)


@contextlib.asynccontextmanager
async def committing(
    store: Store,
    *,
    uploads: int = 4,
    clock: Clock | None = None,
    patience: float = 5.0,
    on_change: Callable[[], None] = lambda: None,
) -> AsyncIterator[Committer]:
    """A committer at the start of the test's WAL."""
    with ThreadPoolExecutor(2) as executor:
        committer = Committer(
            store,
            ME,
            Lsn(BASE),
            PlainIndexer(),
            clock=clock or SystemClock(),
            executor=executor,
            uploads_in_flight=uploads,
            patience_seconds=patience,
            on_change=on_change,
        )
        try:
            yield committer
        finally:
            await committer.aclose()


def run(work: Callable[[], Awaitable[None]]) -> None:
    """Run the body of a test."""

    async def bounded() -> None:
        async with asyncio.timeout(30):
            await work()

    asyncio.run(bounded())


def test_durable_is_the_contiguous_prefix_whatever_order_uploads_end_in() -> None:
    """P1, EDGE 3: nothing behind a hole is ever reported."""

    async def work() -> None:
        gates = {key(start): asyncio.Event() for start in (0, 100, 200, 300)}

        async def before(call: Call) -> None:
            if call.verb == "create":
                await gates[call.key].wait()

        store = FaultyStore(MemoryStore(), before=before)
        async with committing(store) as committer:
            for start in (0, 100, 200, 300):
                committer.submit(chunk(start, start + 100))
            assert committer.buffered_bytes == 400
            assert not committer.slot_free
            for opened, durable in ((100, 0), (300, 0), (0, 200), (200, 400)):
                gates[key(opened)].set()
                for _ in range(200):
                    await asyncio.sleep(0.001)
                    if committer.durable == BASE + durable:
                        break
                await asyncio.sleep(0.005)
                assert committer.durable == BASE + durable
            assert committer.buffered_bytes == 0
            assert committer.slot_free

    run(work)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_durable_is_in_the_store_through_any_faults(seed: int) -> None:
    """P1, EDGE 41: failed creates, lost answers, any order."""

    async def work() -> None:
        chance = random.Random(seed)

        async def before(call: Call) -> None:
            for _ in range(chance.randrange(20)):
                await asyncio.sleep(0)

        inner = MemoryStore()
        store = FaultyStore(inner, seed=seed, faults=Faults(unavailable=0.3, lost_answer=0.3), before=before)
        ends: list[int] = []
        async with committing(
            store,
            clock=ManualClock(seed=seed),
            patience=1e9,
            on_change=lambda: ends.append(committer.durable - BASE),
        ) as committer:
            cuts = sorted({0, *chance.sample(range(1, len(WAL)), 40), len(WAL)})
            for start, end in itertools.pairwise(cuts):
                committer.submit(chunk(start, end))
            await committer.drain()
            assert committer.durable == BASE + len(WAL)
        assert ends == sorted(ends)
        position, read = BASE, b""
        while position < BASE + len(WAL):
            name = keys.chunk("main", 1, position)
            found = decode_chunk(await inner.get(name), name)
            read += found.wal
            position = found.header.end
        assert read == WAL

    run(work)


def test_a_chunk_says_who_wrote_it_and_what_it_covers() -> None:
    async def work() -> None:
        store = MemoryStore()
        async with committing(store) as committer:
            covered = Coverage(1, Lsn(BASE + 50), 99)
            committer.submit(chunk(0, 50, coverage=covered))
            await committer.drain()
            assert committer.stats.coverage == covered
        header = decode_chunk(await store.get(key(0)), key(0)).header
        assert (header.writer, header.epoch, header.coverage) == ("me", 7, covered)
        assert (header.start, header.end) == (BASE, BASE + 50)

    run(work)


def test_own_orphan_of_the_same_cut_is_adopted() -> None:
    """EDGE 60."""

    async def work() -> None:
        store = MemoryStore()
        await store.create(key(100), stored(100, 200, epoch=6))
        async with committing(store) as committer:
            for start in (0, 100, 200):
                committer.submit(chunk(start, start + 100))
            await committer.drain()
            assert committer.durable == BASE + 300
            assert committer.stats.adopted == 1

    run(work)


@pytest.mark.parametrize(("end", "known"), [(150, 150), (250, 250), (900, 300)])
def test_an_equal_chunk_of_another_cut_moves_the_chain(end: int, known: int) -> None:
    """EDGE 60: the chain goes on at its end; what is not here yet stays to be compared."""

    async def work() -> None:
        store = MemoryStore()
        await store.create(key(100), stored(100, end))
        async with committing(store) as committer:
            for start in (0, 100, 200):
                committer.submit(chunk(start, start + 100))
            with pytest.raises(Recut) as raised:
                await committer.drain()
            assert (raised.value.end, raised.value.known) == (BASE + end, BASE + known)
            assert committer.durable == BASE + 100

    run(work)


@pytest.mark.parametrize("flipped", [100, 199, 200, 299])
def test_a_chunk_with_other_bytes_is_a_split_brain(flipped: int) -> None:
    """EDGE 19: found wherever the difference is, also in what belongs to my next chunk."""

    async def work() -> None:
        store = MemoryStore()
        theirs = bytearray(WAL[100:300])
        theirs[flipped - 100] ^= 1
        await store.create(key(100), stored(100, 300, wal=bytes(theirs)))
        async with committing(store) as committer:
            for start in (0, 100, 200):
                committer.submit(chunk(start, start + 100))
            with pytest.raises(SplitBrain, match=str(Lsn(BASE + flipped))):
                await committer.drain()
            assert committer.durable == BASE + 100

    run(work)


def test_a_chunk_of_another_cluster_is_a_split_brain() -> None:
    async def work() -> None:
        store = MemoryStore()
        await store.create(key(0), stored(0, 100, system=43))
        async with committing(store) as committer:
            committer.submit(chunk(0, 100))
            with pytest.raises(SplitBrain, match="another cluster"):
                await committer.drain()

    run(work)


def test_a_chunk_of_a_higher_epoch_fences() -> None:
    """P4, EDGE 11: even when its bytes are mine."""

    async def work() -> None:
        store = MemoryStore()
        await store.create(key(0), stored(0, 100, epoch=8))
        async with committing(store) as committer:
            committer.submit(chunk(0, 100))
            with pytest.raises(Fenced) as raised:
                await committer.drain()
            assert not isinstance(raised.value, SplitBrain)
            assert committer.durable == BASE

    run(work)


def test_a_stalled_store_is_waited_for_and_then_given_up() -> None:
    async def work() -> None:
        clock = ManualClock()
        store = FaultyStore(MemoryStore(), faults=Faults(unavailable=1.0))
        async with committing(store, clock=clock, patience=60.0) as committer:
            committer.submit(chunk(0, 100))
            with pytest.raises(Unavailable):
                await committer.drain()
            assert clock.monotonic() <= 60.0
            assert len(clock.slept) > 5
            assert committer.durable == BASE
            assert committer.stats.stalled_since == 0.0

    run(work)


def test_chunks_must_adjoin() -> None:
    async def work() -> None:
        async with committing(MemoryStore()) as committer:
            committer.submit(chunk(0, 100))
            with pytest.raises(ValueError, match="should follow"):
                committer.submit(chunk(101, 200))

    run(work)


def test_the_first_difference_is_found() -> None:
    for at in (0, 1, 62, 63):
        changed = bytearray(64)
        changed[at] = 1
        assert first_difference(memoryview(changed), memoryview(bytes(64))) == at
    assert first_difference(memoryview(b"ab"), memoryview(b"ab")) is None
