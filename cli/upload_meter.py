"""Counts and times what an archiver uploads: chunks of WAL, each of them a COMMIT's wait."""

from __future__ import annotations

import builtins
from collections.abc import Sequence

from timeline.clock import Clock
from timeline.errors import TimelineError
from timeline.format.keys import parse_chunk
from timeline.store.base import Listed, Store


class UploadMeter:
    """Passes everything on to another store."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self.uploads = 0
        """Chunks that are stored."""
        self.seconds = 0.0
        """Sum of how long those took, the store's own retries included."""
        self.errors = 0
        """Uploads that the store gave up."""

    @property
    def url(self) -> str:
        return self._store.url

    async def create(self, key: str, data: bytes | memoryview) -> bool:
        if parse_chunk(key) is None:
            return await self._store.create(key, data)
        began = self._clock.monotonic()
        try:
            mine = await self._store.create(key, data)
        except TimelineError:
            self.errors += 1
            raise
        self.uploads += 1
        self.seconds += self._clock.monotonic() - began
        return mine

    async def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        return await self._store.get(key, start, length)

    async def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> builtins.list[Listed]:
        return await self._store.list(prefix, after=after, limit=limit)

    async def delete(self, keys: Sequence[str]) -> None:
        await self._store.delete(keys)

    async def aclose(self) -> None:
        await self._store.aclose()
