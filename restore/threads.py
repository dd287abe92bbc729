"""Blocking work in threads that is not left running when whoever waits for it is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def to_the_end(work: Callable[[], T]) -> T:
    """Run it in a thread. When cancelled, wait until it has ended, then be cancelled.

    For work on files that the caller closes or removes as soon as it is told of the cancellation.
    """
    running = asyncio.ensure_future(asyncio.to_thread(work))
    cancelled: asyncio.CancelledError | None = None
    while not running.done():
        try:
            await asyncio.wait({running})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        # Its own failure, if any, matters no more; it must only be looked at.
        running.exception()
        raise cancelled
    return running.result()
