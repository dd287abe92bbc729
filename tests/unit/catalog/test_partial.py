"""Incomplete copies of a store: every moment is what it is in the whole one, or refused by name (EDGE 63)."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing

import pytest

from tests.support.archived_wal import FIRST, NOON, SECOND, Archive, Server
from timeline.catalog.history import History
from timeline.catalog.target import Target
from timeline.catalog.when import AtLsn, AtTime, Latest, When
from timeline.errors import MissingObject, TargetUnreachable, TimelineError, UsageError
from timeline.format import keys, log
from timeline.lsn import Lsn
from timeline.store.memory import MemoryStore


async def whole(*, seals: int = 6) -> tuple[Archive, Server]:
    """A store with a base backup, sealed WAL and a tail."""
    archive, server = Archive(), Server(1, FIRST)
    await archive.begin(server)
    server.fill(100)
    server.commit(NOON, 3)
    base_end = server.end
    server.fill(10)
    await archive.archive(server)
    await archive.snapshot("base", 1, FIRST + 40, base_end)
    for number in range(seals):
        for piece in range(2):
            server.commit(NOON + (2 * number + piece) * SECOND, 100 + 2 * number + piece)
            server.fill(300)
            await archive.archive(server)
        await archive.seal()
    server.commit(NOON + 100 * SECOND, 900)
    await archive.archive(server)
    server.commit(NOON + 101 * SECOND, 901)
    await archive.archive(server, covered=NOON + 102 * SECOND)
    return archive, server


async def copy(archive: Archive, keep: set[str]) -> MemoryStore:
    store = MemoryStore()
    for key in keep:
        await store.create(key, await archive.store.get(key))
    return store


async def all_keys(archive: Archive) -> list[str]:
    return sorted(listed.key for listed in await archive.store.list(""))


async def without(archive: Archive, *gone: str) -> History:
    return await History.load(await copy(archive, set(await all_keys(archive)) - set(gone)))


def test_a_manifest_that_is_missing() -> None:
    """Before it everything, behind it nothing, and the latest moment is not silently another one."""

    async def work() -> None:
        archive, _ = await whole()
        sealed = (await archive.state()).sealed
        key = keys.manifest(sealed[3].manifest.digest)
        truth = await archive.history()
        history = await without(archive, key)
        early = AtLsn(sealed[2].start)
        assert await history.resolve(early) == await truth.resolve(early)
        for when in (
            Latest(),
            AtLsn(sealed[4].start),
            AtLsn(Lsn(sealed[3].start + 90)),
            AtTime(NOON + 9 * SECOND),
        ):
            with pytest.raises(TargetUnreachable) as raised:
                await (await without(archive, key)).resolve(when)
            assert key in raised.value.message and "reachable" in raised.value.message
        (window,) = await history.reachable()
        assert window.last == sealed[3].start
        assert key in " ".join(await history.remarks())

    asyncio.run(work())


def test_a_log_entry_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below a newer one without a state: the log counts up to it."""
    monkeypatch.setattr(log, "STATE_BYTES", 0)

    async def work() -> None:
        archive, server = await whole()
        head = await archive.log.load()
        assert head is not None
        gone = keys.log_entry("main", head.number - 2)
        history = await without(archive, gone)
        assert history.number == head.number - 3
        with pytest.raises(TargetUnreachable) as raised:
            await history.resolve(Latest())
        assert gone in raised.value.message
        when = AtLsn(Lsn(server.records[-1].start))
        assert (await history.resolve(when)).lsn == (await (await archive.history()).resolve(when)).lsn

    asyncio.run(work())


def test_a_chunk_of_the_chain_that_is_missing() -> None:
    async def work() -> None:
        archive, server = await whole()
        sealed = (await archive.state()).sealed[-1].end
        history = await without(archive, keys.chunk("main", 1, sealed))
        assert (await history.resolve(Latest())).lsn == sealed
        assert str(sealed) in " ".join(await history.remarks())
        with pytest.raises(TargetUnreachable):
            await history.resolve(AtLsn(server.end))

    asyncio.run(work())


def test_a_pack_that_is_missing_is_named() -> None:
    async def work() -> None:
        archive, _ = await whole()
        (key, *_) = [key for key in await all_keys(archive) if key.startswith("packs/")]
        truth = await archive.history()
        target = await truth.resolve(Latest())
        history = await without(archive, key)
        with pytest.raises(MissingObject) as raised:
            async with aclosing(history.wal(target.spans)) as pieces:
                async for _found in pieces:
                    pass
        assert raised.value.key == key

    asyncio.run(work())


@pytest.mark.parametrize("states", [0, 600, log.STATE_BYTES], ids=["long", "in tenths", "short"])
@pytest.mark.parametrize("seed", range(27))
def test_any_part_of_a_store(seed: int, states: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """P7: closed under nothing."""
    monkeypatch.setattr(log, "STATE_BYTES", states)

    async def work() -> None:
        archive, server = await whole()
        chance = random.Random(seed)
        truth = await archive.history()
        kept = {key for key in await all_keys(archive) if chance.random() > chance.choice([0.02, 0.1, 0.3])}
        gone = set(await all_keys(archive)) - kept
        store = await copy(archive, kept | {"tl.json"})
        whens: list[When] = [AtTime(NOON + number * SECOND) for number in (0, 3, 8, 11, 60, 101)]
        whens += [AtLsn(Lsn(record.start)) for record in server.records[5::6]]
        whens.append(Latest())
        for when in whens:
            try:
                target: Target = await (await History.load(store)).resolve(when)
            except (TargetUnreachable, MissingObject, UsageError) as error:
                assert gone
                assert_honest(error, gone)
                continue
            if isinstance(when, Latest):
                assert target.lsn <= server.end
                when = AtLsn(target.lsn)
            real = await truth.resolve(when)
            assert (target.lsn, target.last_record) == (real.lsn, real.last_record)
            try:
                async with aclosing((await History.load(store)).wal(target.spans)) as pieces:
                    wal = b"".join([bytes(found.data) async for found in pieces])
                assert wal == server.bytes(target.snapshot.lsn, target.lsn)
            except MissingObject as error:
                assert error.key in gone

    asyncio.run(work())


def assert_honest(error: TimelineError, gone: set[str]) -> None:
    if isinstance(error, MissingObject):
        assert error.key in gone
    elif isinstance(error, TargetUnreachable):
        assert "reachable" in error.message
    else:
        # Without a single entry of its log a branch was never begun.
        assert "nothing was ever archived" in error.message
