"""Sealing: when it is due, what it leaves, and that it can be killed and raced."""

from __future__ import annotations

import asyncio
import json
import random
import struct
import tracemalloc
import zlib

import numpy as np
import pytest

from tests.support.archived_wal import FIRST, NOON, SECOND, Archive, Server
from timeline.catalog.branch_log import BranchLog
from timeline.catalog.index_reader import read_frames
from timeline.catalog.line import Span
from timeline.catalog.tail import KnownChunks, find_tail
from timeline.catalog.when import AtTime, Latest, When
from timeline.errors import DamagedStore
from timeline.format import keys, zstd_frame
from timeline.format.chunk import decode_chunk, decode_layout, decode_packed
from timeline.format.digest import hex_digest_of
from timeline.format.manifest import WalFrame
from timeline.format.pack import verify_pack
from timeline.format.wal_index import Coverage, WalIndex, no_commits, no_touches
from timeline.lsn import Lsn
from timeline.maintain import seal as sealing
from timeline.maintain.seal import FRAME_BYTES, SEAL_BYTES, SEAL_CHUNKS, SEAL_SECONDS, seal
from timeline.store.faulty import Call, Crashed, FaultyStore
from timeline.store.memory import MemoryStore

MIB = 1 << 20


async def some_chunks(archive: Archive, count: int) -> Server:
    server = Server(1, FIRST)
    await archive.begin(server)
    for number in range(count):
        server.commit(NOON + number * SECOND, 100 + number)
        server.fill(700)
        await archive.archive(server, server.end - 300)
    return server


async def wal_of(archive: Archive, start: int, end: int, tli: int = 1) -> bytes:
    history = await archive.history()
    return b"".join([bytes(found.data) async for found in history.wal([Span(tli, Lsn(start), Lsn(end))])])


def test_nothing_to_seal() -> None:
    async def work() -> None:
        archive = Archive()
        assert await seal(archive.store, archive.log, archive.clock, force=True) is None
        await archive.begin(Server(1, FIRST))
        assert await seal(archive.store, archive.log, archive.clock, force=True) is None

    asyncio.run(work())


def test_due_by_number_and_by_age() -> None:
    async def work() -> None:
        archive = Archive()
        server = await some_chunks(archive, SEAL_CHUNKS - 1)
        assert await seal(archive.store, archive.log, archive.clock) is None
        await archive.archive(server)
        sealed = await seal(archive.store, archive.log, archive.clock)
        assert sealed is not None and (sealed.start, sealed.end) == (FIRST, server.end)
        assert await seal(archive.store, archive.log, archive.clock) is None
        server.commit(NOON, 900)
        await archive.archive(server)
        archive.clock.advance(SEAL_SECONDS - 1)
        assert await seal(archive.store, archive.log, archive.clock) is None
        archive.clock.advance(1)
        assert await seal(archive.store, archive.log, archive.clock) is not None
        archive.clock.advance(10 * SEAL_SECONDS)
        assert await seal(archive.store, archive.log, archive.clock) is None

    asyncio.run(work())


def test_what_a_seal_says() -> None:
    async def work() -> None:
        archive = Archive()
        server = Server(1, FIRST)
        await archive.begin(server)
        server.commit(NOON + 5 * SECOND, 100)
        await archive.archive(server, covered=NOON + 6 * SECOND)
        server.restore_point("one", NOON)
        server.commit(NOON + 2 * SECOND, 101)
        server.abort(NOON + 9 * SECOND, 102)
        await archive.archive(server)
        sealed = await archive.seal()
        assert sealed is not None
        assert (sealed.commits, sealed.restore_points) == (3, 1)
        assert (sealed.min_commit_time, sealed.max_commit_time) == (NOON + 2 * SECOND, NOON + 9 * SECOND)
        state = await archive.state()
        assert state.sealed == (sealed,)
        assert state.coverage is not None and state.coverage.time == NOON + 6 * SECOND
        (frame,) = await read_frames(archive.store, sealed)
        assert frame.commits["xid"].tolist() == [100, 101, 102]
        assert frame.last_record == server.records[-1].start
        assert frame.pending == frame.end == server.end
        # The chunks stay: only the collector deletes (P2).
        assert len(await archive.store.list("wal/")) == 2
        pack = await archive.store.get(keys.pack(frame.pack))
        assert verify_pack(pack, frame.pack, "pack").store_id == archive.store_id

    asyncio.run(work())


