"""Time, sleep and randomness, injected: nothing else in the project asks the machine for them.

Instants are integers: microseconds since 1970-01-01 00:00:00 UTC ("micros").
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from typing import Protocol

Micros = int

POSTGRES_EPOCH_MICROS = 946_684_800_000_000
"""2000-01-01 00:00:00 UTC, Postgres's own epoch (src/include/datatype/timestamp.h), in micros."""


class Clock(Protocol):
    """What the project may ask of time and chance."""

    def now(self) -> Micros:
        """Wall-clock time in micros."""
        ...

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Suspend the calling task."""
        ...

    def pause(self, seconds: float) -> None:
        """Block the calling thread (synchronous edges only)."""
        ...

    def random(self) -> float:
        """A number in [0, 1), for jitter."""
        ...

    def token(self, nbytes: int) -> str:
        """``2 × nbytes`` random hex digits, for ids."""
        ...


class SystemClock:
    """The machine's own clock and randomness."""

    def now(self) -> Micros:
        return time.time_ns() // 1000

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def random(self) -> float:
        return random.random()

    def token(self, nbytes: int) -> str:
        return secrets.token_hex(nbytes)


async def sleep_unless(clock: Clock, seconds: float | None, *events: asyncio.Event) -> None:
    """Return when one of the events is set, or after so long (``None``: only then)."""
    waited: list[asyncio.Future[object]] = [asyncio.ensure_future(event.wait()) for event in events]
    if seconds is not None:
        waited.append(asyncio.ensure_future(clock.sleep(seconds)))
    try:
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waited:
            task.cancel()
        await asyncio.gather(*waited, return_exceptions=True)
