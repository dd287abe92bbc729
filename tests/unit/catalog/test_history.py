"""A branch's history: moments and their refusals, lines, what is reachable, what reading costs."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from tests.support.archived_wal import (
    FIRST,
    NOON,
    SECOND,
    SEGMENT_BYTES,
    SNAPSHOT_MANIFEST_BYTES,
    Archive,
    Server,
)
from timeline.catalog.history import History, wait_for
from timeline.catalog.line import Span
from timeline.catalog.target import ReachableRange
from timeline.catalog.when import AtLsn, AtTime, BeforeRestorePoint, BeforeXid, Latest, Now, When
from timeline.errors import DamagedStore, MissingObject, TargetUnreachable, Unavailable, UsageError
from timeline.format import keys
from timeline.format.wal_index import EventKind
from timeline.lsn import Lsn
from timeline.store.faulty import Call, FaultyStore
from timeline.store.memory import MemoryStore


async def one_server(archive: Archive, commits: int = 10) -> tuple[Server, Lsn]:
    """A base backup from FIRST + 40 to the LSN returned, then commits one second apart (xids 100, …), each
    in a chunk of its own, and the word that this is all up to 60 s past noon."""
    server = Server(1, FIRST)
    await archive.begin(server)
    server.fill(100)
    server.commit(NOON, 50)
    base = server.end
    await archive.archive(server)
    await archive.snapshot("base", 1, FIRST + 40, base)
    for number in range(commits):
        server.commit(NOON + (number + 1) * SECOND, 100 + number)
        server.fill(300)
        await archive.archive(server)
    server.fill(10)
    await archive.archive(server, covered=NOON + 60 * SECOND)
    return server, base


async def refused(archive: Archive, when: When, *, tli: int | None = None) -> str:
    with pytest.raises(TargetUnreachable) as raised:
        await (await archive.history()).resolve(when, tli=tli)
    return raised.value.message


def test_what_is_not_there() -> None:
    async def work() -> None:
        with pytest.raises(UsageError, match="no store"):
            await History.load(MemoryStore())
        archive = Archive()
        await archive.begin(Server(1, FIRST))
        with pytest.raises(UsageError, match="nothing was ever archived as other"):
            await History.load(archive.store, "other")
        for when in (Latest(), AtTime(NOON), AtLsn(FIRST), BeforeXid(7), BeforeRestorePoint("x")):
            assert "nothing is reachable on tli 1" in await refused(archive, when)
        with pytest.raises(UsageError, match="no tli 9"):
            await (await archive.history()).resolve(Latest(), tli=9)
        with pytest.raises(UsageError, match="ask it first"):
            await (await archive.history()).resolve(Now())

    asyncio.run(work())


def test_the_latest_moment_of_a_quiet_branch_takes_five_requests() -> None:
    async def work() -> None:
        archive = Archive()
        server, _ = await one_server(archive)
        await archive.seal()
        await archive.snapshot("built", 1, archive.durable[1], time=NOON + 60 * SECOND)
        server.commit(NOON + 90 * SECOND, 700)
        await archive.archive(server, covered=NOON + 120 * SECOND)
        store = FaultyStore(archive.store)
        target = await (await History.load(store)).resolve(Latest())
        assert target.lsn == server.end
        assert target.snapshot.id == "built"
        assert [call.verb for call in store.calls] == ["get", "list", "get", "list", "get"]

    asyncio.run(work())


def test_nothing_since_the_newest_snapshot() -> None:
    """EDGE 58: T equal to S, at the last byte of the durable tail."""

    async def work() -> None:
        archive = Archive()
        server, _ = await one_server(archive)
        for sealed in (False, True):
            if sealed:
                await archive.seal()
            await archive.snapshot(f"built-{sealed}", 1, server.end, time=NOON + 60 * SECOND)
            target = await (await archive.history()).resolve(Latest())
            assert target.lsn == target.snapshot.lsn == server.end
            assert target.snapshot.id == f"built-{sealed}"
            assert target.last_record == server.records[-1].start < target.snapshot.lsn
            assert target.spans == ()
            assert target.time == NOON + 60 * SECOND
            assert target.next_commit is None

    asyncio.run(work())


@pytest.mark.parametrize("sealed", [False, True])
def test_times(sealed: bool) -> None:
    """EDGE 35, 36, 37."""

    async def work() -> None:
        archive = Archive()
        server, _ = await one_server(archive)
        if sealed:
            await archive.seal()
        history = await archive.history()
        target = await history.resolve(AtTime(NOON + 4 * SECOND))
        assert target.last_commit is not None and target.last_commit.xid == 103
        assert target.next_commit is not None and target.next_commit.xid == 104
        assert target.lsn == target.next_commit.start
        assert target.time == NOON + 4 * SECOND
        end = await history.resolve(AtTime(NOON + 60 * SECOND))
        assert end.lsn == server.end and end.next_commit is None
        message = await refused(archive, AtTime(NOON + 60 * SECOND + 1))
        assert "2026-01-20 12:01:00.000001+00:00 cannot be reached" in message
        assert "not known to be complete" in message
        assert f"to {server.end}, 2026-01-20 12:00:00+00:00 to 2026-01-20 12:01:00+00:00" in message
        assert "before the first restorable moment" in await refused(archive, AtTime(NOON - 1))

    asyncio.run(work())


def test_a_time_inside_the_backup_takes_the_backup_before() -> None:
    """EDGE 37: a backup is usable from its end on."""

    async def work() -> None:
        archive = Archive()
        server, _ = await one_server(archive)
        redo = server.end
        server.commit(NOON + 70 * SECOND, 201)
        server.commit(NOON + 80 * SECOND, 202)
        end = server.end
        server.commit(NOON + 90 * SECOND, 203)
        await archive.archive(server, covered=NOON + 100 * SECOND)
        await archive.snapshot("second", 1, redo, end, time=NOON + 65 * SECOND)
        history = await archive.history()
        assert (await history.resolve(AtTime(NOON + 75 * SECOND))).snapshot.id == "base"
        assert (
            await history.resolve(AtLsn(Lsn(end - 8)))
        ).snapshot.id == "second"  # means: that record's end
        assert (await history.resolve(AtLsn(server.records[-2].start))).snapshot.id == "base"  # type: ignore[arg-type]
        assert (await history.resolve(AtTime(NOON + 80 * SECOND))).snapshot.id == "second"

    asyncio.run(work())


def test_the_first_time_is_one_that_can_be_had() -> None:
    """A backup's own time may lie before commits that went on while it ran."""

    async def work() -> None:
        archive = Archive()
        server = Server(1, FIRST)
        await archive.begin(server)
        server.fill(1)
        for number in range(3):
            server.commit(NOON + number * SECOND, 50 + number)
        base = server.end
        server.commit(NOON + 9 * SECOND, 60)
        await archive.archive(server)
        await archive.snapshot("base", 1, FIRST + 40, base, time=NOON)
        (window,) = await (await archive.history()).reachable()
        assert (window.first, window.first_time) == (base, NOON + 2 * SECOND)
        target = await (await archive.history()).resolve(AtTime(window.first_time))
        assert target.lsn == base
        await refused(archive, AtTime(window.first_time - 1))

    asyncio.run(work())


