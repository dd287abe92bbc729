"""RetryingStore: bounded in number and in time, jittered, and only for what may pass."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.manual_clock import ManualClock
from timeline.errors import NotFound, Unavailable
from timeline.store.faulty import Call, Faults, FaultyStore
from timeline.store.memory import MemoryStore
from timeline.store.retry import RetryingStore, RetryPolicy


def test_gives_up_after_so_many_attempts_and_says_so() -> None:
    clock = ManualClock()
    broken = FaultyStore(MemoryStore(), faults=Faults(unavailable=1.0))
    store = RetryingStore(broken, clock, RetryPolicy(attempts=5, deadline_seconds=1e9))
    with pytest.raises(Unavailable, match=r"gave up after 5 attempts in \d+ s"):
        asyncio.run(store.get("key"))
    assert len(broken.calls) == 5
    assert len(clock.slept) == 4


def test_waits_are_drawn_from_a_doubling_bounded_range() -> None:
    clock = ManualClock()
    clock.draw = lambda: 0.5
    store = RetryingStore(
        FaultyStore(MemoryStore(), faults=Faults(unavailable=1.0)),
        clock,
        RetryPolicy(attempts=8, first_seconds=0.2, longest_seconds=3.0, deadline_seconds=1e9),
    )
    with pytest.raises(Unavailable):
        asyncio.run(store.list("x"))
    assert clock.slept == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.5, 1.5, 1.5])


def test_no_attempt_begins_after_the_deadline() -> None:
    """A server that takes 20 s to fail is asked five times within 90 s, though eight attempts are allowed."""
    clock = ManualClock()
    clock.draw = lambda: 0.0

    async def slow(call: Call) -> None:
        clock.advance(20.0)

    broken = FaultyStore(MemoryStore(), faults=Faults(unavailable=1.0), before=slow)
    store = RetryingStore(broken, clock, RetryPolicy(attempts=8, deadline_seconds=90.0))
    with pytest.raises(Unavailable, match="gave up after 5 attempts in 100 s"):
        asyncio.run(store.create("key", b"x"))
    assert len(broken.calls) == 5


def test_errors_that_do_not_pass_are_not_repeated() -> None:
    clock = ManualClock()
    inner = FaultyStore(MemoryStore())
    with pytest.raises(NotFound):
        asyncio.run(RetryingStore(inner, clock).get("missing"))
    assert len(inner.calls) == 1
    assert clock.slept == []


def test_a_lost_answer_is_found_to_be_ours() -> None:
    """P2: the write took effect, the answer did not come: the next attempt meets its own bytes."""

    async def run() -> None:
        memory = MemoryStore()
        faulty = FaultyStore(memory, faults=Faults(lost_answer=1.0))
        store = RetryingStore(faulty, ManualClock(), RetryPolicy(attempts=2))
        with pytest.raises(Unavailable):
            await store.create("key", b"mine")
        assert await memory.get("key") == b"mine"
        faulty.faults = Faults()
        assert await store.create("key", b"mine") is True
        assert await store.create("key", b"other") is False

    asyncio.run(run())
