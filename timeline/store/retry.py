"""Bounded retries around any store.

Retrying ``create`` is safe: it is create-if-absent, and a store that meets equal bytes under the key says
they are ours, so an attempt that was carried out but whose answer was lost is found by the next one.
"""

from __future__ import annotations

import builtins
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from timeline.clock import Clock
from timeline.errors import Unavailable
from timeline.store.base import Listed, Refused, Store

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long to go on. With the defaults a call that fails at once is given up after about 6 s."""

    attempts: int = 8
    """At most so many calls, the first included."""
    deadline_seconds: float = 90.0
    """No attempt begins later than this after the first; one under way is bounded by the store itself."""
    first_seconds: float = 0.1
    """The wait before the second attempt is drawn from [0, this); it doubles for each further one."""
    longest_seconds: float = 5.0
    """Upper bound of every such draw."""


class RetryingStore:
    """Repeats calls that raise Unavailable, with full jitter, within ``policy``; other errors pass."""

    def __init__(self, store: Store, clock: Clock, policy: RetryPolicy | None = None) -> None:
        self._store = store
        self._clock = clock
        self._policy = policy or RetryPolicy()

    @property
    def url(self) -> str:
        return self._store.url

    async def create(self, key: str, data: bytes | memoryview) -> bool:
        return await self._repeat(lambda: self._store.create(key, data))

    async def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        return await self._repeat(lambda: self._store.get(key, start, length))

    async def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> builtins.list[Listed]:
        return await self._repeat(lambda: self._store.list(prefix, after=after, limit=limit))

    async def delete(self, keys: Sequence[str]) -> Sequence[Refused]:
        return await self._repeat(lambda: self._store.delete(keys))

    async def aclose(self) -> None:
        await self._store.aclose()

    async def _repeat(self, call: Callable[[], Awaitable[_T]]) -> _T:
        policy = self._policy
        began = self._clock.monotonic()
        attempt = 1
        while True:
            try:
                return await call()
            except Unavailable as error:
                wait = self._clock.random() * min(
                    policy.longest_seconds, policy.first_seconds * 2.0 ** (attempt - 1)
                )
                spent = self._clock.monotonic() - began
                if attempt >= policy.attempts or spent + wait > policy.deadline_seconds:
                    plural = "s" if attempt > 1 else ""
                    raise Unavailable(
                        f"{error.message} (gave up after {attempt} attempt{plural} in {spent:.0f} s)",
                        hint=error.hint,
                    ) from error
            attempt += 1
            await self._clock.sleep(wait)
