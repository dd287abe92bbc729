"""A clock that only tests move: sleeping takes no time but is remembered."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable


class ManualClock:
    """``sleep`` and ``pause`` advance ``now`` and ``monotonic`` at once; ``slept`` has every one of them."""

    def __init__(self, *, now: int = 1_768_900_000_000_000, seed: int = 0) -> None:
        self.slept: list[float] = []
        self.draw: Callable[[], float] = random.Random(seed).random
        self._now = now
        self._elapsed = 0.0
        self._tokens = random.Random(seed)

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._elapsed += seconds
        self._now += round(seconds * 1e6)

    def now(self) -> int:
        return self._now

    def monotonic(self) -> float:
        return self._elapsed

    async def sleep(self, seconds: float) -> None:
        self.pause(seconds)
        await asyncio.sleep(0)

    def pause(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.advance(seconds)

    def random(self) -> float:
        return self.draw()

    def token(self, nbytes: int) -> str:
        return self._tokens.randbytes(nbytes).hex()
