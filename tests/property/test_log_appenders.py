"""Several appenders, interleaved any way, on a store that fails: every change once, one line of numbers."""

from __future__ import annotations

import asyncio
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.archived_wal import FIRST, incarnation
from tests.support.manual_clock import ManualClock
from timeline.catalog.branch_log import BranchLog, read_head
from timeline.errors import Fenced, LogConflict
from timeline.format import keys
from timeline.format.branch_state import BranchState, Gap, Tli
from timeline.format.log import decode_entry
from timeline.format.log_change import Begin, RecordGap
from timeline.lsn import Lsn
from timeline.store.base import Store
from timeline.store.faulty import Call, Crashed, Faults, FaultyStore
from timeline.store.memory import MemoryStore
from timeline.store.retry import RetryingStore, RetryPolicy


def change(writer: int, number: int) -> RecordGap:
    start = FIRST + writer * 100_000 + number * 1000
    return RecordGap(Gap(1, Lsn(start), Lsn(start + 1), f"{writer}.{number}"))


async def replayed(store: Store) -> BranchState:
    """The state by applying every entry from the first, each of which must be there."""
    state = BranchState.empty("main")
    listed = await store.list(keys.log_prefix("main"))
    for number, item in enumerate(reversed(listed)):
        entry = decode_entry(await store.get(item.key), item.key)
        assert entry.number == number
        state = entry.change.apply(state)
        assert entry.state in (None, state)
    return state


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    writers=st.integers(2, 4),
    changes=st.integers(1, 5),
    crash_at=st.none() | st.integers(0, 12),
    faults=st.sampled_from([Faults(), Faults(unavailable=0.2), Faults(lost_answer=0.3)]),
)
def test_every_change_is_there_once(
    seed: int, writers: int, changes: int, crash_at: int | None, faults: Faults
) -> None:
    """P2, P4, EDGE 41: the same seed gives the same interleaving."""
    schedule = random.Random(seed)

    async def let_others_go(call: Call) -> None:
        for _ in range(schedule.randrange(4)):
            await asyncio.sleep(0)

    async def run() -> None:
        shared = MemoryStore()
        opener = BranchLog(shared, "main", ManualClock(), "opener")
        await opener.append(Begin(incarnation(FIRST), Tli(1, None, FIRST, FIRST, None, None)))
        done: set[str] = set()
        unsure: set[str] = set()

        async def write(writer: int) -> None:
            clock = ManualClock(seed=seed + writer)
            store = FaultyStore(
                shared,
                seed=seed + writer,
                faults=faults,
                crash_at=crash_at if writer == 0 else None,
                before=let_others_go,
            )
            policy = RetryPolicy(attempts=60, deadline_seconds=1e9)
            log = BranchLog(RetryingStore(store, clock, policy), "main", clock, f"writer-{writer}")
            for number in range(changes):
                one = change(writer, number)
                unsure.add(one.gap.reason)
                try:
                    head = await log.append(one)
                except Crashed:
                    return
                assert one.gap in head.state.gaps
                unsure.discard(one.gap.reason)
                done.add(one.gap.reason)

        await asyncio.gather(*(write(writer) for writer in range(writers)))
        head = await read_head(shared, "main")
        assert head is not None
        assert head.state == await replayed(shared)
        reasons = [one.reason for one in head.state.gaps]
        assert len(set(reasons)) == len(reasons)
        assert done <= set(reasons) <= done | unsure
        assert len(unsure) <= (crash_at is not None)

    asyncio.run(run())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32), archivers=st.integers(2, 4))
def test_archivers_never_interleave(seed: int, archivers: int) -> None:
    """P4, EDGE 11: in the log, epochs of archivers' entries never go back."""
    schedule = random.Random(seed)

    async def let_others_go(call: Call) -> None:
        for _ in range(schedule.randrange(6)):
            await asyncio.sleep(0)

    async def run() -> None:
        shared = MemoryStore()
        opener = BranchLog(shared, "main", ManualClock(), "opener")
        await opener.append(Begin(incarnation(FIRST), Tli(1, None, FIRST, FIRST, None, None)))
        fenced = 0

        async def archive(writer: int) -> None:
            nonlocal fenced
            store = FaultyStore(shared, before=let_others_go)
            log = BranchLog(store, "main", ManualClock(seed=seed + writer), f"writer-{writer}")
            try:
                epoch, _ = await log.claim_epoch()
                for number in range(6):
                    await log.append(change(writer, number), epoch=epoch)
            except Fenced:
                fenced += 1

        await asyncio.gather(*(archive(writer) for writer in range(archivers)))
        await replayed(shared)
        listed = await shared.list(keys.log_prefix("main"))
        epochs = [decode_entry(await shared.get(item.key), item.key).epoch for item in reversed(listed)]
        bound = [epoch for epoch in epochs if epoch]
        assert bound == sorted(bound)
        assert fenced < archivers

    asyncio.run(run())


def test_a_conflict_tells_the_second_of_two_same_changes() -> None:
    """Two writers of one and the same change, in every interleaving of their calls: one wins."""

    async def run(seed: int) -> None:
        schedule = random.Random(seed)

        async def let_others_go(call: Call) -> None:
            for _ in range(schedule.randrange(4)):
                await asyncio.sleep(0)

        shared = MemoryStore()
        opener = BranchLog(shared, "main", ManualClock(), "opener")
        await opener.append(Begin(incarnation(FIRST), Tli(1, None, FIRST, FIRST, None, None)))
        logs = [
            BranchLog(
                FaultyStore(shared, before=let_others_go), "main", ManualClock(seed=writer), f"{writer}"
            )
            for writer in range(2)
        ]
        results = await asyncio.gather(*(log.append(change(0, 0)) for log in logs), return_exceptions=True)
        assert sum(isinstance(result, LogConflict) for result in results) == 1
        assert len((await replayed(shared)).gaps) == 1

    for seed in range(200):
        asyncio.run(run(seed))