def test_older_coverage_does_not_hide_what_came_since() -> None:
    async def work() -> None:
        archive = Archive()
        server, _ = await one_server(archive)
        server.commit(NOON + 90 * SECOND, 900)
        await archive.archive(server)
        (window,) = await (await archive.history()).reachable()
        assert window.last_time == NOON + 90 * SECOND - 1
        assert (await (await archive.history()).resolve(Latest())).time == NOON + 90 * SECOND - 1

    asyncio.run(work())


def test_a_record_whose_header_spans_pages() -> None:
    async def work() -> None:
        for room in (8, 16):
            archive = Archive()
            server, _ = await one_server(archive)
            server.builder.fill_to(8192 - room)
            before = server.records[-1]
            server.commit(NOON + 70 * SECOND, 900)
            await archive.archive(server)
            target = await (await archive.history()).resolve(BeforeXid(900))
            assert (target.lsn, target.last_record) == (before.end, before.start)

    asyncio.run(work())


def test_without_coverage_the_last_commit_s_time_is_not_complete() -> None:
    """The next record may carry the very same time, and then T would change."""

    async def work() -> None:
        archive = Archive()
        server = Server(1, FIRST)
        await archive.begin(server)
        base = server.commit(NOON, 50).end
        server.commit(NOON + SECOND, 51)
        await archive.archive(server)
        await archive.snapshot("base", 1, FIRST + 40, base)
        history = await archive.history()
        assert (await history.resolve(AtTime(NOON + SECOND - 1))).lsn == server.records[-1].start
        await refused(archive, AtTime(NOON + SECOND))
        server.commit(NOON + SECOND, 52)
        server.commit(NOON + 2 * SECOND, 53)
        await archive.archive(server)
        target = await (await archive.history()).resolve(AtTime(NOON + SECOND))
        assert target.last_commit is not None and target.last_commit.xid == 52

    asyncio.run(work())


