"""A store whose writes can be frozen, failed or slowed while a test runs."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import Sequence

from timeline.clock import Clock
from timeline.errors import Unavailable
from timeline.store.base import Listed, Refused, Store


class GatedStore:
    """Passes everything on; ``create`` of chunks obeys the gate."""

    def __init__(self, inner: Store, clock: Clock) -> None:
        self._inner = inner
        self._clock = clock
        self._open = asyncio.Event()
        self._open.set()
        self.failing = False
        self.delay_seconds = 0.0

    @property
    def url(self) -> str:
        return self._inner.url

    def freeze(self) -> None:
        """Creates wait."""
        self._open.clear()

    def thaw(self) -> None:
        """Creates work again."""
        self.failing = False
        self._open.set()

    def obey(self, line: str) -> None:
        """A command: ``freeze``, ``thaw``, ``fail``, ``slow SECONDS``."""
        words = line.split()
        if words[:1] == ["freeze"]:
            self.freeze()
        elif words[:1] == ["thaw"]:
            self.thaw()
        elif words[:1] == ["fail"]:
            self.failing = True
        elif words[:1] == ["slow"]:
            self.delay_seconds = float(words[1])

    async def create(self, key: str, data: bytes | memoryview) -> bool:
        if key.startswith("wal/"):
            await self._open.wait()
            if self.failing:
                raise Unavailable(f"injected: {key} was not stored")
            if self.delay_seconds:
                await self._clock.sleep(self.delay_seconds)
        return await self._inner.create(key, data)

    async def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        return await self._inner.get(key, start, length)

    async def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> builtins.list[Listed]:
        return await self._inner.list(prefix, after=after, limit=limit)

    async def delete(self, keys: Sequence[str]) -> Sequence[Refused]:
        return await self._inner.delete(keys)

    async def aclose(self) -> None:
        await self._inner.aclose()
