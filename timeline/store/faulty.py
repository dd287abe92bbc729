"""A store that fails on purpose: seeded faults and crash points, for tests and drills.

A *crash point* is an instant just before or just after a write takes effect. A test runs its scenario once
without a crash, reads ``crash_points``, and then once more for each of them.
"""

from __future__ import annotations

import builtins
import collections
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from timeline.errors import Unavailable
from timeline.store.base import Listed, Refused, Store


class Crashed(Exception):
    """The process "died" here. Outside the project's error tree: nothing may catch it and go on."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call that reached the store."""

    verb: str
    """``create``, ``get``, ``list`` or ``delete``."""
    key: str
    """The key, the prefix of a listing, or the first of the keys to delete."""


@dataclass(frozen=True, slots=True)
class Faults:
    """Probabilities, each between 0 and 1."""

    unavailable: float = 0.0
    """A call raises Unavailable and has no effect."""
    lost_answer: float = 0.0
    """A write takes effect and raises Unavailable all the same."""
    flipped_bit: float = 0.0
    """A get that is not empty returns one wrong bit."""


class FaultyStore:
    """Wraps a store. The same seed and the same order of calls give the same faults.

    ``crash_at``: the crash point (from 0) at which this process dies: ``Crashed`` is raised there and by
    every later call. ``before``: awaited ahead of each call, so that somebody else can act; it may raise.
    """

    def __init__(
        self,
        store: Store,
        *,
        seed: int = 0,
        faults: Faults | None = None,
        crash_at: int | None = None,
        before: Callable[[Call], Awaitable[None]] | None = None,
    ) -> None:
        self._store = store
        self._random = random.Random(seed)
        self.faults = faults or Faults()
        self.crash_at = crash_at
        self.before = before
        self.crash_points = 0
        self.crashed = False
        self.calls: collections.deque[Call] = collections.deque(maxlen=100_000)

    @property
    def url(self) -> str:
        return self._store.url

    async def create(self, key: str, data: bytes | memoryview) -> bool:
        await self._enter(Call("create", key))
        self._crash_point()
        created = await self._store.create(key, data)
        self._crash_point()
        self._lose_answer(key)
        return created

    async def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        await self._enter(Call("get", key))
        data = await self._store.get(key, start, length)
        if data and self._strikes(self.faults.flipped_bit):
            wrong = bytearray(data)
            wrong[self._random.randrange(len(wrong))] ^= 1 << self._random.randrange(8)
            return bytes(wrong)
        return data

    async def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> builtins.list[Listed]:
        await self._enter(Call("list", prefix))
        return await self._store.list(prefix, after=after, limit=limit)

    async def delete(self, keys: Sequence[str]) -> Sequence[Refused]:
        first = keys[0] if keys else ""
        await self._enter(Call("delete", first))
        self._crash_point()
        refused = await self._store.delete(keys)
        self._crash_point()
        self._lose_answer(first)
        return refused

    async def aclose(self) -> None:
        await self._store.aclose()

    async def _enter(self, call: Call) -> None:
        if self.crashed:
            raise Crashed(f"{call.verb} {call.key} after the crash")
        self.calls.append(call)
        if self.before is not None:
            await self.before(call)
        if self._strikes(self.faults.unavailable):
            raise Unavailable(f"injected: {call.verb} {call.key} was not carried out")

    def _lose_answer(self, key: str) -> None:
        if self._strikes(self.faults.lost_answer):
            raise Unavailable(f"injected: the answer about {key} was lost")

    def _crash_point(self) -> None:
        if self.crashed:
            raise Crashed("after the crash")
        here, self.crash_points = self.crash_points, self.crash_points + 1
        if here == self.crash_at:
            self.crashed = True
            raise Crashed(f"at crash point {here}")

    def _strikes(self, probability: float) -> bool:
        return probability > 0.0 and self._random.random() < probability
