"""What is garbage and what is not (SPEC.md, chapter 9; P2, P10; EDGE 42)."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.support.archived_wal import FIRST, NOON, SECOND, Archive, Server
from tests.support.small_snapshot import put_snapshot
from timeline.catalog.meta import create_store
from timeline.errors import DamagedStore, MissingObject, Unavailable, UsageError
from timeline.format import branch_state, keys, log
from timeline.format.branch_state import BackupProgress, SealedRange
from timeline.format.log_change import DropSnapshots, RecordProgress, Seal
from timeline.format.manifest import ManifestRef
from timeline.format.pin import PIN_MARGIN_MICROS, Pin, encode_pin
from timeline.maintain import garbage
from timeline.maintain.garbage import (
    CHUNKS,
    ENTRIES,
    MANIFESTS,
    MARKS,
    PACKS,
    PINS,
    Found,
    find_garbage,
    kind_of,
)
from timeline.maintain.reach import FILES, PAGES, WAL, Named, named_in
from timeline.store.faulty import Call, FaultyStore

DAY = 86_400


async def begun() -> tuple[Archive, Server]:
    archive, server = Archive(), Server(1, FIRST)
    await archive.begin(server)
    return archive, server


async def found_in(archive: Archive) -> Found:
    before = [one.key for one in await archive.store.list("")]
    found = await find_garbage(archive.store, "main", archive.clock, lambda phase, done, total: None)
    assert [one.key for one in await archive.store.list("")] == before
    return found


def amounts(found: Found) -> dict[str, int]:
    return {one.kind: one.objects for one in found.tallies}


def pin_of(
    archive: Archive, snapshot: branch_state.Snapshot, *, until: int, sealed: tuple[SealedRange, ...] = ()
) -> Pin:
    return Pin(archive.clock.token(16), "main", snapshot, until, archive.clock.now(), "test", sealed)


async def put_pin(archive: Archive, pin: Pin) -> None:
    assert await archive.store.create(keys.pin(pin.id), encode_pin(pin))


def test_a_store_in_use_has_none() -> None:
    async def work() -> None:
        archive, server = await begun()
        for number in range(3):
            server.commit(NOON + number * SECOND, 100 + number)
            await archive.archive(server)
        first = await put_snapshot(archive, "one")
        await put_snapshot(archive, "two", after=first)
        found = await found_in(archive)
        assert found.tallies == ()
        assert [(one.kind, one.objects) for one in found.stored] == [(PACKS, 2), (MANIFESTS, 4)]

    asyncio.run(work())


def test_what_a_dropped_snapshot_alone_named() -> None:
    """[COL-3]: what a later one names, too, stays."""

    async def work() -> None:
        archive, _ = await begun()
        first = await put_snapshot(archive, "one")
        second = await put_snapshot(archive, "two", after=first)
        await archive.log.append(DropSnapshots((first.id,)))
        assert {one.key for one in (await found_in(archive)).garbage} == {keys.manifest(first.files.digest)}
        await archive.log.append(DropSnapshots((second.id,)))
        assert amounts(await found_in(archive)) == {PACKS: 2, MANIFESTS: 4}

    asyncio.run(work())


def test_what_was_never_committed() -> None:
    async def work() -> None:
        archive, _ = await begun()
        await put_snapshot(archive, "lost", commit=False)
        assert amounts(await found_in(archive)) == {PACKS: 1, MANIFESTS: 2}

    asyncio.run(work())


def test_progress_of_a_backup_keeps_its_packs() -> None:
    async def work() -> None:
        archive, _ = await begun()
        under_way = await put_snapshot(archive, "half", commit=False)
        await archive.log.append(RecordProgress(BackupProgress("p", under_way.pages, 1, 1)))
        assert {one.key for one in (await found_in(archive)).garbage} == {
            keys.manifest(under_way.files.digest)
        }
        await archive.log.append(RecordProgress(None))
        assert amounts(await found_in(archive)) == {PACKS: 1, MANIFESTS: 2}

    asyncio.run(work())


def test_chunks_are_void_below_the_sealed_lsn_only() -> None:
    """[COL-4]: the chain, orphans beyond its end and chunks of a tli nobody knows stay."""

    async def work() -> None:
        archive, server = await begun()
        for number in range(3):
            server.commit(NOON + number * SECOND, 100 + number)
            await archive.archive(server)
        assert amounts(await found_in(archive)) == {}
        sealed = await archive.seal()
        assert sealed is not None
        server.commit(NOON + 9 * SECOND, 109)
        await archive.archive(server)
        chunk = (await archive.store.list(keys.chunk_prefix("main", 1)))[-1]
        data = await archive.store.get(chunk.key)
        await archive.store.create(keys.chunk("main", 1, server.end + 5000), data)
        await archive.store.create(keys.chunk("main", 7, FIRST), data)
        await archive.store.create("wal/other/1/0000000000000000", data)
        found = await found_in(archive)
        assert amounts(found) == {CHUNKS: 3}
        assert [(void.tli, void.below) for void in found.chunks] == [(1, sealed.end)]

    asyncio.run(work())


def test_sealed_wal_stays() -> None:
    async def work() -> None:
        archive, server = await begun()
        server.commit(NOON, 100)
        await archive.archive(server)
        assert await archive.seal() is not None
        assert amounts(await found_in(archive)) == {CHUNKS: 1}

    asyncio.run(work())


def test_pins_keep_their_snapshot_until_they_expire() -> None:
    """[PIN-1]: with a margin for clocks that differ."""

    async def work() -> None:
        archive, _ = await begun()
        snapshot = await put_snapshot(archive, "pinned")
        pin = pin_of(archive, snapshot, until=archive.clock.now() + DAY * SECOND)
        await put_pin(archive, pin)
        await archive.log.append(DropSnapshots((snapshot.id,)))
        found = await found_in(archive)
        assert (found.tallies, found.pins) == ((), 1)
        archive.clock.advance(DAY + PIN_MARGIN_MICROS / 1e6)
        assert (await found_in(archive)).tallies == ()
        archive.clock.advance(1)
        found = await found_in(archive)
        assert (amounts(found), found.pins) == ({PACKS: 1, MANIFESTS: 2, PINS: 1}, 0)

    asyncio.run(work())


def test_a_pin_names_sealed_wal_too() -> None:
    async def work() -> None:
        archive, server = await begun()
        snapshot = await put_snapshot(archive, "s")
        server.commit(NOON, 100)
        await archive.archive(server)
        sealed = await archive.seal()
        assert sealed is not None
        pin = pin_of(archive, snapshot, until=archive.clock.now(), sealed=(sealed,))
        assert set(named_in(pin)) == {
            Named(FILES, snapshot.files),
            Named(PAGES, snapshot.pages[0]),
            Named(WAL, sealed.manifest),
        }

    asyncio.run(work())


def test_a_pin_that_cannot_be_read_stops_everything() -> None:
    """[PIN-3]: nobody knows what it keeps."""

    async def work() -> None:
        archive, _ = await begun()
        await archive.store.create(keys.pin("ab" * 16), b"not a pin\n")
        with pytest.raises(DamagedStore, match="pins/abab"):
            await found_in(archive)

    asyncio.run(work())


def test_a_pin_whose_objects_are_gone_keeps_nothing_and_harms_nothing() -> None:
    async def work() -> None:
        archive, _ = await begun()
        snapshot = await put_snapshot(archive, "s", commit=False)
        await archive.store.delete([keys.manifest(snapshot.pages[0].digest)])
        await put_pin(archive, pin_of(archive, snapshot, until=archive.clock.now()))
        assert amounts(await found_in(archive)) == {PACKS: 1}

    asyncio.run(work())


def test_old_log_entries() -> None:
    """[COL-3]: back to the nearest entry that must have a state."""

    async def work() -> None:
        archive, _ = await begun()
        for number in range(log.STATE_EVERY * 2 + 5):
            await archive.log.append(RecordProgress(BackupProgress(str(number), (), 1, 1)))
        found = await found_in(archive)
        assert amounts(found) == {ENTRIES: 2 * log.STATE_EVERY}
        assert found.entries.below == 2 * log.STATE_EVERY

    asyncio.run(work())


def test_marks_that_no_entry_names() -> None:
    async def work() -> None:
        archive, _ = await begun()
        await archive.store.create(keys.mark("cd" * 16), b"of a collector that was killed\n")
        assert amounts(await found_in(archive)) == {MARKS: 1}

    asyncio.run(work())


def test_keys_of_no_known_form_are_never_garbage() -> None:
    """[KEY-4], [COL-5]"""
    strange = (
        "probe/x",
        "packs/ab/short",
        "packs/ab/" + "cd" * 32,
        "packs/ab/" + "ab" * 32 + ".bak",
        "manifests/x.parquet",
        "pins/readme",
        "marks/readme",
        "wal/main/1/nothex",
        "branches/main/log/readme",
        "other",
    )

    async def work() -> None:
        archive, _ = await begun()
        for key in strange:
            await archive.store.create(key, b"x")
        assert (await found_in(archive)).tallies == ()

    asyncio.run(work())
    for key in (*strange, keys.META):
        with pytest.raises(ValueError, match="never garbage"):
            kind_of(key)


def test_one_mark_holds_so_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "MARK_KEYS", 2)

    async def work() -> None:
        archive, _ = await begun()
        await put_snapshot(archive, "lost", commit=False)
        found = await found_in(archive)
        assert (len(found.garbage), found.left_over) == (2, 1)

    asyncio.run(work())


def test_pages_of_chunks_and_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "PAGE_KEYS", 2)

    async def work() -> None:
        archive, server = await begun()
        for number in range(5):
            server.commit(NOON + number * SECOND, 100 + number)
            await archive.archive(server)
        assert await archive.seal() is not None
        for number in range(log.STATE_EVERY):
            await archive.log.append(RecordProgress(BackupProgress(str(number), (), 1, 1)))
        assert amounts(await found_in(archive)) == {CHUNKS: 5, ENTRIES: log.STATE_EVERY}

    asyncio.run(work())


@pytest.mark.parametrize("key", ["branches/fix/log/99999999999999999999.json", "catalog/log/0.json"])
def test_stores_of_several_branches_are_refused(key: str) -> None:
    """[COL-11]"""

    async def work() -> None:
        archive, _ = await begun()
        await archive.store.create(key, b"x")
        with pytest.raises(UsageError, match="cannot collect around"):
            await found_in(archive)

    asyncio.run(work())


def test_nothing_archived() -> None:
    async def work() -> None:
        archive = Archive()
        await create_store(archive.store, archive.clock)
        with pytest.raises(UsageError, match="nothing was ever archived as main"):
            await found_in(archive)

    asyncio.run(work())


def test_a_missing_manifest_is_damage_and_not_garbage() -> None:
    async def work() -> None:
        archive, _ = await begun()
        snapshot = await put_snapshot(archive, "s")
        key = keys.manifest(snapshot.pages[0].digest)
        await archive.store.delete([key])
        with pytest.raises(MissingObject, match=key):
            await found_in(archive)

    asyncio.run(work())


def test_what_was_dropped_and_collected_behind_our_back_is_no_damage() -> None:
    async def work() -> None:
        archive, _ = await begun()
        snapshot = await put_snapshot(archive, "s")
        key = keys.manifest(snapshot.pages[0].digest)

        async def collect_it(call: Call) -> None:
            if call.key == key:
                await archive.log.append(DropSnapshots((snapshot.id,)))
                await archive.store.delete([key])

        store = FaultyStore(archive.store, before=collect_it)
        with pytest.raises(Unavailable, match="was collected while"):
            await find_garbage(store, "main", archive.clock, lambda *_: None)

    asyncio.run(work())


def test_a_damaged_manifest_is_damage() -> None:
    """P5"""

    async def work() -> None:
        archive, _ = await begun()
        snapshot = await put_snapshot(archive, "s")
        ref = snapshot.pages[0]
        data = bytearray(await archive.store.get(keys.manifest(ref.digest)))
        data[10] ^= 1
        await archive.store.delete([keys.manifest(ref.digest)])
        await archive.store.create(keys.manifest(ref.digest), bytes(data))
        with pytest.raises(DamagedStore, match="BLAKE3"):
            await found_in(archive)

    asyncio.run(work())


def test_manifests_are_found_in_changes_of_every_kind() -> None:
    """By their holders: a kind of change that holds sealed ranges or snapshots in any way is understood."""
    ref = ManifestRef("ab" * 32, 1, 1, 1, "cd" * 32)
    sealed = SealedRange(1, FIRST, FIRST, ref, None, None, 0)
    assert list(named_in(Seal(sealed, None, 3))) == [Named(WAL, ref)]
    assert list(named_in(RecordProgress(BackupProgress("p", (ref, ref), 1, 1)))) == [Named(PAGES, ref)] * 2
    assert list(named_in(DropSnapshots(("a",)))) == []
    assert list(named_in((sealed, (replace(sealed),)))) == [Named(WAL, ref)] * 2
    with pytest.raises(TypeError, match="unknown kind"):
        list(named_in((ref,)))