def test_aborts_cross_a_time_too() -> None:
    """As in Postgres: recovery stops at either kind of record."""

    async def work() -> None:
        archive = Archive()
        server, _ = await one_server(archive)
        abort = server.abort(NOON + 70 * SECOND, 300)
        commit = server.commit(NOON + 71 * SECOND, 301)
        await archive.archive(server)
        target = await (await archive.history()).resolve(AtTime(NOON + 65 * SECOND))
        assert target.lsn == abort.start
        assert target.next_commit is not None and target.next_commit.start == commit.start

    asyncio.run(work())


@pytest.mark.parametrize("sealed", [False, True])
def test_restore_points_and_xids(sealed: bool) -> None:
    """EDGE 39: the first of a name; a 64-bit xid means its low half."""

    async def work() -> None:
        archive = Archive()
        server, _ = await one_server(archive)
        first = server.restore_point("before-release", NOON + 20 * SECOND)
        server.commit(NOON + 21 * SECOND, 777)
        await archive.archive(server)
        if sealed:
            await archive.seal()
        second = server.restore_point("before-release", NOON + 22 * SECOND)
        await archive.archive(server)
        if sealed:
            await archive.seal()
        history = await archive.history()
        target = await history.resolve(BeforeRestorePoint("before-release"))
        assert (target.lsn, target.last_record) == (first.end, first.start)
        assert target.lsn < second.start
        assert "none of that name" in await refused(archive, BeforeRestorePoint("before"))
        for xid in (777, 777 + (5 << 32)):
            target = await history.resolve(BeforeXid(xid))
            assert target.next_commit is not None and target.next_commit.xid == 777
            assert target.lsn == first.end
        assert "not in the archived WAL" in await refused(archive, BeforeXid(778))

    asyncio.run(work())


def test_only_manifests_with_restore_points_are_read_for_one() -> None:
    async def work() -> None:
        archive = Archive()
        server, _ = await one_server(archive)
        for number in range(10):
            if number == 7:
                server.restore_point("here", NOON + 70 * SECOND)
            server.fill(100)
            await archive.archive(server)
            assert await archive.seal() is not None
        await archive.snapshot("built", 1, server.records[-4].end, time=NOON + 60 * SECOND)
        store = FaultyStore(archive.store)
        await refused(archive, BeforeRestorePoint("elsewhere"))
        history = await History.load(store)
        store.calls.clear()
        with pytest.raises(TargetUnreachable):
            await history.resolve(BeforeRestorePoint("elsewhere"))
        manifests = {call.key for call in store.calls if call.key.startswith("manifests/")}
        state = await archive.state()
        holding = [sealed.manifest.digest for sealed in state.sealed if sealed.restore_points]
        assert len(holding) == 1 and keys.manifest(holding[0]) in manifests
        assert len(manifests) <= 4  # that one, and the ends of what the message names

    asyncio.run(work())


