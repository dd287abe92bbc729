"""The tail: what is on the chain of chunks, what is not, and what reading it costs."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from tests.support.archived_wal import FIRST, NOON, SECOND, Archive, Server, index_of
from timeline.catalog.tail import KnownChunks, Tail, find_tail, read_chunk, read_index
from timeline.errors import DamagedStore, NotFound
from timeline.format import keys
from timeline.format.wal_index import Coverage
from timeline.lsn import Lsn
from timeline.pg.wal import WalScanner
from timeline.store.faulty import Call, FaultyStore


async def five_chunks(archive: Archive) -> tuple[Server, list[Lsn]]:
    """A server with five chunks archived; where they start, and where the last one ends."""
    server = Server(1, FIRST)
    await archive.begin(server)
    edges = [FIRST]
    for number in range(5):
        server.commit(NOON + number * SECOND, 10 + number)
        server.fill(5000)
        await archive.archive(server, server.end - 100, epoch=1, covered=NOON + number * SECOND)
        edges.append(archive.durable[1])
    return server, edges


async def tail_of(archive: Archive) -> Tail:
    return await find_tail(archive.store, await archive.state(), 1)


async def put_raw(archive: Archive, server: Server, start: int, end: int, *, epoch: int = 1) -> str:
    """A chunk that an archiver left there, on the chain or not."""
    wal = server.bytes(start, end)
    index = index_of(WalScanner(1 << 20, 1, FIRST, major=15).feed(server.bytes(FIRST, end)))
    return await archive.put(1, Lsn(start), wal, index, epoch=epoch)


def test_no_chunks() -> None:
    async def work() -> None:
        archive = Archive()
        await archive.begin(Server(1, FIRST))
        tail = await tail_of(archive)
        assert (tail.start, tail.end, tail.chunks, tail.bytes) == (FIRST, FIRST, (), 0)
        assert (tail.coverage, tail.epoch, tail.oldest) == (None, 0, None)

    asyncio.run(work())


def test_the_chain() -> None:
    async def work() -> None:
        archive = Archive()
        server, edges = await five_chunks(archive)
        tail = await tail_of(archive)
        assert [chunk.start for chunk in tail.chunks] == edges[:-1]
        assert tail.end == edges[-1]
        assert tail.coverage == Coverage(1, edges[-1], NOON + 4 * SECOND)
        assert tail.epoch == 1
        assert tail.detached == ()
        assert tail.bytes == edges[-1] - FIRST
        for chunk in tail.chunks:
            whole = await read_chunk(archive.store, chunk)
            assert whole.wal == server.bytes(chunk.start, chunk.end)
            index = await read_index(archive.store, dataclasses.replace(chunk, index=None))
            assert index.pending == whole.index.pending
            assert index.commits.tobytes() == whole.index.commits.tobytes()

    asyncio.run(work())


@pytest.mark.parametrize("missing", range(5))
def test_a_missing_chunk_ends_the_chain(missing: int) -> None:
    """EDGE 60, 63: the longest complete prefix, and what lies beyond is told."""

    async def work() -> None:
        archive = Archive()
        _, edges = await five_chunks(archive)
        await archive.store.delete([keys.chunk("main", 1, edges[missing])])
        tail = await tail_of(archive)
        assert tail.end == edges[missing]
        assert tail.detached == tuple(edges[missing + 1 : -1])
        remarks = await (await archive.history()).remarks()
        assert len(remarks) == (missing < 4)
        assert all(str(edges[missing]) in remark for remark in remarks)

    asyncio.run(work())


def test_chunks_that_overlap_the_chain_are_void() -> None:
    """EDGE 60: orphans of a killed archiver, inside chunks and across their edges."""

    async def work() -> None:
        archive = Archive()
        server, edges = await five_chunks(archive)
        await put_raw(archive, server, edges[1] + 8, edges[1] + 200, epoch=7)
        await put_raw(archive, server, edges[2] - 8, edges[4] + 8)
        tail = await tail_of(archive)
        assert [chunk.start for chunk in tail.chunks] == edges[:-1]
        assert tail.end == edges[-1]
        assert tail.detached == ()
        assert tail.epoch == 7

    asyncio.run(work())


def test_below_the_sealed_lsn_chunks_are_void_and_not_even_read() -> None:
    async def work() -> None:
        archive = Archive()
        server, edges = await five_chunks(archive)
        await archive.seal()
        server.commit(NOON, 99)
        await archive.archive(server)
        counted = FaultyStore(archive.store)
        tail = await find_tail(counted, await archive.state(), 1)
        assert [chunk.start for chunk in tail.chunks] == [edges[-1]]
        assert [call.verb for call in counted.calls] == ["list", "get"]

    asyncio.run(work())


def test_chunks_that_are_known_are_listed_and_not_read_again() -> None:
    async def work() -> None:
        archive = Archive()
        server, edges = await five_chunks(archive)
        known = KnownChunks()
        first = await find_tail(archive.store, await archive.state(), 1, known_chunks=known)
        server.commit(NOON, 99)
        await archive.archive(server)
        counted = FaultyStore(archive.store)
        tail = await find_tail(counted, await archive.state(), 1, known_chunks=known)
        assert [call.verb for call in counted.calls] == ["list", "get"]
        assert tail.headers == (await find_tail(archive.store, await archive.state(), 1)).headers
        assert all(one is other for one, other in zip(tail.chunks, first.chunks, strict=False))
        # One that is not listed any more is not there, and is forgotten.
        await archive.store.delete([tail.chunks[-1].key])
        assert await find_tail(archive.store, await archive.state(), 1, known_chunks=known) == first
        assert (
            set(known.of(1)) == {chunk.key for chunk in first.chunks} and len(edges) == len(first.chunks) + 1
        )
        await archive.seal()
        assert (await find_tail(archive.store, await archive.state(), 1, known_chunks=known)).chunks == ()
        assert known.of(1) == {}

    asyncio.run(work())


def test_the_chain_steps_over_a_recorded_gap_only() -> None:
    async def work() -> None:
        archive = Archive()
        server, edges = await five_chunks(archive)
        server.switch()
        resumed = server.end
        server.commit(NOON + 60 * SECOND, 99)
        await archive.lose(server, resumed)
        # Somebody stale writes into the gap: the log has decided that nothing is there.
        await put_raw(archive, server, edges[-1], edges[-1] + 200)
        await archive.archive(server)
        tail = await tail_of(archive)
        assert [chunk.start for chunk in tail.chunks] == [*edges[:-1], resumed]
        assert tail.end == server.end
        assert tail.detached == ()

    asyncio.run(work())


def test_large_chunks_cost_their_header_only() -> None:
    async def work() -> None:
        archive = Archive()
        server = Server(1, FIRST)
        await archive.begin(server)
        for _ in range(20):
            server.builder.append(21, 0, main=archive.clock.token(20_000).encode())
        await archive.archive(server)
        read = 0

        class Counting(FaultyStore):
            async def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
                nonlocal read
                data = await super().get(key, start, length)
                read += len(data)
                return data

        store = Counting(archive.store)
        tail = await find_tail(store, await archive.state(), 1)
        assert tail.end == server.end
        assert read <= 4096
        index = await read_index(store, tail.chunks[0])
        assert index.records == 20
        assert read <= 8192

    asyncio.run(work())


def test_a_chunk_that_vanishes_is_not_found() -> None:
    async def work() -> None:
        archive = Archive()
        await five_chunks(archive)

        async def collect(call: Call) -> None:
            if call.verb == "get":
                await archive.store.delete([call.key])

        with pytest.raises(NotFound):
            await find_tail(FaultyStore(archive.store, before=collect), await archive.state(), 1)

    asyncio.run(work())


def test_a_chunk_of_another_cluster_is_damage() -> None:
    """EDGE 12."""

    async def work() -> None:
        archive = Archive()
        await five_chunks(archive)
        state = await archive.state()
        other = dataclasses.replace(state.incarnations[0], system_identifier=1)
        with pytest.raises(DamagedStore, match="of this cluster"):
            await find_tail(archive.store, dataclasses.replace(state, incarnations=(other,)), 1)

    asyncio.run(work())


@pytest.mark.parametrize("at", ["header", "wal", "index"])
def test_a_flipped_bit_is_found_by_those_who_need_the_byte(at: str) -> None:
    """P5; and a damaged chunk does not keep anyone from an earlier moment."""

    async def work() -> None:
        archive = Archive()
        _, edges = await five_chunks(archive)
        key = keys.chunk("main", 1, edges[3])
        data = bytearray(await archive.store.get(key))
        layout = (await tail_of(archive)).chunks[3].layout
        data[{"header": 40, "wal": layout.header_bytes + 9, "index": layout.index.offset + 9}[at]] ^= 4
        await archive.store.delete([key])
        await archive.store.create(key, bytes(data))
        if at == "header":
            with pytest.raises(DamagedStore):
                await tail_of(archive)
            return
        chunk = (await tail_of(archive)).chunks[3]
        if at == "index":
            with pytest.raises(DamagedStore):
                await read_index(archive.store, chunk)
        with pytest.raises(DamagedStore):
            await read_chunk(archive.store, chunk)

    asyncio.run(work())
