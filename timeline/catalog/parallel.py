"""Many small reads at once, bounded: the first failure cancels the rest and is the one raised."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


async def in_order(
    items: Iterable[T],
    work: Callable[[T], Awaitable[R]],
    *,
    limit: int,
    cost: Callable[[T], int] = lambda _: 0,
    budget: int = 0,
) -> AsyncGenerator[R, None]:
    """Results in the order of the items, at most ``limit`` of them begun and not yet taken by the caller.

    The summed ``cost`` of those stays within ``budget``, but for a single item that costs more by itself.
    Close the iterator (``contextlib.aclosing``) when it is not read to its end: that cancels what is under
    way.
    """
    ahead: collections.deque[tuple[asyncio.Task[R], int]] = collections.deque()
    spent = 0
    source = iter(items)
    waiting = next(source, None)

    async def run(item: T) -> R:
        return await work(item)

    try:
        while waiting is not None or ahead:
            while waiting is not None and len(ahead) < limit:
                price = cost(waiting)
                if ahead and spent + price > budget:
                    break
                ahead.append((asyncio.create_task(run(waiting)), price))
                spent += price
                waiting = next(source, None)
            task, price = ahead[0]
            result = await task
            ahead.popleft()
            yield result
            del result, task
            spent -= price
    finally:
        for task, _ in ahead:
            task.cancel()
        await asyncio.gather(*(task for task, _ in ahead), return_exceptions=True)


async def in_parallel(items: Iterable[T], work: Callable[[T], Awaitable[R]], *, limit: int) -> list[R]:
    """All results, in the order of the items, at most ``limit`` at once."""
    async with aclosing(in_order(items, work, limit=limit)) as results:
        return [result async for result in results]