def test_commit_times_are_those_of_all_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """EDGE 38: neither the first nor the last frame need hold the extremes."""

    async def work() -> None:
        archive, server = Archive(), Server(1, FIRST)
        await archive.begin(server)
        for second in (5, 9, 1, 5):
            server.commit(NOON + second * SECOND, 100 + second)
            server.fill(2000)
            await archive.archive(server)
        sealed = await archive.seal()
        assert sealed is not None
        assert len(await read_frames(archive.store, sealed)) == 4
        assert (sealed.min_commit_time, sealed.max_commit_time) == (NOON + SECOND, NOON + 9 * SECOND)
        assert sealed.commits == 4

    monkeypatch.setattr(sealing, "FRAME_BYTES", 2500)
    asyncio.run(work())


def test_only_whole_chunks_of_the_chain_are_sealed() -> None:
    """EDGE 60, 63: not what lies beyond a missing one, nor what overlaps."""

    async def work() -> None:
        archive = Archive()
        server = await some_chunks(archive, 6)
        tail = await find_tail(archive.store, await archive.state(), 1)
        missing = tail.chunks[4]
        await archive.store.delete([missing.key])
        empty = WalIndex(Lsn(0), Lsn(0), FIRST, 0, no_commits(), (), no_touches())
        await archive.put(1, Lsn(FIRST + 8), server.bytes(FIRST + 8, FIRST + 80), empty)
        sealed = await archive.seal()
        assert sealed is not None and sealed.end == missing.start
        assert await wal_of(archive, FIRST, missing.start) == server.bytes(FIRST, missing.start)
        assert await archive.seal() is None

    asyncio.run(work())


def test_a_gap_parts_two_seals() -> None:
    async def work() -> None:
        archive = Archive()
        server = await some_chunks(archive, 3)
        before = archive.durable[1]
        server.switch()
        resumed = server.end
        await archive.lose(server, resumed)
        server.commit(NOON, 900)
        await archive.archive(server)
        one, two, three = await archive.seal(), await archive.seal(), await archive.seal()
        assert one is not None and two is not None and three is None
        assert (one.end, two.start, two.end) == (before, resumed, server.end)
        assert await wal_of(archive, resumed, server.end) == server.bytes(resumed, server.end)

    asyncio.run(work())


async def failed_over() -> tuple[Archive, Lsn]:
    """Chunks of tli 1, some of them beyond where tli 2 left it; and that place."""
    archive = Archive()
    old = await some_chunks(archive, 3)
    fork = Lsn(old.records[2].end)
    new = old.cut_back(fork).promote(2)
    await archive.switch(old, fork, new)
    new.commit(NOON + 60 * SECOND, 900)
    await archive.archive(new)
    return archive, fork


def test_a_tli_the_source_left_is_sealed_at_once_with_its_orphan_tail() -> None:
    """EDGE 18."""

    async def work() -> None:
        archive, fork = await failed_over()
        sealed = await seal(archive.store, archive.log, archive.clock)
        assert sealed is not None and (sealed.tli, sealed.end) == (1, archive.durable[1])
        assert sealed.end > fork
        assert await seal(archive.store, archive.log, archive.clock) is None
        assert await seal(archive.store, archive.log, archive.clock, tli=1, force=True) is None
        assert await seal(archive.store, archive.log, archive.clock, tli=2, force=True) is not None

    asyncio.run(work())


def test_a_tli_that_was_left_is_asked_for_until_nothing_waits_there() -> None:
    """A source that failed over ten times would cost ten listings a look for ever."""

    async def work() -> None:
        archive, _ = await failed_over()
        listed: list[str] = []

        async def note(call: Call) -> None:
            if call.verb == "list" and call.key.startswith("wal/"):
                listed.append(call.key)

        store, known = FaultyStore(archive.store, before=note), KnownChunks()
        while await seal(store, archive.log, archive.clock, known_chunks=known) is not None:
            pass
        assert keys.chunk_prefix("main", 1) in listed
        listed.clear()
        assert await seal(store, archive.log, archive.clock, known_chunks=known) is None
        assert listed == [keys.chunk_prefix("main", 2)]
        # Whoever knows nothing asks for all of them.
        listed.clear()
        assert await seal(store, archive.log, archive.clock, known_chunks=KnownChunks()) is None
        assert sorted(listed) == [keys.chunk_prefix("main", 1), keys.chunk_prefix("main", 2)]

    asyncio.run(work())


