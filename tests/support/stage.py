"""A deterministic scheduler: of all calls that actors would make on a store, one goes on at a time, chosen by a seed.

An actor may be stopped at any call for weeks (SIGSTOP) while the others go on and time passes. Everything between
two calls runs to its end at once, in the event loop's own order, so a seed reproduces its schedule.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Coroutine
from concurrent.futures import Executor, Future
from typing import Any

HOUR = 3_600_000_000
SKEW = HOUR
"""No actor's clock is further from the world's."""


class Stage:
    """Whose turn it is, and what time."""

    def __init__(self, seed: int, *, grace: int, now: int) -> None:
        self.random = random.Random(seed)
        self.now = now
        self.steps = 0
        self._grace = grace
        # Where time is slow, a plan sees many changes within its grace; where it is fast, marks are due at once.
        self._jumps = self.random.choice((0.005, 0.02, 0.08))
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []
        self._stopped: dict[str, int] = {}

    async def turn(self, actor: str) -> None:
        """Wait until it is this actor's turn."""
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((actor, mine))
        await mine

    async def play(self, actors: list[Coroutine[Any, Any, None]]) -> None:
        """Run them all to their ends; raises the first failure."""
        tasks = [asyncio.ensure_future(actor) for actor in actors]
        try:
            while True:
                await _settle()
                for task in tasks:
                    if task.done():
                        task.result()
                self._waiting = [(actor, mine) for actor, mine in self._waiting if not mine.done()]
                if not self._waiting:
                    break
                self._step()
            if left := [task for task in tasks if not task.done()]:
                raise AssertionError(f"{len(left)} actors wait for something that nobody does")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _step(self) -> None:
        self.steps += 1
        self.now += 1_000_000
        if self.random.random() < self._jumps:
            self.now += round(self.random.random() * 1.5 * self._grace)
        ready = [one for one in self._waiting if self._stopped.get(one[0], 0) <= self.now]
        if not ready:
            self.now = min(self._stopped[actor] for actor, _ in self._waiting)
            return
        actor, mine = self.random.choice(ready)
        if self.random.random() < 0.02:
            self._stopped[actor] = self.now + round(self.random.random() * 7 * self._grace)
            return
        self._waiting.remove((actor, mine))
        mine.set_result(None)


class StagedClock:
    """An actor's clock: the world's time with a skew; sleeping is a turn, and chance is the actor's own."""

    def __init__(self, stage: Stage, actor: str, seed: int) -> None:
        self._stage = stage
        self._actor = actor
        self._random = random.Random(f"{seed} {actor}")
        self.skew = round((2 * self._random.random() - 1) * SKEW)

    def now(self) -> int:
        return self._stage.now + self.skew

    def monotonic(self) -> float:
        return self._stage.now / 1e6

    async def sleep(self, seconds: float) -> None:
        await self._stage.turn(self._actor)

    def pause(self, seconds: float) -> None:
        raise AssertionError("nobody here blocks")

    def random(self) -> float:
        return self._random.random()

    def token(self, nbytes: int) -> str:
        return self._random.randbytes(nbytes).hex()


class InlineExecutor(Executor):
    """Runs what it gets at once, so that no thread disturbs the order."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 (it is the future that raises)
            done.set_exception(error)
        return done


def inline(fn: Any, /, *args: Any, **kwargs: Any) -> Awaitable[Any]:
    """``asyncio.to_thread`` without the thread."""

    async def run() -> Any:
        return fn(*args, **kwargs)

    return run()


async def _settle() -> None:
    """Until nobody can go on without a turn."""
    ready = asyncio.get_running_loop()._ready  # type: ignore[attr-defined]
    await asyncio.sleep(0)
    while ready:  # noqa: ASYNC110 (nothing to wait for: it is the others that run)
        await asyncio.sleep(0)