def test_a_time_in_sealed_wal_takes_one_manifest_however_long_the_history() -> None:
    async def work() -> None:
        archive = Archive()
        server, _ = await one_server(archive)
        for number in range(20):
            server.commit(NOON + (100 + number) * SECOND, 500 + number)
            server.fill(10)
            server.commit(NOON + (100 + number) * SECOND + 1, 600 + number)
            if number == 9:
                await archive.archive(server)
                await archive.snapshot("built", 1, server.records[-3].start, time=NOON + 105 * SECOND)
            await archive.archive(server)
            assert await archive.seal() is not None
        store = FaultyStore(archive.store)
        target = await (await History.load(store)).resolve(AtTime(NOON + 109 * SECOND))
        assert target.last_commit is not None and target.last_commit.xid == 509
        assert target.snapshot.id == "built"
        assert sum(call.key.startswith("manifests/") for call in store.calls) == 1

    asyncio.run(work())


def test_lsns() -> None:
    """Any LSN means the end of the last record that starts before it (P6)."""

    async def work() -> None:
        archive = Archive()
        server, base = await one_server(archive)
        record = server.records[6]
        history = await archive.history()
        for lsn in (record.start + 1, record.end - 1, record.end):
            target = await history.resolve(AtLsn(Lsn(lsn)))
            assert (target.lsn, target.last_record) == (record.end, record.start)
        assert (await history.resolve(AtLsn(base))).lsn == base
        before = server.records[0].end
        message = await refused(archive, AtLsn(Lsn(before)))
        assert "before the first restorable moment" in message
        assert f"reachable on tli 1: {base} to {server.end}" in message
        assert "before the archived WAL" in await refused(archive, AtLsn(FIRST))
        assert f"ends at {server.end}" in await refused(archive, AtLsn(Lsn(server.end + 1)))
        assert (await history.resolve(AtLsn(server.end))).lsn == server.end

    asyncio.run(work())


def test_the_head_is_the_end_of_complete_records() -> None:
    """P7: what is archived of an unfinished record cannot be had."""

    async def work() -> None:
        archive = Archive()
        server, _ = await one_server(archive)
        complete, last = server.end, server.records[-1]
        server.fill(30_000)
        for cut in (complete + 3, complete + 9000, complete + 20_000):
            await archive.archive(server, cut)
            history = await archive.history()
            target = await history.resolve(Latest())
            assert (target.lsn, target.last_record) == (complete, last.start)
            assert "is not complete" in await refused(archive, AtLsn(Lsn(cut)))
        await archive.archive(server)
        assert (await (await archive.history()).resolve(Latest())).lsn == server.end

    asyncio.run(work())


def test_records_longer_than_many_chunks() -> None:
    async def work() -> None:
        archive = Archive()
        server, _ = await one_server(archive)
        record = server.fill(300_000)
        for cut in range(record.start + 10_000, record.end, 10_000):
            await archive.archive(server, cut)
        server.commit(NOON + 70 * SECOND, 900)
        await archive.archive(server)
        for sealed in (False, True):
            if sealed:
                await archive.seal()
            history = await archive.history()
            for lsn in (record.start + 1, record.start + 155_555, record.end - 1, record.end):
                target = await history.resolve(AtLsn(Lsn(lsn)))
                assert (target.lsn, target.last_record) == (record.end, record.start)
            target = await history.resolve(BeforeXid(900))
            assert (target.lsn, target.last_record) == (record.end, record.start)

    asyncio.run(work())


def test_a_switched_segment() -> None:
    async def work() -> None:
        archive = Archive()
        server, _ = await one_server(archive)
        switch = server.switch()
        half = (switch.start + switch.end) // 2
        await archive.archive(server, half)
        target = await (await archive.history()).resolve(Latest())
        assert target.lsn == switch.start
        await archive.archive(server)
        server.commit(NOON + 70 * SECOND, 900)
        await archive.archive(server)
        history = await archive.history()
        for lsn in (switch.start + 1, half, switch.end):
            target = await history.resolve(AtLsn(Lsn(lsn)))
            assert (target.lsn, target.last_record) == (switch.end, switch.start)
        assert (await history.resolve(BeforeXid(900))).last_record == switch.start

    asyncio.run(work())