def test_killed_at_any_write_it_is_done_by_the_next() -> None:
    """P1, P3: at every point the history reads the same."""

    async def work() -> None:
        crash_at = 0
        while True:
            archive = Archive()
            server = await some_chunks(archive, 5)
            end = archive.durable[1]
            wal = server.bytes(FIRST, end)
            store = FaultyStore(archive.store, crash_at=crash_at)
            log = BranchLog(store, "main", archive.clock, "sealer")
            try:
                await seal(store, log, archive.clock, force=True)
            except Crashed:
                pass
            assert await wal_of(archive, FIRST, end) == wal
            await archive.seal()
            assert (await archive.state()).tlis[0].sealed == end
            assert len((await archive.state()).sealed) == 1
            await archive.store.delete([listed.key for listed in await archive.store.list("wal/")])
            assert await wal_of(archive, FIRST, end) == wal
            if not store.crashed:
                assert crash_at == store.crash_points == 6
                return
            crash_at += 1

    asyncio.run(work())


def test_sealing_again_writes_objects_of_its_own() -> None:
    """[PAC-4]: their names may have been collected since."""

    async def work() -> None:
        archive = Archive()
        await some_chunks(archive, 5)
        for crash_at in (4, 5):
            store = FaultyStore(archive.store, crash_at=crash_at)
            with pytest.raises(Crashed):
                await seal(
                    store, BranchLog(store, "main", archive.clock, "sealer"), archive.clock, force=True
                )
        assert len(await archive.store.list("packs/")) == 2
        assert len(await archive.store.list("manifests/")) == 2

    asyncio.run(work())


@pytest.mark.parametrize("seed", range(30))
def test_of_several_sealers_at_once_one_wins(seed: int) -> None:
    async def work() -> None:
        schedule = random.Random(seed)

        async def let_others_go(call: Call) -> None:
            for _ in range(schedule.randrange(5)):
                await asyncio.sleep(0)

        archive = Archive()
        server = await some_chunks(archive, 4)
        stores = [FaultyStore(archive.store, before=let_others_go) for _ in range(3)]

        async def archive_more() -> None:
            await let_others_go(Call("", ""))
            server.commit(NOON + 100 * SECOND, 900)
            await archive.archive(server)

        *results, _ = await asyncio.gather(
            *(
                seal(store, BranchLog(store, "main", archive.clock, f"{n}"), archive.clock, force=True)
                for n, store in enumerate(stores)
            ),
            archive_more(),
        )
        won = sorted((one for one in results if one is not None), key=lambda one: one.start)
        assert won and tuple(won) == (await archive.state()).sealed
        assert won[0].start == FIRST
        end = archive.durable[1]
        assert await wal_of(archive, FIRST, end) == server.bytes(FIRST, end)

    asyncio.run(work())


def test_chunks_collected_while_another_sealer_reads_them() -> None:
    async def work() -> None:
        archive = Archive()
        await some_chunks(archive, 4)
        collected = False

        async def collect(call: Call) -> None:
            nonlocal collected
            if call.verb == "get" and call.key.startswith("wal/") and not collected:
                collected = True
                await archive.seal()
                await archive.store.delete([listed.key for listed in await archive.store.list("wal/")])

        store = FaultyStore(archive.store, before=collect)
        log = BranchLog(store, "main", archive.clock, "late")
        assert await seal(store, log, archive.clock, force=True) is None
        assert len((await archive.state()).sealed) == 1

    asyncio.run(work())


def test_a_damaged_chunk_is_not_sealed() -> None:
    """P5: and nothing is committed."""

    async def work() -> None:
        archive = Archive()
        await some_chunks(archive, 4)
        chunk = (await find_tail(archive.store, await archive.state(), 1)).chunks[2]
        data = bytearray(await archive.store.get(chunk.key))
        data[chunk.layout.header_bytes + 12] ^= 1
        await archive.store.delete([chunk.key])
        await archive.store.create(chunk.key, bytes(data))
        with pytest.raises(DamagedStore) as raised:
            await archive.seal()
        assert raised.value.key == chunk.key
        assert (await archive.state()).sealed == ()

    asyncio.run(work())


