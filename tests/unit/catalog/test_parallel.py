"""Many reads at once: in order, bounded, and none left behind."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timeline.catalog.parallel import in_order, in_parallel


class Work:
    """Counts what is under way or done and not yet taken."""

    def __init__(self) -> None:
        self.running = 0
        self.begun = 0
        self.cancelled = 0

    async def __call__(self, item: int) -> int:
        self.begun += 1
        self.running += 1
        try:
            for _ in range(item * 7 % 5):
                await asyncio.sleep(0)
            return item
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1


@settings(deadline=None)
@given(items=st.lists(st.integers(1, 9), max_size=20), limit=st.integers(1, 6), budget=st.integers(0, 20))
def test_in_order_within_both_bounds(items: list[int], limit: int, budget: int) -> None:
    """P9: at most ``limit`` begun and not yet taken, and together within the budget or a single one."""

    async def run() -> None:
        work = Work()
        taken: list[int] = []
        results = in_order(items, work, limit=limit, cost=lambda item: item, budget=budget)
        async with aclosing(results):
            async for result in results:
                held = items[len(taken) : work.begun]
                assert 1 <= len(held) <= limit
                assert len(held) == 1 or sum(held) <= budget
                taken.append(result)
                await asyncio.sleep(0)
        assert taken == items

    asyncio.run(run())


def test_it_does_read_ahead() -> None:
    async def run() -> None:
        work = Work()
        async with aclosing(in_order(range(1, 10), work, limit=4)) as results:
            assert await anext(results) == 1
            assert work.begun == 4

    asyncio.run(run())


def test_the_first_failure_is_raised_and_the_rest_cancelled() -> None:
    async def run() -> None:
        started = asyncio.Event()
        ended: list[int] = []

        async def work(item: int) -> int:
            if item == 2:
                await started.wait()
                raise ValueError("the second")
            if item == 3:
                started.set()
            try:
                await asyncio.sleep(0 if item == 1 else 3600)
            finally:
                ended.append(item)
            return item

        with pytest.raises(ValueError, match="the second"):
            await in_parallel([1, 2, 3, 4], work, limit=4)
        assert sorted(ended) == [1, 3, 4]

    asyncio.run(run())


def test_closing_early_leaves_nothing_running() -> None:
    async def run() -> None:
        ended = 0

        async def work(item: int) -> int:
            nonlocal ended
            try:
                await asyncio.sleep(0 if item == 1 else 3600)
            finally:
                ended += 1
            return item

        async with aclosing(in_order([1, 2, 3], work, limit=3)) as results:
            await anext(results)
        assert ended == 3
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())
