"""A store in this process's memory, for tests and dry runs. Gone with the process."""

from __future__ import annotations

import bisect
import builtins
from collections.abc import Sequence

from timeline.errors import DamagedStore, NotFound
from timeline.store._arguments import check_key, check_limit, check_range
from timeline.store.base import Listed, Refused


class MemoryStore:
    """Objects in a dict. Atomic because nothing here awaits."""

    def __init__(self, name: str = "store") -> None:
        self._name = name
        self._objects: dict[str, bytes] = {}
        self._keys: builtins.list[str] = []

    @property
    def url(self) -> str:
        return f"memory://{self._name}"

    async def create(self, key: str, data: bytes | memoryview) -> bool:
        check_key(key)
        there = self._objects.get(key)
        if there is not None:
            return there == data
        self._objects[key] = bytes(data)
        bisect.insort(self._keys, key)
        return True

    async def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        check_key(key)
        check_range(start, length)
        try:
            data = self._objects[key]
        except KeyError:
            raise NotFound(key) from None
        if start < 0:
            return data[start:]
        end = len(data) if length is None else start + length
        if start > len(data) or end > len(data):
            raise DamagedStore(key, len(data), f"object ends here, {max(start, end)} bytes expected")
        return data[start:end]

    async def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> builtins.list[Listed]:
        check_limit(limit)
        found: builtins.list[Listed] = []
        first = bisect.bisect_left(self._keys, prefix)
        if after:
            first = max(first, bisect.bisect_right(self._keys, after))
        for index in range(first, len(self._keys)):
            key = self._keys[index]
            if not key.startswith(prefix) or (limit is not None and len(found) >= limit):
                break
            found.append(Listed(key, len(self._objects[key])))
        return found

    async def delete(self, keys: Sequence[str]) -> Sequence[Refused]:
        for key in keys:
            check_key(key)
            if self._objects.pop(key, None) is not None:
                self._keys.pop(bisect.bisect_left(self._keys, key))
        return ()

    async def aclose(self) -> None:
        """Nothing to release; what it holds stays readable."""