async def put_random_chunks(archive: Archive, sizes: list[int], seed: int = 7) -> Lsn:
    """Chunks of noise, which no compressor makes smaller; where they end."""
    noise = np.random.default_rng(seed)
    start = archive.durable[1]
    for size in sizes:
        index = WalIndex(Lsn(0), Lsn(0), start, 0, no_commits(), (), no_touches())
        await archive.put(1, start, noise.bytes(size), index)
        start = Lsn(start + size)
    archive.durable[1] = start
    return start


async def chunk_and_frame(archive: Archive) -> tuple[bytes, WalFrame]:
    """The stored frames of the only chunk, and the only frame that sealing made of it."""
    (chunk,) = (await find_tail(archive.store, await archive.state(), 1)).chunks
    data = await archive.store.get(chunk.key)
    sealed = await archive.seal()
    assert sealed is not None and (sealed.start, sealed.end) == (chunk.start, chunk.end)
    (frame,) = await read_frames(archive.store, sealed)
    assert await wal_of(archive, chunk.start, chunk.end) == decode_chunk(data, chunk.key).wal
    return bytes(decode_packed(data, chunk.key).frames), frame


async def stored_bytes(archive: Archive, frame: WalFrame) -> bytes:
    return await archive.store.get(keys.pack(frame.pack), frame.offset, frame.stored_bytes)


def test_a_chunk_of_one_frame_is_taken_over_as_it_is() -> None:
    """[CHK-2]: neither unpacked nor compressed again."""

    async def work() -> None:
        archive = Archive()
        await archive.begin(Server(1, FIRST))
        await put_random_chunks(archive, [3 * MIB])
        stored, frame = await chunk_and_frame(archive)
        assert await stored_bytes(archive, frame) == stored

    asyncio.run(work())


def test_a_chunk_of_several_frames_becomes_one() -> None:
    """[CHK-2]: as earlier writers made them."""

    async def work() -> None:
        archive = Archive()
        await archive.begin(Server(1, FIRST))
        await put_random_chunks(archive, [3 * MIB])
        (listed,) = await archive.store.list("wal/")
        whole = await archive.store.get(listed.key)
        await archive.store.delete([listed.key])
        await archive.store.create(listed.key, cut_into_frames(whole, listed.key, MIB))
        stored, frame = await chunk_and_frame(archive)
        assert frame.end - frame.start == 3 * MIB
        assert await stored_bytes(archive, frame) != stored

    asyncio.run(work())


def cut_into_frames(whole: bytes, key: str, frame_bytes: int) -> bytes:
    """The chunk with its WAL in several frames."""
    chunk, layout = decode_chunk(whole, key), decode_layout(whole, key)
    pieces = [chunk.wal[at : at + frame_bytes] for at in range(0, len(chunk.wal), frame_bytes)]
    frames = [zstd_frame.compress(piece) for piece in pieces]
    header = json.loads(whole[16 : layout.header_bytes])
    header["frames"] = [[len(frame), len(piece)] for frame, piece in zip(frames, pieces, strict=True)]
    header["frames_digest"] = hex_digest_of(b"".join(frames))
    text = json.dumps(header, separators=(",", ":")).encode()
    prefix = whole[:8] + struct.pack("<II", len(text), zlib.crc32(text))
    return b"".join((prefix, text, *frames, whole[layout.index.offset :]))


