"""Pins: when they are written, for how long, and what is said when they are refused."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path

from restore.pin_keeper import MARGIN_SECONDS, PIN_SECONDS, PinNote, is_due, keep_pinned, read_note
from tests.support.archived_wal import FIRST, NOON, Archive, Server
from timeline.clock import Micros
from timeline.errors import Unavailable
from timeline.format import keys
from timeline.format.branch_state import Snapshot
from timeline.format.log_change import DropSnapshots
from timeline.format.pin import Pin, decode_pin
from timeline.store.base import Store
from timeline.store.faulty import Call, FaultyStore

DAY = 86_400
MICROS = 1_000_000


async def based(store: Store | None = None) -> tuple[Archive, Snapshot]:
    archive = Archive(store)
    await archive.begin(Server(1, FIRST))
    return archive, await archive.snapshot("base", 1, FIRST + 40, FIRST + 80)


async def run(
    archive: Archive, snapshot: Snapshot, note: Path, *, days: float, expires: Micros | None
) -> None:
    """The keeper's life for so long."""
    task = asyncio.create_task(
        keep_pinned(
            archive.store,
            archive.clock,
            branch="main",
            snapshot=snapshot,
            expires=expires,
            note=str(note),
            named="fix",
        )
    )
    end = archive.clock.now() + days * DAY * MICROS
    try:
        # Its sleeping takes no time and moves the clock.
        for _ in range(10_000):
            if task.done() or archive.clock.now() > end:
                break
            await asyncio.sleep(0)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def pins(archive: Archive) -> list[Pin]:
    listed = await archive.store.list(keys.PINS)
    found = [decode_pin(await archive.store.get(one.key), one.key) for one in listed]
    return sorted(found, key=lambda pin: pin.until)


def test_one_pin_for_all_of_a_time_to_live(tmp_path: Path) -> None:
    """P10."""

    async def work() -> None:
        archive, snapshot = await based()
        expires = archive.clock.now() + 100 * DAY * MICROS
        await run(archive, snapshot, tmp_path / "pin.json", days=3, expires=expires)
        await run(archive, snapshot, tmp_path / "pin.json", days=1, expires=expires)
        (pin,) = await pins(archive)
        assert (pin.snapshot, pin.branch) == (snapshot, "main")
        assert pin.until == expires + MARGIN_SECONDS * MICROS
        assert "fix" in pin.host
        assert read_note(tmp_path / "pin.json") == PinNote(pin.id, pin.until, None)

    asyncio.run(work())


def test_a_branch_without_end_is_pinned_again_in_time(tmp_path: Path) -> None:
    async def work() -> None:
        archive, snapshot = await based()
        await run(archive, snapshot, tmp_path / "pin.json", days=40, expires=None)
        found = await pins(archive)
        assert len(found) == 3
        for one, two in pairwise(found):
            # They overlap by far: nothing is unpinned meanwhile, and a busy month writes two objects.
            assert one.until - two.created > 14 * DAY * MICROS
        assert all(pin.until - pin.created == PIN_SECONDS * MICROS for pin in found)

    asyncio.run(work())


def test_a_short_life_needs_none(tmp_path: Path) -> None:
    async def work() -> None:
        archive, snapshot = await based()
        await run(
            archive, snapshot, tmp_path / "pin.json", days=1, expires=archive.clock.now() + 1800 * MICROS
        )
        assert await pins(archive) == []
        assert read_note(tmp_path / "pin.json") is None

    asyncio.run(work())


def test_refused_it_is_said_and_tried_again(tmp_path: Path) -> None:
    async def work() -> None:
        refusing = True

        async def refuse(call: Call) -> None:
            if refusing and call.verb == "create" and call.key.startswith(keys.PINS):
                raise Unavailable("s3://b: Access Denied")

        archive, snapshot = await based()
        whole = archive.store
        archive.store = FaultyStore(whole, before=refuse)
        note = tmp_path / "pin.json"
        await run(archive, snapshot, note, days=1, expires=None)
        said = read_note(note)
        assert said is not None and said.until is None and said.warning is not None
        assert "Access Denied" in said.warning and "grace period" in said.warning
        refusing = False
        await run(archive, snapshot, note, days=1, expires=None)
        (pin,) = await pins(archive)
        assert read_note(note) == PinNote(pin.id, pin.until, None)

    asyncio.run(work())


def test_a_snapshot_that_left_the_log_first_may_be_lost(tmp_path: Path) -> None:
    """[PIN-2]."""

    async def work() -> None:
        archive, snapshot = await based()
        await archive.log.append(DropSnapshots(("base",)))
        await run(archive, snapshot, tmp_path / "pin.json", days=0, expires=None)
        said = read_note(tmp_path / "pin.json")
        assert said is not None and said.id is not None and said.warning is not None
        assert "may be collected" in said.warning

    asyncio.run(work())


def test_when_another_one_is_due() -> None:
    assert is_due(None, None, NOON)
    assert not is_due(NOON + 16 * DAY * MICROS, None, NOON)
    assert is_due(NOON + 14 * DAY * MICROS, None, NOON)
    assert not is_due(NOON + 2, NOON + 1, NOON)
    assert is_due(NOON + 2, NOON + 3, NOON)