def test_what_a_branch_must_know_of_the_wal_it_replays() -> None:
    """EDGE 46, 49, 61: only records from S on that start before T."""

    async def work() -> None:
        archive = Archive()
        server, _ = await one_server(archive)
        one = server.create_tablespace(1, "/before/the/snapshot")
        await archive.archive(server)
        await archive.snapshot("built", 1, one.end, time=NOON + 60 * SECOND)
        two = server.create_tablespace(2, "/replayed")
        await archive.archive(server)
        await archive.seal()
        server.restore_point("point", NOON + 61 * SECOND)
        three = server.create_tablespace(3, "/also/replayed")
        server.commit(NOON + 62 * SECOND, 900)
        await archive.archive(server)
        history = await archive.history()
        assert [event.start for event in (await history.resolve(Latest())).events] == [two.start, three.start]
        events = (await history.resolve(AtLsn(Lsn(three.start)))).events
        assert [(event.kind, event.start, event.name) for event in events] == [
            (EventKind.TABLESPACE_CREATE, two.start, "/replayed")
        ]

    asyncio.run(work())


def test_a_gap_is_never_crossed() -> None:
    """P7, EDGE 8: before it and after a new base backup behind it, never inside."""

    async def work() -> None:
        archive = Archive()
        server, base = await one_server(archive)
        lost_from = server.end
        server.commit(NOON + 100 * SECOND, 800)
        server.switch()
        resumed = server.end
        await archive.lose(server, resumed)
        server.commit(NOON + 200 * SECOND, 801)
        await archive.archive(server)
        assert "no base backup is complete" in await refused(archive, Latest())
        second = server.fill(100).end
        server.commit(NOON + 300 * SECOND, 802)
        await archive.archive(server, covered=NOON + 400 * SECOND)
        await archive.snapshot("second", 1, resumed + 40, second, time=NOON + 250 * SECOND)
        history = await archive.history()
        assert (await history.resolve(Latest())).snapshot.id == "second"
        assert (await history.resolve(AtTime(NOON + 4 * SECOND))).snapshot.id == "base"
        assert (await history.resolve(AtLsn(lost_from))).snapshot.id == "base"
        target = await history.resolve(AtTime(NOON + 260 * SECOND))
        assert target.snapshot.id == "second" and target.lsn == second
        assert "was lost (the slot was lost)" in await refused(archive, AtLsn(Lsn(resumed - 8)))
        for time in (NOON + 100 * SECOND, NOON + 150 * SECOND, NOON + 230 * SECOND):
            message = await refused(archive, AtTime(time))
            assert message.count(" to 0/") == 2
        with pytest.raises(TargetUnreachable, match="not all in the store"):
            await history.plan_wal([Span(1, base, resumed)])
        ranges = await history.reachable()
        assert [(one.first, one.last) for one in ranges] == [(base, lost_from), (second, server.end)]

    asyncio.run(work())


async def promoted(archive: Archive) -> tuple[Server, Server, Lsn, Lsn]:
    """``one_server``, promoted as tli 3 (EDGE 16) when a lagging standby had no more than the commit of 105;
    the old server wrote and archived more (EDGE 18)."""
    old, base = await one_server(archive)
    fork = next(Lsn(record.end) for record in old.records if record.xid == 105)
    new = old.cut_back(fork).promote(3)
    await archive.switch(old, fork, new)
    new.fill(50)
    new.commit(NOON + 200 * SECOND, 305)
    await archive.archive(new, covered=NOON + 210 * SECOND)
    return old, new, base, fork


