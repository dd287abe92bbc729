"""Marking, waiting, collecting: who is kept out, what is kept, what a crash leaves (SPEC.md, chapter 9; EDGE 42, 43)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from tests.support.archived_wal import FIRST, NOON, SECOND, Archive, Server
from tests.support.manual_clock import ManualClock
from tests.support.small_snapshot import put_snapshot
from timeline.catalog.branch_log import BranchLog, read_head
from timeline.errors import LogConflict, MissingObject, Superseded, Unavailable
from timeline.format import branch_state, keys, log, log_change
from timeline.format.branch_state import BackupProgress, Collection, OpenMark
from timeline.format.log import decode_entry
from timeline.format.log_change import AddSnapshot, Collect, DropSnapshots, Mark, RecordProgress
from timeline.format.pin import Pin, encode_pin
from timeline.maintain import collect as collecting
from timeline.maintain.collect import GRACE_SECONDS, Collected, Marked, collect, mark, unfinished
from timeline.maintain.garbage import CHUNKS, MANIFESTS, MARKS, PACKS
from timeline.maintain.seal import seal
from timeline.store.base import Refused, Store
from timeline.store.faulty import Call, Crashed, FaultyStore
from timeline.store.memory import MemoryStore


def quiet(phase: str, done: int, total: int) -> None:
    pass


async def begun(store: Store | None = None) -> Archive:
    archive = Archive(store)
    await archive.begin(Server(1, FIRST))
    return archive


async def marked(archive: Archive) -> Marked:
    return await mark(archive.store, archive.log, archive.clock, quiet)


async def collected(archive: Archive) -> Collected | None:
    return await collect(archive.store, archive.log, archive.clock, GRACE_SECONDS, quiet)


async def marked_and_due(archive: Archive) -> Marked:
    done = await marked(archive)
    archive.clock.advance(GRACE_SECONDS)
    return done


def amounts(done: Collected | None) -> dict[str, int]:
    assert done is not None
    return {one.kind: one.objects for one in done.deleted}


async def names(archive: Archive, prefix: str) -> list[str]:
    return [one.key for one in await archive.store.list(prefix)]


def test_two_runs_a_grace_period_apart() -> None:
    async def work() -> None:
        archive = await begun()
        await put_snapshot(archive, "lost", commit=False)
        before = len(await names(archive, "packs/")) + len(await names(archive, "manifests/"))
        done = await marked(archive)
        assert done.mark is not None
        archive.clock.advance(GRACE_SECONDS - 1)
        assert await collected(archive) is None
        assert len(await names(archive, "packs/")) + len(await names(archive, "manifests/")) == before == 3
        archive.clock.advance(1)
        result = await collected(archive)
        assert result is not None
        assert (amounts(result), result.kept, result.refused, result.finished) == (
            {PACKS: 1, MANIFESTS: 2},
            0,
            (),
            True,
        )
        assert await names(archive, "packs/") == await names(archive, "manifests/") == []
        assert await names(archive, "marks/") == []
        assert (await marked(archive)).mark is None

    asyncio.run(work())


def test_nothing_to_mark_writes_nothing() -> None:
    async def work() -> None:
        archive = await begun()
        before = await names(archive, "")
        assert (await marked(archive)).mark is None
        assert await names(archive, "") == before

    asyncio.run(work())


def test_one_mark_is_open_at_a_time() -> None:
    async def work() -> None:
        archive = await begun()
        await put_snapshot(archive, "lost", commit=False)
        await marked(archive)
        with pytest.raises(Unavailable, match="open already"):
            await marked(archive)

    asyncio.run(work())


def test_whoever_began_before_the_mark_cannot_commit_after_its_collection() -> None:
    """[COL-2]; a change without `began` is of an earlier version, and of unknown age."""

    async def work() -> None:
        archive = await begun()
        head = await archive.log.load()
        assert head is not None
        slow = await put_snapshot(archive, "slow", commit=False)
        await marked_and_due(archive)
        await archive.log.append(AddSnapshot(await put_snapshot(archive, "fast", commit=False), head.number))
        assert amounts(await collected(archive)) == {PACKS: 1, MANIFESTS: 2}
        for began in (head.number, None):
            with pytest.raises(Superseded, match="passed entry") as caught:
                await archive.log.append(AddSnapshot(slow, began))
            assert caught.value.exit_code == 7
            assert caught.value.hint is not None
        with pytest.raises(Superseded):
            await archive.log.append(RecordProgress(BackupProgress("p", (), 1, 1), head.number))
        await archive.log.append(RecordProgress(None))
        head = await archive.log.load()
        assert head is not None
        await put_snapshot(archive, "anew", began=head.number)

    asyncio.run(work())


def test_what_was_named_since_the_mark_stays() -> None:
    """[COL-6]: committed by a writer that began before the mark, and in time."""

    async def work() -> None:
        archive = await begun()
        head = await archive.log.load()
        assert head is not None
        slow = await put_snapshot(archive, "slow", commit=False)
        await marked_and_due(archive)
        await archive.log.append(AddSnapshot(slow, head.number))
        done = await collected(archive)
        assert done is not None
        assert (done.deleted, done.kept) == ((), 3)
        # Named since, and dropped since: it is for the next mark.
        await archive.log.append(DropSnapshots((slow.id,)))
        await marked_and_due(archive)
        assert amounts(await collected(archive)) == {PACKS: 1, MANIFESTS: 2}

    asyncio.run(work())


def test_a_pin_made_since_the_mark_keeps_its_snapshot() -> None:
    """[PIN-2]"""

    async def work() -> None:
        archive = await begun()
        snapshot = await put_snapshot(archive, "s")
        await archive.log.append(DropSnapshots((snapshot.id,)))
        await marked_and_due(archive)
        now = archive.clock.now()
        pin = Pin("ab" * 16, "main", snapshot, now, now, "test")
        await archive.store.create(keys.pin(pin.id), encode_pin(pin))
        done = await collected(archive)
        assert done is not None
        assert (done.deleted, done.kept) == ((), 3)

    asyncio.run(work())


def test_a_sealer_that_slept_through_a_collection_says_so() -> None:
    async def work() -> None:
        archive = Archive()
        server = Server(1, FIRST)
        await archive.begin(server)
        server.commit(NOON, 100)
        await archive.archive(server)
        slept = False

        async def sleep(call: Call) -> None:
            nonlocal slept
            if call.verb == "create" and call.key.startswith("branches/") and not slept:
                slept = True
                await marked_and_due(archive)
                await collected(archive)

        store = FaultyStore(archive.store, before=sleep)
        clock = ManualClock(seed=7)
        with pytest.raises(Unavailable, match="sealing took too long"):
            await seal(store, BranchLog(store, "main", clock, "sealer"), clock, force=True)
        assert await names(archive, "packs/") == []
        assert await archive.seal() is not None

    asyncio.run(work())


@pytest.mark.parametrize("crash_at", range(14))
def test_a_crashed_collection_is_gone_on_with(crash_at: int) -> None:
    """[COL-7]: nobody marks before it is finished; the same things are deleted."""

    async def work() -> bool:
        archive = await begun()
        kept = await put_snapshot(archive, "kept")
        await put_snapshot(archive, "lost", commit=False)
        await marked_and_due(archive)
        store = FaultyStore(archive.store, crash_at=crash_at)
        clock = ManualClock(now=archive.clock.now(), seed=5)
        try:
            await collect(store, BranchLog(store, "main", clock, "crashing"), clock, GRACE_SECONDS, quiet)
            crashed = False
        except Crashed:
            crashed = True
        head = await read_head(archive.store, "main")
        assert head is not None
        if await unfinished(archive.store, head) is not None:
            with pytest.raises(Unavailable, match="not finished"):
                await marked(archive)
        await collected(archive)
        assert await names(archive, "marks/") == []
        assert {*await names(archive, "manifests/")} == {
            keys.manifest(ref.digest) for ref in (kept.files, *kept.pages)
        }
        assert len(await names(archive, "packs/")) == 1
        return crashed

    crashed = asyncio.run(work())
    assert crashed == (crash_at < 6)


def test_two_collectors_at_once() -> None:
    async def work() -> None:
        archive = await begun()
        await put_snapshot(archive, "lost", commit=False)
        await marked_and_due(archive)
        other = BranchLog(archive.store, "main", ManualClock(seed=9), "other")
        results = await asyncio.gather(
            collected(archive), collect(archive.store, other, archive.clock, GRACE_SECONDS, quiet)
        )
        assert any(results)
        assert await names(archive, "marks/") == await names(archive, "packs/") == []

    asyncio.run(work())


def test_a_collector_that_slept_stops_when_the_mark_is_gone() -> None:
    """[COL-6]: by then even the log entries that it would read may be gone."""

    async def work() -> None:
        archive = await begun()
        await put_snapshot(archive, "lost", commit=False)
        await marked_and_due(archive)
        slept = False

        async def sleep(call: Call) -> None:
            nonlocal slept
            if call.verb == "list" and call.key == keys.PINS and not slept:
                slept = True
                assert amounts(await collected(archive)) == {PACKS: 1, MANIFESTS: 2}

        store = FaultyStore(archive.store, before=sleep)
        clock = ManualClock(now=archive.clock.now(), seed=5)
        sleeper = BranchLog(store, "main", clock, "sleeper")
        assert await collect(store, sleeper, clock, GRACE_SECONDS, quiet) is None
        assert slept

    asyncio.run(work())


def test_a_marker_that_slept_through_a_collection_is_refused() -> None:
    """[COL-7]: it does not know whether that one is finished."""

    async def work() -> None:
        archive = await begun()
        await put_snapshot(archive, "lost", commit=False)
        slept = False

        async def sleep(call: Call) -> None:
            nonlocal slept
            if call.verb == "create" and call.key.startswith("marks/") and not slept:
                slept = True
                await marked_and_due(archive)
                await collected(archive)

        store = FaultyStore(archive.store, before=sleep)
        clock = ManualClock(seed=5)
        with pytest.raises(Unavailable, match="another collector"):
            await mark(store, BranchLog(store, "main", clock, "sleeper"), clock, quiet)
        # What it wrote is garbage like any other.
        await marked_and_due(archive)
        assert amounts(await collected(archive)) == {MARKS: 1}

    asyncio.run(work())


def test_a_manifest_that_the_log_names_and_nobody_has_stops_the_collection() -> None:
    async def work() -> None:
        archive = await begun()
        await put_snapshot(archive, "lost", commit=False)
        await marked_and_due(archive)
        snapshot = await put_snapshot(archive, "damaged", began=0)
        await archive.store.delete([keys.manifest(snapshot.pages[0].digest)])
        before = await names(archive, "packs/")
        with pytest.raises(MissingObject):
            await collected(archive)
        assert await names(archive, "packs/") == before

    asyncio.run(work())


class LockedStore(MemoryStore):
    """Refuses to delete what begins like that, as object lock and policies do."""

    locked = "no"

    async def delete(self, keys: Sequence[str]) -> Sequence[Refused]:
        free = [key for key in keys if not key.startswith(self.locked)]
        await super().delete(free)
        return [Refused(key, "AccessDenied") for key in keys if key not in free]


def test_what_the_store_refuses_to_delete_is_counted_and_stays_garbage() -> None:
    """EDGE 43, [COL-10]"""

    async def work() -> None:
        store = LockedStore()
        archive = await begun(store)
        await put_snapshot(archive, "lost", commit=False)
        await marked_and_due(archive)
        store.locked = "manifests/"
        done = await collected(archive)
        assert amounts(done) == {PACKS: 1}
        assert done is not None
        assert [(one.kind, one.objects, one.reason) for one in done.refused] == [
            (MANIFESTS, 2, "AccessDenied")
        ]
        assert done.finished
        await marked_and_due(archive)
        store.locked = "no"
        assert amounts(await collected(archive)) == {MANIFESTS: 2}

    asyncio.run(work())


def test_a_store_that_deletes_nothing_keeps_its_mark_and_stays_whole() -> None:
    """EDGE 43"""

    async def work() -> None:
        store = LockedStore()
        archive = await begun(store)
        kept = await put_snapshot(archive, "kept")
        await put_snapshot(archive, "lost", commit=False)
        await marked_and_due(archive)
        store.locked = ""
        for _ in range(2):
            done = await collected(archive)
            assert done is not None
            assert (done.deleted, done.finished, len(done.refused)) == ((), False, 2)
            with pytest.raises(Unavailable, match="not finished"):
                await marked(archive)
        assert (await archive.state()).snapshots == (kept,)
        store.locked = "no"
        assert amounts(await collected(archive)) == {PACKS: 1, MANIFESTS: 2}

    asyncio.run(work())


def test_chunks_and_old_entries_go_and_the_log_still_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "BATCH_KEYS", 3)

    async def work() -> None:
        archive = Archive()
        server = Server(1, FIRST)
        await archive.begin(server)
        for number in range(5):
            server.commit(NOON + number * SECOND, 100 + number)
            await archive.archive(server)
        assert await archive.seal() is not None
        for number in range(log.STATE_EVERY):
            await archive.log.append(RecordProgress(BackupProgress(str(number), (), 1, 1)))
        state = await archive.state()
        await marked_and_due(archive)
        done = await collected(archive)
        assert amounts(done)[CHUNKS] == 5
        assert await names(archive, "wal/") == []
        after = await archive.state()
        assert (after.sealed, after.progress, after.tlis) == (state.sealed, state.progress, state.tlis)

    asyncio.run(work())


def test_entries_require_the_feature_from_the_first_mark_on() -> None:
    """[COL-9]: a version that would drop the collection from the state does not get to read it."""

    async def work() -> None:
        archive = await begun()
        await put_snapshot(archive, "lost", commit=False)
        await marked_and_due(archive)
        await collected(archive)
        await archive.log.append(RecordProgress(None))
        entries = [await archive.store.get(key) for key in await names(archive, "branches/")]
        assert [b'"requires":["collection"]' in entry for entry in reversed(entries)] == [
            False,
            True,
            True,
            True,
        ]
        newest = decode_entry(entries[0], (await names(archive, "branches/"))[0])
        assert newest.state is not None
        assert newest.state.collection.collected == 1

    asyncio.run(work())


def test_changes_of_the_log() -> None:
    state = branch_state.BranchState.empty("main")
    with pytest.raises(LogConflict, match="not open"):
        Collect("a").apply(state)
    opened = Mark("a", 5, 7, None).apply(state)
    assert opened.collection == Collection(OpenMark("a", 5, 7), 0, None)
    with pytest.raises(LogConflict, match="not collected yet"):
        Mark("b", 6, 8, None).apply(opened)
    done = Collect("a").apply(opened)
    assert done.collection == Collection(None, 6, "a")
    with pytest.raises(LogConflict, match="collected meanwhile"):
        Mark("b", 6, 8, None).apply(done)
    log_change.check_began(done, 6)
    with pytest.raises(Superseded):
        log_change.check_began(done, 5)
