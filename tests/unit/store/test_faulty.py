"""FaultyStore: what the other tests rely on when they use it."""

from __future__ import annotations

import asyncio

import pytest

from timeline.errors import NotFound, Unavailable
from timeline.store.faulty import Call, Crashed, Faults, FaultyStore
from timeline.store.memory import MemoryStore


async def _outcomes(seed: int) -> list[str]:
    store = FaultyStore(MemoryStore(), seed=seed, faults=Faults(unavailable=0.3, lost_answer=0.3))
    outcomes = []
    for number in range(40):
        try:
            await store.create(f"key/{number}", b"x")
            outcomes.append("created")
        except Unavailable as error:
            outcomes.append(error.message)
    return outcomes


def test_a_seed_repeats_its_faults() -> None:
    one, again, other = (asyncio.run(_outcomes(seed)) for seed in (1, 1, 2))
    assert one == again != other
    assert len({outcome.split(":")[0] for outcome in one}) == 2
    assert any("not carried out" in outcome for outcome in one)
    assert any("was lost" in outcome for outcome in one)


def test_every_write_has_a_crash_point_before_and_after() -> None:
    """P1: tests walk over all of them."""

    async def scenario(store: FaultyStore) -> None:
        await store.create("a", b"1")
        await store.create("b", b"2")
        await store.delete(["a"])

    async def run() -> None:
        whole = FaultyStore(MemoryStore())
        await scenario(whole)
        assert whole.crash_points == 6
        left = []
        for point in range(whole.crash_points):
            memory = MemoryStore()
            store = FaultyStore(memory, crash_at=point)
            with pytest.raises(Crashed):
                await scenario(store)
            with pytest.raises(Crashed):
                await store.list("")
            left.append([item.key for item in await memory.list("")])
        assert left == [[], ["a"], ["a"], ["a", "b"], ["a", "b"], ["b"]]

    asyncio.run(run())


def test_a_flipped_bit_is_one_bit() -> None:
    async def run() -> None:
        memory = MemoryStore()
        await memory.create("key", b"\0" * 100)
        data = await FaultyStore(memory, seed=3, faults=Faults(flipped_bit=1.0)).get("key")
        assert sum(byte.bit_count() for byte in data) == 1

    asyncio.run(run())


def test_somebody_else_can_act_between_two_calls() -> None:
    async def run() -> None:
        memory = MemoryStore()

        async def rival(call: Call) -> None:
            if call == Call("create", "log/1"):
                await memory.create("log/1", b"rival")

        store = FaultyStore(memory, before=rival)
        with pytest.raises(NotFound):
            await store.get("log/1")
        assert await store.create("log/1", b"mine") is False
        assert list(store.calls) == [Call("get", "log/1"), Call("create", "log/1")]

    asyncio.run(run())