@pytest.mark.parametrize("sealed", [False, True])
def test_every_line_has_its_own_moments(sealed: bool) -> None:
    """EDGE 15, 16, 17, 18, 40."""

    async def work() -> None:
        archive = Archive()
        old, new, _base, fork = await promoted(archive)
        if sealed:
            assert (await archive.seal()) is not None and (await archive.seal()) is not None
        history = await archive.history()
        assert [(span.tli, span.end) for span in history.lineage()] == [(1, fork), (3, None)]
        target = await history.resolve(Latest())
        assert (target.tli, target.lsn) == (3, new.end)
        assert target.spans == (Span(1, Lsn(FIRST + 40), fork), Span(3, fork, new.end))
        assert target.last_commit is not None and target.last_commit.xid == 305
        target = await history.resolve(Latest(), tli=1)
        assert (target.tli, target.lsn) == (1, old.end)
        assert target.last_commit is not None and target.last_commit.xid == 109
        # One time, two lines: on the new one nothing happened after 105 until 200 s past noon.
        target = await history.resolve(AtTime(NOON + 8 * SECOND))
        assert target.last_commit is not None and target.last_commit.xid == 105
        assert target.next_commit is not None and target.next_commit.xid == 305
        target = await history.resolve(AtTime(NOON + 8 * SECOND), tli=1)
        assert target.last_commit is not None and target.last_commit.xid == 107
        with pytest.raises(TargetUnreachable):
            await history.resolve(BeforeXid(108))
        assert (await history.resolve(BeforeXid(108), tli=1)).tli == 1
        at_fork = await history.resolve(AtLsn(fork))
        assert (at_fork.tli, at_fork.lsn) == (1, fork)
        with pytest.raises(TargetUnreachable) as raised:
            await history.resolve(AtTime(NOON + 999 * SECOND))
        assert raised.value.hint == "other lines of history: --tli 1"

    asyncio.run(work())


def test_what_is_reachable_on_every_line() -> None:
    async def work() -> None:
        archive = Archive()
        old, new, base, fork = await promoted(archive)
        until = NOON + 60 * SECOND
        assert await (await archive.history()).reachable() == (
            ReachableRange(1, base, fork, NOON, NOON + 6 * SECOND, abandoned=False),
            ReachableRange(1, fork, old.end, NOON, until, abandoned=True),
            ReachableRange(3, base, new.end, NOON, NOON + 210 * SECOND, abandoned=False),
        )

    asyncio.run(work())


def test_coverage_of_an_orphan_tail_says_nothing_of_the_new_line() -> None:
    async def work() -> None:
        archive = Archive()
        old, _ = await one_server(archive)
        fork = next(Lsn(record.end) for record in old.records if record.xid == 105)
        new = old.cut_back(fork).promote(2)
        await archive.switch(old, fork, new)
        # The old line is covered up to 60 s past noon; of the new one nothing is known after its last commit.
        assert (await (await archive.history()).resolve(AtTime(NOON + 50 * SECOND), tli=1)).lsn == old.end
        message = await refused(archive, AtTime(NOON + 50 * SECOND))
        assert "not known to be complete" in message
        last = next(record.start for record in old.records if record.end == fork)
        for length in (0, 10, 3000):
            # Nothing, then part of the new server's first record: the head is the fork all the same.
            if length:
                new.fill(5000)
                await archive.archive(new, fork + length)
            target = await (await archive.history()).resolve(Latest())
            assert (target.tli, target.lsn, target.last_record) == (1, fork, last)
        # Even when the new server has written beyond where the old one's coverage was stated.
        new.fill(int(old.end - fork))
        await archive.archive(new)
        assert "not known to be complete" in await refused(archive, AtTime(NOON + 50 * SECOND))
        state = await archive.state()
        assert state.coverage is None
        assert await archive.seal(1) is not None
        state = await archive.state()
        assert state.coverage is not None and state.coverage.lsn < archive.durable[2]
        assert "not known to be complete" in await refused(archive, AtTime(NOON + 50 * SECOND))

    asyncio.run(work())


