"""A store that counts what is written to it, for tests of deduplication."""

from __future__ import annotations

import builtins
from collections.abc import Sequence

from timeline.store.base import Listed, Refused, Store


class CountingStore:
    """Passes everything on; counts objects that were not there before."""

    def __init__(self, inner: Store) -> None:
        self._inner = inner
        self.created: dict[str, int] = {}
        """Keys created through this store, with their sizes."""

    @property
    def url(self) -> str:
        return self._inner.url

    def created_bytes(self, prefix: str) -> int:
        """Sum of the sizes of what was created below a prefix."""
        return sum(size for key, size in self.created.items() if key.startswith(prefix))

    async def create(self, key: str, data: bytes | memoryview) -> bool:
        present = bool(await self._inner.list(key, limit=1))
        created = await self._inner.create(key, data)
        if created and not present:
            self.created[key] = len(data)
        return created

    async def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        return await self._inner.get(key, start, length)

    async def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> builtins.list[Listed]:
        return await self._inner.list(prefix, after=after, limit=limit)

    async def delete(self, keys: Sequence[str]) -> Sequence[Refused]:
        return await self._inner.delete(keys)

    async def aclose(self) -> None:
        await self._inner.aclose()
