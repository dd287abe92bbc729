"""The branch log: the head, the commit, who may append, and who lost."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from tests.support.archived_wal import FIRST, incarnation
from tests.support.manual_clock import ManualClock
from timeline.catalog.branch_log import ATTEMPTS, BranchLog, LogHead, read_head
from timeline.errors import DamagedStore, Fenced, LogConflict, MissingObject, Unavailable
from timeline.format import keys
from timeline.format.branch_state import BranchState, Gap, Tli
from timeline.format.log_change import Begin, ClaimEpoch, Cover, RecordGap, RecordProgress
from timeline.format.wal_index import Coverage
from timeline.lsn import Lsn
from timeline.store.faulty import Call, FaultyStore
from timeline.store.memory import MemoryStore


def gap(number: int, *, reason: str = "lost") -> RecordGap:
    """A change that fits once and never again."""
    start = FIRST + number * 1000
    return RecordGap(Gap(1, Lsn(start), Lsn(start + 1), reason))


def cover(time: int) -> Cover:
    return Cover(Coverage(1, FIRST, time))


async def begun(store: MemoryStore | FaultyStore, *, seed: int = 0) -> BranchLog:
    log = BranchLog(store, "main", ManualClock(seed=seed), f"writer-{seed}")
    if await log.load() is None:
        await log.append(Begin(incarnation(FIRST), Tli(1, None, FIRST, FIRST, None, None)))
    return log


def gap_numbers(head: LogHead | None) -> list[int]:
    assert head is not None
    return [(one.start - FIRST) // 1000 for one in head.state.gaps]


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def test_a_branch_never_begun_has_no_head() -> None:
    async def work() -> None:
        assert await read_head(MemoryStore(), "main") is None

    run(work())


def test_changes_follow_one_another() -> None:
    async def work() -> None:
        store = MemoryStore()
        log = await begun(store)
        assert (await log.append(gap(1))).number == 1
        head = await log.append(gap(2))
        assert head == await log.load() == await read_head(store, "main")
        assert head.number == 2
        assert gap_numbers(head) == [1, 2]

    run(work())


def test_a_change_that_does_not_fit_is_refused_and_leaves_nothing() -> None:
    async def work() -> None:
        store = MemoryStore()
        log = await begun(store)
        await log.append(gap(1))
        before = await store.list("")
        with pytest.raises(LogConflict):
            await log.append(gap(1))
        assert await store.list("") == before

    run(work())


def test_reading_the_head_takes_two_requests() -> None:
    async def work() -> None:
        store = MemoryStore()
        log = await begun(store)
        for number in range(5):
            await log.append(gap(number))
        counted = FaultyStore(store)
        await read_head(counted, "main")
        assert [call.verb for call in counted.calls] == ["list", "get"]

    run(work())


@pytest.mark.parametrize("entries", [1, 16, 17, 40, 150, 200])
def test_long_states_are_found_by_walking_back(entries: int) -> None:
    """Entries whose state is too long to repeat lean on the checkpoint of every 100th."""

    async def work() -> None:
        store = MemoryStore()
        log = await begun(store)
        await log.append(gap(0, reason="x" * 70_000))
        for number in range(1, entries + 1):
            await log.append(cover(number))
        head = await read_head(store, "main")
        assert head is not None
        assert head.number == entries + 1
        assert head.state.coverage == Coverage(1, FIRST, entries)
        assert gap_numbers(head) == [0]
        largest = max(listed.size for listed in (await store.list(keys.log_prefix("main")))[:1])
        assert largest < 70_000 or head.number % 100 == 0

    run(work())


def test_states_that_are_not_very_long_are_in_every_tenth() -> None:
    """So that a branch reads ten entries at most, and not a hundred."""

    async def work() -> None:
        store = MemoryStore()
        log = await begun(store)
        await log.append(gap(0, reason="x" * 70_000))
        for number in range(1, 60):
            await log.append(cover(number))
        newest = 60
        counted = FaultyStore(store)
        head = await read_head(counted, "main")
        assert head is not None and head.number == newest
        gets = sum(call.verb == "get" for call in counted.calls)
        assert gets == 1, "the newest is a tenth itself"
        for more in range(1, 10):
            await log.append(cover(newest + more))
            counted.calls.clear()
            head = await read_head(counted, "main")
            assert head is not None and head.state.coverage == Coverage(1, FIRST, newest + more)
            assert sum(call.verb == "get" for call in counted.calls) == 1 + more
        sizes = [listed.size for listed in await store.list(keys.log_prefix("main"))][::-1]
        assert [number for number, size in enumerate(sizes) if size > 70_000] == [1, *range(10, 61, 10)]

    run(work())


@pytest.mark.parametrize("between", [0, 1, 7, 40, 98, 99, 100, 150, 250])
def test_what_was_read_before_is_not_read_again(monkeypatch: pytest.MonkeyPatch, between: int) -> None:
    """Long states: from a known head of the same hundred on only the entries since are read."""
    monkeypatch.setattr("timeline.format.log.STATE_BYTES", 0)

    async def work() -> None:
        store = MemoryStore()
        writer = await begun(store)
        for _ in range(30):
            await writer.append(RecordProgress(None))
        counted = FaultyStore(store)
        reader = BranchLog(counted, "main", ManualClock(seed=3), "reader")
        before = await reader.load()
        assert before is not None
        for _ in range(between):
            head = await writer.append(RecordProgress(None))
        counted.calls.clear()
        found = await reader.load()
        assert found == await read_head(store, "main") and found is not None
        assert found.number == before.number + between
        gets = sum(call.verb == "get" for call in counted.calls)
        same_hundred = before.number // 100 == found.number // 100
        assert gets == between if same_hundred else gets <= found.number % 100 + 1
        if between:
            assert found == head

    run(work())


def test_epochs_bind_archivers_only() -> None:
    """P4: the stale archiver is fenced, everybody else goes on."""

    async def work() -> None:
        store = MemoryStore()
        one, two = await begun(store, seed=1), await begun(store, seed=2)
        first, _ = await one.claim_epoch()
        await one.append(gap(1), epoch=first)
        second, head = await two.claim_epoch()
        assert (first, second, head.state.epoch) == (1, 2, 2)
        with pytest.raises(Fenced, match="epoch is 2, mine 1"):
            await one.append(gap(2), epoch=first)
        await one.append(gap(3))
        await two.append(gap(4), epoch=second)
        assert gap_numbers(await two.load()) == [1, 3, 4]
        with pytest.raises(LogConflict, match="never claimed"):
            await two.append(gap(5), epoch=7)
        with pytest.raises(LogConflict):
            await two.append(ClaimEpoch(9), epoch=9)

    run(work())


def test_losing_the_race_is_tried_again() -> None:
    async def work() -> None:
        store = MemoryStore()
        rival = await begun(store, seed=9)
        raced = 0

        async def interfere(call: Call) -> None:
            nonlocal raced
            if call.verb == "create" and raced < 3:
                raced += 1
                await rival.append(gap(100 + raced))

        log = await begun(FaultyStore(store, before=interfere))
        head = await log.append(gap(1))
        assert head.number == 4
        assert gap_numbers(head) == [101, 102, 103, 1]

    run(work())


def test_losing_the_race_for_the_same_thing_is_a_conflict() -> None:
    async def work() -> None:
        store = MemoryStore()
        rival = await begun(store, seed=9)
        done = False

        async def interfere(call: Call) -> None:
            nonlocal done
            if call.verb == "create" and not done:
                done = True
                await rival.append(gap(1))

        with pytest.raises(LogConflict):
            await (await begun(FaultyStore(store, before=interfere))).append(gap(1))
        assert gap_numbers(await rival.load()) == [1]

    run(work())


def test_a_change_is_checked_against_the_state_it_is_made_to() -> None:
    """Also where that came between the first look and the attempt that succeeds."""

    async def work() -> None:
        store = MemoryStore()
        rival = await begun(store, seed=9)
        looks: list[int] = []

        async def interfere(call: Call) -> None:
            if call.verb == "create" and len(looks) == 1:
                await rival.append(gap(7))

        def only_one(state: BranchState) -> None:
            looks.append(len(state.gaps))
            if state.gaps:
                raise LogConflict("somebody was faster")

        log = BranchLog(FaultyStore(store, before=interfere), "main", ManualClock(), "loser")
        with pytest.raises(LogConflict, match="somebody was faster"):
            await log.append(gap(1), check=only_one)
        assert looks == [0, 1]
        head = await rival.load()
        assert head is not None and gap_numbers(head) == [7]

    run(work())


def test_losing_every_race_ends() -> None:
    async def work() -> None:
        store = MemoryStore()
        rival = await begun(store, seed=9)
        clock = ManualClock()
        raced = 0

        async def interfere(call: Call) -> None:
            nonlocal raced
            if call.verb == "create":
                raced += 1
                await rival.append(cover(raced))

        log = BranchLog(FaultyStore(store, before=interfere), "main", clock, "loser")
        with pytest.raises(Unavailable, match="lost the race"):
            await log.append(gap(1))
        assert raced == ATTEMPTS
        assert sum(clock.slept) < 60

    run(work())


def test_an_entry_that_others_built_on_is_not_repeated() -> None:
    """The newest entry is another's, and mine stands all the same."""

    async def work() -> None:
        store = MemoryStore()
        rival = await begun(store, seed=9)
        created = False

        async def interfere(call: Call) -> None:
            nonlocal created
            if created and call.verb == "list":
                created = False
                for number in range(40):
                    await rival.append(gap(100 + number))
            created = call.verb == "create"

        head = await (await begun(FaultyStore(store, before=interfere))).append(gap(1))
        assert head.number == 41
        assert gap_numbers(head) == [1, *range(100, 140)]

    run(work())