def test_a_second_fork_from_an_earlier_moment() -> None:
    """A server restored to the past and promoted: its tli forks below where the first one did."""

    async def work() -> None:
        archive = Archive()
        old, new, _base, _fork = await promoted(archive)
        early = next(Lsn(record.end) for record in old.records if record.xid == 102)
        third = old.cut_back(early).promote(4)
        await archive.switch(old, early, third)
        third.commit(NOON + 500 * SECOND, 400)
        await archive.archive(third, covered=NOON + 501 * SECOND)
        history = await archive.history()
        target = await history.resolve(Latest())
        assert target.spans == (Span(1, Lsn(FIRST + 40), early), Span(4, early, third.end))
        assert (await history.resolve(Latest(), tli=3)).lsn == new.end
        assert (await history.resolve(Latest(), tli=1)).lsn == old.end

    asyncio.run(work())


def test_a_snapshot_taken_on_an_orphan_tail_serves_only_that_line() -> None:
    """EDGE 18: spliced into the new line it would bring transactions that never happened there."""

    async def work() -> None:
        archive = Archive()
        old, new, _base, fork = await promoted(archive)
        redo = Lsn(next(record.start for record in old.records if record.xid == 107))
        await archive.snapshot("orphan", 1, redo, time=NOON + 7 * SECOND)
        across = next(record.start for record in old.records if record.xid == 104)
        await archive.snapshot("across", 1, across, redo, time=NOON + 7 * SECOND)
        new.fill(int(old.end - fork))
        await archive.archive(new)
        history = await archive.history()
        assert (await history.resolve(Latest())).snapshot.id == "base"
        assert (await history.resolve(Latest(), tli=1)).snapshot.id == "orphan"
        assert (await history.resolve(AtLsn(redo), tli=1)).snapshot.id == "orphan"

    asyncio.run(work())


async def wal_of(history: History, spans: list[Span]) -> bytes:
    read = b""
    async with aclosing(history.wal(spans)) as pieces:
        async for found in pieces:
            read += found.data
    return read


@pytest.mark.parametrize("sealed", [False, True])
def test_wal_of_any_span(sealed: bool) -> None:
    async def work() -> None:
        archive = Archive()
        old, new, base, fork = await promoted(archive)
        if sealed:
            await archive.seal(1)
        history = await archive.history()
        for start, end in ((FIRST, old.end), (FIRST + 1, fork), (fork - 3, fork + 3), (base, base)):
            assert await wal_of(history, [Span(1, Lsn(start), Lsn(end))]) == old.bytes(start, end)
        assert await wal_of(history, [Span(1, FIRST, fork), Span(3, fork, new.end)]) == old.bytes(
            FIRST, fork
        ) + new.bytes(fork, new.end)
        for span in (Span(1, Lsn(FIRST - 1), fork), Span(3, fork, Lsn(new.end + 1)), Span(3, FIRST, fork)):
            with pytest.raises(TargetUnreachable, match="not all in the store"):
                await wal_of(history, [span])
        plan = await history.plan_wal([Span(1, base, fork)])
        assert (plan[0].start, plan[-1].end) == (base, fork)
        assert all(piece.stored_bytes > 0 for piece in plan)

    asyncio.run(work())


def test_chunks_sealed_and_collected_while_a_reader_reads() -> None:
    """The log names something that is gone: it is read again, once, and the reader notices nothing."""

    async def work(resolving: bool) -> None:
        archive = Archive()
        server, _ = await one_server(archive)
        armed, collected = resolving, False

        async def collect(call: Call) -> None:
            nonlocal collected
            if call.verb == "get" and call.key.startswith("wal/") and armed and not collected:
                collected = True
                await archive.seal()
                chunks = await archive.store.list("wal/")
                await archive.store.delete([listed.key for listed in chunks])

        history = await History.load(FaultyStore(archive.store, before=collect))
        target = await history.resolve(Latest())
        assert target.lsn == server.end
        armed = True
        assert await wal_of(history, list(target.spans)) == server.bytes(FIRST + 40, server.end)
        assert collected

    asyncio.run(work(True))
    asyncio.run(work(False))