def test_much_wal_is_sealed_in_bounded_bites() -> None:
    """P9: about SEAL_BYTES at a time, frames of at most FRAME_BYTES, packs below 32 MiB, 100 MB of memory."""

    async def work() -> None:
        archive = Archive()
        await archive.begin(Server(1, FIRST))
        end = await put_random_chunks(archive, [4 * MIB] * 15 + [3 * MIB // 2] * 12 + [5 * MIB, 100] * 2)
        tracemalloc.start()
        first = await seal(archive.store, archive.log, archive.clock)
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert first is not None
        assert SEAL_BYTES <= first.end - FIRST < SEAL_BYTES + FRAME_BYTES
        assert peak - held < 100_000_000
        assert await seal(archive.store, archive.log, archive.clock) is None
        second = await archive.seal()
        assert second is not None and second.end == end
        frames = [*await read_frames(archive.store, first), *await read_frames(archive.store, second)]
        lengths = [frame.end - frame.start for frame in frames]
        assert max(lengths) == 5 * MIB and sum(length > FRAME_BYTES for length in lengths) == 2
        assert lengths.count(3 * MIB) >= 3
        assert all(listed.size < 32 * MIB for listed in await archive.store.list("packs/"))
        assert len({frame.pack for frame in frames}) > 1

    asyncio.run(work())


def test_a_backlog_is_not_read_again_for_each_bite() -> None:
    """Each chunk is read twice, its header and the whole, however many bites there are."""

    async def work() -> None:
        store = FaultyStore(MemoryStore())
        archive = Archive(store)
        await archive.begin(Server(1, FIRST))
        await put_random_chunks(archive, [4 * MIB] * 48)
        store.calls.clear()
        while await seal(store, archive.log, archive.clock) is not None:
            pass
        reads = [call.key for call in store.calls if call.verb == "get" and call.key.startswith("wal/")]
        (known,) = (await archive.state()).tlis
        assert known.sealed - FIRST >= 2 * SEAL_BYTES
        unsealed = len((await find_tail(store, await archive.state(), 1)).chunks)
        assert len(reads) == 2 * (48 - unsealed) + unsealed

    asyncio.run(work())


def test_reading_back_keeps_within_its_bound() -> None:
    """P9: however much WAL is read, at most 64 MiB of it and what it is unpacked from is held."""

    async def work() -> None:
        archive = Archive()
        await archive.begin(Server(1, FIRST))
        end = await put_random_chunks(archive, [4 * MIB] * 30)
        while await archive.seal() is not None:
            pass
        history = await archive.history()
        tracemalloc.start()
        read = 0
        async for found in history.wal([Span(1, FIRST, end)]):
            read += len(found.data)
            await asyncio.sleep(0.005)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert read == end - FIRST
        assert peak < 64 * MIB * 2 + 16 * MIB

    asyncio.run(work())


def test_age_is_that_of_the_oldest_chunk() -> None:
    async def work() -> None:
        archive = Archive()
        server = await some_chunks(archive, 1)
        archive.clock.advance(SEAL_SECONDS - 1)
        server.commit(NOON, 900)
        await archive.archive(server)
        tail = await find_tail(archive.store, await archive.state(), 1)
        assert not sealing.is_due(tail, archive.clock)
        archive.clock.advance(1)
        assert sealing.is_due(tail, archive.clock)

    asyncio.run(work())


def test_sealed_and_unsealed_read_alike() -> None:
    async def work() -> None:
        archive = Archive()
        server = await some_chunks(archive, 20)
        base = server.records[0].end
        await archive.snapshot("base", 1, FIRST + 40, base, time=NOON)
        await archive.archive(server, covered=NOON + 60 * SECOND)
        moments: list[When] = [Latest(), *(AtTime(NOON + number * SECOND) for number in range(1, 60, 3))]
        before = [await (await archive.history()).resolve(moment) for moment in moments]
        coverage = Coverage(1, server.end, NOON + 60 * SECOND)
        await archive.seal()
        assert (await archive.state()).coverage == coverage
        assert [await (await archive.history()).resolve(moment) for moment in moments] == before

    asyncio.run(work())


def test_it_needs_no_delete_and_overwrites_nothing() -> None:
    """P2, EDGE 43."""

    async def work() -> None:
        archive = Archive()
        await some_chunks(archive, 4)
        store = FaultyStore(archive.store)
        await seal(store, BranchLog(store, "main", archive.clock, "sealer"), archive.clock, force=True)
        created = [call.key for call in store.calls if call.verb == "create"]
        assert len(created) == 3 and len(set(created)) == 3
        assert [key.split("/")[0] for key in created] == ["packs", "manifests", "branches"]
        assert all(call.verb != "delete" for call in store.calls)

    asyncio.run(work())


def test_a_store_without_the_branch() -> None:
    async def work() -> None:
        archive = Archive(MemoryStore())
        log = BranchLog(archive.store, "nowhere", archive.clock, "sealer")
        assert await seal(archive.store, log, archive.clock, force=True) is None

    asyncio.run(work())