def test_an_archiver_overtaken_while_it_commits_is_fenced() -> None:
    async def work() -> None:
        store = MemoryStore()
        rival = await begun(store, seed=9)
        created = False

        async def interfere(call: Call) -> None:
            nonlocal created
            if created and call.verb == "list":
                created = False
                await rival.claim_epoch()
            created = call.verb == "create" and armed

        armed = False
        log = await begun(FaultyStore(store, before=interfere))
        epoch, _ = await log.claim_epoch()
        armed = True
        with pytest.raises(Fenced):
            await log.append(gap(1), epoch=epoch)

    run(work())


@pytest.mark.parametrize("long_states", [False, True])
def test_a_zombie_that_recreates_a_collected_number_has_lost(long_states: bool) -> None:
    """Asleep between reading the head and creating its number, while the log went on and was collected."""

    async def work() -> None:
        store = MemoryStore()
        rival = await begun(store, seed=9)
        if long_states:
            await rival.append(gap(0, reason="x" * 70_000))
        asleep = True

        async def interfere(call: Call) -> None:
            nonlocal asleep
            if call.verb == "create" and asleep:
                asleep = False
                for number in range(150):
                    await rival.append(cover(number))
                old = [keys.log_entry("main", number) for number in range(60)]
                await store.delete(old)

        log = await begun(FaultyStore(store, before=interfere))
        head = await log.append(gap(1))
        assert head.number == 151 + long_states
        assert gap_numbers(head) == ([0, 1] if long_states else [1])
        assert head == await rival.load()

    run(work())


