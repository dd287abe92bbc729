"""Merging sealed ranges: the log's state stays small, and every reader reads what it read before."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest

from tests.support.archived_wal import FIRST, NOON, SECOND, Archive, Server
from tests.unit.format.test_log_changes import REF, begun
from timeline.catalog.branch_log import BranchLog
from timeline.catalog.index_reader import read_frames
from timeline.catalog.when import AtLsn, AtTime, BeforeRestorePoint, BeforeXid, Latest, When
from timeline.errors import DamagedStore
from timeline.format import keys, sealed_json, value_json
from timeline.format.branch_state import BranchState, SealedRange
from timeline.format.log_change import MergeSealed, merge_ranges
from timeline.lsn import Lsn
from timeline.maintain import merge
from timeline.maintain.merge import MOST_BYTES, MOST_ROWS, RUN, SPARED, due, merge_sealed
from timeline.store.faulty import Call, Crashed, FaultyStore
from timeline.store.memory import MemoryStore

MIB = 1 << 20


def sealed_often(
    state: BranchState, seals: int, *, wal: int, rows: int, manifest_bytes: int
) -> tuple[BranchState, int]:
    """The state after so many seals, merged whenever due; the second value: merges."""
    merges = 0
    for number in range(seals):
        start = state.sealed[-1].end if state.sealed else Lsn(100)
        added = SealedRange(
            tli=1,
            start=start,
            end=Lsn(start + wal),
            manifest=replace(REF, size=manifest_bytes, rows=rows),
            min_commit_time=NOON,
            max_commit_time=NOON + number,
            commits=6400,
            restore_points=0,
        )
        state = replace(state, sealed=(*state.sealed, added))
        while parts := due(state):
            merges += 1
            ref = replace(
                REF,
                size=sum(part.manifest.size for part in parts),
                rows=sum(part.manifest.rows for part in parts),
            )
            state = MergeSealed(merge_ranges(parts, ref)).apply(state)
    return state, merges


def state_bytes(state: BranchState) -> int:
    return len(sealed_json.compact(value_json.to_json(state)))


def test_thirty_days_at_ten_megabytes_a_second_take_half_a_megabyte_of_state() -> None:
    """P9: 26 TB of WAL, sealed every 64 MiB; of each seal an index of 90 kB (a thousand commits a second)."""
    seals = 30 * 86_400 * 10_000_000 // (64 * MIB) // 20
    state, merges = sealed_often(begun(), seals, wal=64 * MIB, rows=16, manifest_bytes=90_000)
    # A twentieth of it, for the time it takes: all but the newest ranges are as many again for each further twentieth.
    settled = [one for one in state.sealed if one.manifest.rows >= RUN**2]
    young = len(state.sealed) - len(settled)
    assert young <= 2 * RUN + SPARED
    whole = replace(state, sealed=(*settled * 20, *state.sealed[-young:]))
    assert state_bytes(whole) <= 500_000
    assert all(one.manifest.rows <= MOST_ROWS and one.manifest.size <= MOST_BYTES for one in state.sealed)
    # Each row is written twice.
    assert merges <= seals / RUN + seals / RUN / 10 + 1


def test_a_quiet_month_is_a_few_ranges() -> None:
    """Sealed every five minutes, a frame each."""
    state, _ = sealed_often(begun(), 30 * 288, wal=100_000, rows=1, manifest_bytes=9_000)
    assert len(state.sealed) <= 9 + 2 * RUN + SPARED
    assert state_bytes(state) <= 64 << 10


def test_long_manifests_end_a_range_early() -> None:
    """A server of very small transactions: the index is what is long."""
    state, _ = sealed_often(begun(), 2000, wal=64 * MIB, rows=16, manifest_bytes=3 * MIB)
    assert all(one.manifest.size <= MOST_BYTES for one in state.sealed)
    assert len(state.sealed) <= 2000 / 10 + 2 * RUN + SPARED


@pytest.mark.parametrize("seed", range(5))
def test_any_mixture_of_sizes_settles(seed: int) -> None:
    chance = random.Random(seed)
    state = begun()
    for _ in range(100):
        state, _ = sealed_often(
            state,
            chance.randrange(1, 20),
            wal=chance.choice([1000, MIB, 64 * MIB]),
            rows=chance.choice([1, 16, 40]),
            manifest_bytes=chance.choice([5_000, 90_000, 4 * MIB]),
        )
    half = [
        one
        for one in state.sealed
        if one.manifest.rows * 2 < MOST_ROWS
        and one.manifest.rows < RUN**2
        and one.manifest.size * 2 < MOST_BYTES
    ]
    assert len(half) <= 3 * RUN + SPARED


async def busy(archive: Archive, seals: int) -> Server:
    server = Server(1, FIRST)
    await archive.begin(server)
    server.fill(100)
    server.commit(NOON, 3)
    base_end = server.end
    server.fill(10)
    await archive.archive(server)
    await archive.snapshot("base", 1, FIRST + 40, base_end)
    for number in range(seals):
        for piece in range(3):
            server.commit(NOON + number * SECOND + piece, 100 + 10 * number + piece)
            server.fill(900)
            if number % 17 == piece:
                server.restore_point(f"point-{number}", NOON + number * SECOND)
            await archive.archive(server, server.end - 300)
        await archive.seal()
    await archive.archive(server, covered=NOON + 10_000 * SECOND)
    return server


def small(patch: pytest.MonkeyPatch) -> None:
    """Frames so short that a merged range has several groups of rows, which are read one by one."""
    patch.setattr("timeline.maintain.seal.FRAME_BYTES", 500)
    patch.setattr("timeline.catalog.index_reader._WHOLE_BYTES", 0)


def test_every_moment_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """P6: resolved, and its WAL read, through the merged manifests."""

    async def work() -> None:
        archive = Archive()
        server = await busy(archive, 100)
        whens: list[When] = [Latest(), BeforeRestorePoint("point-85"), BeforeXid(110), BeforeXid(952)]
        whens += [AtTime(NOON + number * SECOND // 2) for number in range(0, 220, 7)]
        whens += [AtLsn(Lsn(record.start + 9)) for record in server.records[5:-3:11]]
        before = [await (await archive.history()).resolve(when) for when in whens]
        reachable = await (await archive.history()).reachable()
        count = len((await archive.state()).sealed)
        made = await merge_sealed(archive.store, archive.log, archive.clock)
        state = await archive.state()
        assert len(made) == (100 - SPARED) // RUN and len(state.sealed) == count - len(made) * (RUN - 1)
        assert all(one.manifest.rows > 64 for one in made)
        assert [await (await archive.history()).resolve(when) for when in whens] == before
        one = await archive.history()
        assert [await one.resolve(when) for when in reversed(whens)] == before[::-1]
        assert await (await archive.history()).reachable() == reachable
        for target in (before[0], before[7], before[20]):
            wal = b"".join([bytes(found.data) async for found in one.wal(target.spans)])
            assert wal == server.bytes(target.snapshot.lsn, target.lsn)

    small(monkeypatch)
    asyncio.run(work())


def test_a_merged_manifest_says_what_its_parts_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """[WMA-1], [MAN-3]: the same rows, relations touched included."""

    async def work() -> None:
        archive = Archive()
        await busy(archive, RUN + SPARED)
        parts = (await archive.state()).sealed[:RUN]
        rows = [frame for part in parts for frame in await read_frames(archive.store, part)]
        (made,) = await merge_sealed(archive.store, archive.log, archive.clock)
        again = await read_frames(archive.store, made)
        assert len(rows) == made.manifest.rows == len(again)
        for one, two in zip(rows, again, strict=True):
            assert one.touches.tobytes() == two.touches.tobytes()
            assert one.commits.tobytes() == two.commits.tobytes()
            assert replace(two, touches=one.touches, commits=one.commits) == one
        assert (made.commits, made.restore_points) == (
            sum(part.commits for part in parts),
            sum(part.restore_points or 0 for part in parts),
        )

    small(monkeypatch)
    asyncio.run(work())


def test_one_lsn_costs_a_footer_and_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        store = FaultyStore(MemoryStore())
        archive = Archive(store)
        server = await busy(archive, 8 * RUN)
        await merge_sealed(store, archive.log, archive.clock)
        (merged, *_) = (await archive.state()).sealed
        history = await archive.history()
        store.calls.clear()
        lsn = next(record.end for record in server.records if record.end > merged.start + 20_000)
        await history.resolve(AtLsn(Lsn(lsn)))
        key = keys.manifest(merged.manifest.digest)
        reads = [call for call in store.calls if call.verb == "get" and call.key == key]
        # The footer, the group of the LSN, and the group before it at most.
        assert 2 <= len(reads) <= 3

    small(monkeypatch)
    asyncio.run(work())


def test_killed_at_any_write_it_is_done_by_the_next() -> None:
    """P3: the manifest before the entry that names it."""

    async def work() -> None:
        for crash_at in range(4):
            archive = Archive()
            server = await busy(archive, RUN + SPARED)
            store = FaultyStore(archive.store, crash_at=crash_at)
            try:
                await merge_sealed(store, BranchLog(store, "main", archive.clock, "other"), archive.clock)
            except Crashed:
                pass
            await merge_sealed(archive.store, archive.log, archive.clock)
            assert len((await archive.state()).sealed) == 1 + SPARED
            target = await (await archive.history()).resolve(Latest())
            assert target.lsn == server.end

    asyncio.run(work())


@pytest.mark.parametrize("seed", range(5))
def test_of_several_at_once_one_wins(seed: int) -> None:
    async def work() -> None:
        schedule = random.Random(seed)

        async def let_others_go(call: Call) -> None:
            for _ in range(schedule.randrange(5)):
                await asyncio.sleep(0)

        archive = Archive()
        await busy(archive, 2 * RUN + SPARED)
        stores = [FaultyStore(archive.store, before=let_others_go) for _ in range(3)]
        logs = [BranchLog(store, "main", archive.clock, f"{n}") for n, store in enumerate(stores)]
        results = await asyncio.gather(
            *(merge_sealed(store, log, archive.clock) for store, log in zip(stores, logs, strict=True))
        )
        assert sum(len(made) for made in results) >= 1
        await merge_sealed(archive.store, archive.log, archive.clock)
        assert len((await archive.state()).sealed) == 2 + SPARED

    asyncio.run(work())


def test_a_damaged_manifest_is_not_merged() -> None:
    """P5."""

    async def work() -> None:
        archive = Archive()
        await busy(archive, RUN + SPARED)
        key = keys.manifest((await archive.state()).sealed[3].manifest.digest)
        data = bytearray(await archive.store.get(key))
        data[100] ^= 1
        await archive.store.delete([key])
        await archive.store.create(key, bytes(data))
        with pytest.raises(DamagedStore) as raised:
            await merge_sealed(archive.store, archive.log, archive.clock)
        assert raised.value.key == key
        assert len((await archive.state()).sealed) == RUN + SPARED

    asyncio.run(work())


def test_no_run_crosses_a_gap_or_a_tli() -> None:
    state, _ = sealed_often(begun(), RUN + SPARED - 1, wal=1000, rows=1, manifest_bytes=100)
    hole = replace(state.sealed[10], start=Lsn(state.sealed[10].start + 8))
    parted = replace(state, sealed=(*state.sealed[:10], hole, *state.sealed[11:]))
    more, merges = sealed_often(parted, 5, wal=1000, rows=1, manifest_bytes=100)
    assert merges == 0 and merge.due(more) == ()
