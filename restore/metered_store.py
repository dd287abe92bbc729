"""A store that counts what is asked of it."""

from __future__ import annotations

import builtins
from collections.abc import Sequence

from timeline.store.base import Listed, Refused, Store


class MeteredStore:
    """Passes everything on to another store; counts requests, and the bytes that came back."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.requests = 0
        self.fetched_bytes = 0

    @property
    def url(self) -> str:
        return self._store.url

    async def create(self, key: str, data: bytes | memoryview) -> bool:
        self.requests += 1
        return await self._store.create(key, data)

    async def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        self.requests += 1
        data = await self._store.get(key, start, length)
        self.fetched_bytes += len(data)
        return data

    async def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> builtins.list[Listed]:
        self.requests += 1
        return await self._store.list(prefix, after=after, limit=limit)

    async def delete(self, keys: Sequence[str]) -> Sequence[Refused]:
        self.requests += 1
        return await self._store.delete(keys)

    async def aclose(self) -> None:
        await self._store.aclose()