@pytest.mark.parametrize("kept", [2, 61])
def test_a_zombie_s_number_next_to_entries_the_collector_left_has_lost(kept: int) -> None:
    """A collector killed half-way: entries after the zombie's number exist, and were not built on it."""

    async def work() -> None:
        store = MemoryStore()
        rival = await begun(store, seed=9)
        asleep = True

        async def interfere(call: Call) -> None:
            nonlocal asleep
            if call.verb == "create" and asleep:
                asleep = False
                for number in range(150):
                    await rival.append(cover(number))
                await store.delete([keys.log_entry("main", number) for number in range(kept)])

        head = await (await begun(FaultyStore(store, before=interfere))).append(gap(1))
        assert head.number == 151
        assert gap_numbers(await rival.load()) == [1]

    run(work())


def test_a_head_collected_between_listing_and_reading_is_looked_for_again() -> None:
    async def work() -> None:
        store = MemoryStore()
        rival = await begun(store, seed=9)
        await rival.append(gap(1))
        asleep = True

        async def interfere(call: Call) -> None:
            nonlocal asleep
            if call.verb == "get" and asleep:
                asleep = False
                await rival.append(gap(2))
                await store.delete([call.key])

        head = await read_head(FaultyStore(store, before=interfere), "main")
        assert gap_numbers(head) == [1, 2]

    run(work())


def test_a_head_that_stays_missing_is_damage() -> None:
    async def work() -> None:
        store = MemoryStore()
        await begun(store)

        async def interfere(call: Call) -> None:
            if call.verb == "get":
                await store.delete([call.key])
            elif call.verb == "list":
                await store.create(keys.log_entry("main", 0), b"x")

        with pytest.raises(MissingObject):
            await read_head(FaultyStore(store, before=interfere), "main")

    run(work())


def test_a_flipped_bit_is_damage() -> None:
    """P5."""

    async def work() -> None:
        store = MemoryStore()
        log = await begun(store)
        head = await log.append(RecordProgress(None))
        key = keys.log_entry("main", head.number)
        data = bytearray(await store.get(key))
        data[len(data) // 2] ^= 1
        await store.delete([key])
        await store.create(key, bytes(data))
        with pytest.raises(DamagedStore) as raised:
            await read_head(store, "main")
        assert raised.value.key == key

    run(work())