def test_half_read_wal_goes_on_where_it_was() -> None:
    async def work() -> None:
        archive = Archive()
        server, _ = await one_server(archive, commits=60)
        history = await archive.history()
        target = await history.resolve(Latest())
        read = b""
        async with aclosing(history.wal(target.spans)) as pieces:
            async for found in pieces:
                if not read:
                    await archive.seal()
                    chunks = await archive.store.list("wal/")
                    await archive.store.delete([listed.key for listed in chunks])
                read += found.data
        assert read == server.bytes(FIRST + 40, server.end)

    asyncio.run(work())


def test_what_stays_missing_is_damage() -> None:
    """EDGE 63: after one reload; by name, and a manifest is a hole in the history."""

    async def work() -> None:
        archive = Archive()
        await one_server(archive)
        await archive.seal()
        for prefix, error in (("packs/", MissingObject), ("manifests/", TargetUnreachable)):
            (listed,) = [
                one for one in await archive.store.list(prefix) if one.size > SNAPSHOT_MANIFEST_BYTES
            ]
            data = await archive.store.get(listed.key)
            await archive.store.delete([listed.key])
            history = await archive.history()
            with pytest.raises(error) as raised:
                await history.resolve(BeforeXid(105))
            assert listed.key in raised.value.message
            await archive.store.create(listed.key, data)
        await history.reload()
        assert (await history.resolve(BeforeXid(105))).next_commit is not None

    asyncio.run(work())


@pytest.mark.parametrize("prefix", ["packs/", "manifests/"])
def test_no_flipped_bit_is_handed_on(prefix: str) -> None:
    """P5."""

    async def work() -> None:
        archive = Archive()
        server, _ = await one_server(archive)
        await archive.seal()
        (listed,) = [one for one in await archive.store.list(prefix) if one.size > SNAPSHOT_MANIFEST_BYTES]
        data = await archive.store.get(listed.key)
        for position in range(200, len(data), max(1, len(data) // 40)):
            wrong = bytearray(data)
            wrong[position] ^= 0x10
            await archive.store.delete([listed.key])
            await archive.store.create(listed.key, bytes(wrong))
            history = await archive.history()
            with pytest.raises(DamagedStore):
                await wal_of(history, [Span(1, FIRST, server.end)])

    asyncio.run(work())


def test_reading_needs_no_permission_to_write() -> None:
    """P10."""

    async def work() -> None:
        archive = Archive()
        _server, _ = await one_server(archive)
        await archive.seal()

        async def read_only(call: Call) -> None:
            assert call.verb in ("get", "list")

        history = await History.load(FaultyStore(archive.store, before=read_only))
        target = await history.resolve(AtTime(NOON + 4 * SECOND))
        await wal_of(history, list(target.spans))
        await history.reachable()
        assert await history.source_clock() == NOON + 60 * SECOND

    asyncio.run(work())


def test_waiting_for_the_source_s_position() -> None:
    async def work() -> None:
        archive = Archive()
        server, _ = await one_server(archive)
        wanted = server.commit(NOON + 70 * SECOND, 900).end
        with pytest.raises(Unavailable, match="not yet"):
            await wait_for(archive.store, archive.clock, Lsn(wanted), timeout_seconds=5)
        assert sum(archive.clock.slept) == pytest.approx(5)
        polls = 0

        async def archive_it(call: Call) -> None:
            nonlocal polls
            polls += call.key.endswith("/log/")
            if polls == 3:
                await archive.archive(server)

        store = FaultyStore(archive.store, before=archive_it)
        history = await wait_for(store, archive.clock, Lsn(wanted), timeout_seconds=5)
        assert (await history.resolve(AtLsn(Lsn(wanted)))).lsn == wanted

    asyncio.run(work())


def test_a_backup_in_the_middle_of_a_segment_needs_that_segment_s_beginning() -> None:
    """Postgres checks the header of the segment it begins to read in."""

    async def work() -> None:
        archive = Archive()
        server, _ = await one_server(archive)
        resumed = Lsn(server.fill(SEGMENT_BYTES // 4).end)
        await archive.lose(server, resumed)
        redo = resumed
        server.fill(5000)
        await archive.archive(server)
        await archive.snapshot("unusable", 1, redo, server.end)
        assert "no base backup is complete" in await refused(archive, Latest())

    asyncio.run(work())
